"""Models in the files of others, and what rounding their weights does to the scores of a split."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.processes import Process
from engine.run import Run
from engine.tasks import TASKS
from models import compressed
from models.checkpoint import stored_tensors
from models.huggingface import write_folder
from utils import UserError


@contextmanager
def written_whole(out: Path) -> Iterator[None]:
    """Turns a failure to write into a sentence. What is written must appear under its name whole.

    Raises:
        UserError: the disk is full, say; nothing is there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out} ({error}): make room, or choose --out") from error


def rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of the model, one by one as `dtype`.

    Raises:
        UserError: one has values beyond the range of `dtype`.
    """
    for name, tensor in stored_tensors(model):
        converted = tensor.to(dtype) + 0.0  # of zeros, which pruners may leave negative, one kind
        if not converted.isfinite().all():
            raise UserError(f"--dtype: {name} has values beyond float16's range; take bfloat16")
        yield name, converted


def write_compressed(model: nn.Module, out: Path, dtype: torch.dtype) -> None:
    """Writes the compressed file."""
    with written_whole(out):
        compressed.write(out, rounded(model, dtype))


def write_huggingface(model: nn.Module, config: dict, out: Path, dtype: torch.dtype) -> None:
    """Writes the folder, under another name until it is whole."""
    with written_whole(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.{os.getpid()}")
        unfinished.mkdir()
        try:
            write_folder(model, config, unfinished, dict(rounded(model, dtype)))
            unfinished.rename(out)
        except BaseException:
            shutil.rmtree(unfinished)
            raise


def held_out_set(config: dict, split: str) -> Dataset:
    """A held-out split, whose files are there.

    Raises:
        UserError: they are not, or there is no such split.
    """
    task = TASKS[config["task"]]
    if split not in task.held_out:
        raise UserError(f"--split {split}: this config's are {' and '.join(task.held_out)}")
    dataset = dict(zip(task.held_out, task.build_datasets(config, 0)[1:], strict=True))[split]
    dataset.check()
    return dataset


def scores(model: nn.Module, config: dict, dataset: Dataset, split: str) -> dict[str, float]:
    """The scores of a held-out split, which is evaluated as a trainer validates."""
    task = TASKS[config["task"]]
    flags = argparse.Namespace(seed=0, amp="off", evaluate=False, spice=False)
    process = Process(rank=0, world_size=1, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(flags, task, config, process, Path(folder), id_profile="")
        return task.evaluate(run, model, dataset, split)["scores"]


def show_rounding(
    model: nn.Module, config: dict, dtype: torch.dtype, dataset: Dataset, split: str
) -> None:
    """Prints what rounding does to the scores of a split; the model is rounded after it."""
    before = scores(model, config, dataset, split)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in rounded(model, dtype):
            parameters[name].copy_(tensor)
    kind = str(dtype).removeprefix("torch.")
    for name, after in scores(model, config, dataset, split).items():
        change = after - before[name]
        print(f"{split} {name}: float32 {before[name]:.4f}, {kind} {after:.4f}, {change:+.4f}")
