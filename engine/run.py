"""A run: an experiment in one of its processes, and the checks of all that it needs."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from dimension.profile import load_profile
from engine.experiment import Experiment
from engine.processes import (
    Process,
    computes_bf16,
    init_distributed,
    keep_freed_memory,
    main_process_first,
    seed_everything,
)
from engine.tasks import Task
from models.checkpoint import load_checkpoint, load_trained
from models.text import truncated
from models.weight_files import fetch
from reports.runs import CHECKPOINTS
from utils import UserError

LOOKED_AT = 5000  # training texts whose length is counted, at most


@dataclass(frozen=True)
class Run:
    """An experiment in one of its processes.

    Attributes:
        experiment: what is run.
        process: this one of the run's processes.
        bf16: whether products are computed in bfloat16 autocast.
    """

    experiment: Experiment
    process: Process
    bf16: bool = False

    @property
    def task(self) -> Task:
        """The record of the task."""
        return self.experiment.task

    @property
    def flags(self) -> argparse.Namespace:
        """The parsed flags."""
        return self.experiment.flags

    @property
    def config(self) -> dict:
        """The config, flags in place of its own values."""
        return self.experiment.config

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return self.experiment.folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def samples_per_step(self) -> int:
        """Training samples of all processes and accumulated batches at one optimizer step."""
        batches = self.process.world_size * self.flags.gradient_accumulation_steps
        return self.config["batch_size"] * batches

    def say(self, message: str) -> None:
        """Prints on the main process only."""
        if self.process.is_main:
            print(message, flush=True)


class Mistakes:
    """Collects users' mistakes, so that a command names all of them at once."""

    def __init__(self):
        """None yet."""
        self.sentences: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A `UserError` in the block is kept and ends the block."""
        try:
            yield
        except UserError as error:
            self.sentences.append(str(error))

    def raise_all(self) -> None:
        """Raises what was collected, a line each.

        Raises:
            UserError: there was a mistake.
        """
        if self.sentences:
            raise UserError("\n       ".join(dict.fromkeys(self.sentences)))


def start(experiment: Experiment) -> Run:
    """Joins the other processes and seeds.

    Raises:
        UserError: the device or the launcher is wrong.
    """
    flags = experiment.flags
    process = init_distributed("cpu" if flags.sparse else flags.device)
    keep_freed_memory(process.device)
    seed_everything(flags.seed)
    bf16 = flags.amp == "bf16" or (flags.amp == "auto" and computes_bf16(process.device))
    return Run(experiment, process, bf16)


def prepare(
    run: Run,
) -> tuple[nn.Module, Dataset, dict[str, Dataset], dict[str, float] | None]:
    """Builds and checks data, weights and the ID profile. Writes nothing.

    Returns:
        The model with its weights on its device, the training set, the held-out sets by name (of
        an evaluation with --split, this one), and the IDs by layer name that weight scores.

    Raises:
        UserError: data, weights or the profile are wrong; names all that was found.
    """
    flags, task, mistakes = run.flags, run.task, Mistakes()
    train_set, held_out, model, weights, layer_id = None, {}, None, None, None
    with mistakes.collect():
        train_set, *sets = task.build_datasets(run.config, flags.seed)
        train_set.skip_bad_images = flags.skip_bad_images  # evaluation needs every image
        held_out = dict(zip(task.held_out, sets, strict=True))
        if flags.split:
            held_out = {flags.split: held_out[flags.split]}
    for dataset in (*([] if flags.evaluate or not train_set else [train_set]), *held_out.values()):
        with mistakes.collect():
            dataset.check()
    with mistakes.collect():
        model = task.build_model(run.config)
    with mistakes.collect():
        if run.experiment.id_profile:
            layer_id = load_profile(run.experiment.id_profile)
    with mistakes.collect():
        weights = find_weights(run)
    if model is not None and weights is not None:
        with mistakes.collect():
            load = load_trained if flags.evaluate else load_checkpoint
            run.say(str(load(model, weights)))
    mistakes.raise_all()
    device = run.process.device
    run.say(f"computes on {device} in {'bfloat16 autocast' if run.bf16 else 'float32'}")
    model.to(device)
    if not flags.evaluate and run.process.is_main:
        say_truncated(model, train_set)
    return model, train_set, held_out, layer_id


def find_weights(run: Run) -> Path | None:
    """What --pruned or the config's `pretrained` names, downloaded if it is an address.

    All processes call it; afterwards no process needs to wait for another to have the file.

    Raises:
        UserError: it is not there, or there is nothing to evaluate.
    """
    named = run.flags.pruned or run.config["pretrained"]
    if not named:
        if run.flags.evaluate:
            raise UserError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
        return None
    with main_process_first():
        return fetch(named)


def say_truncated(model: nn.Module, dataset: Dataset) -> None:
    """Prints how many training texts the model cuts; of very many, a sample is counted."""
    limit = getattr(model, "max_tokens", None)  # None: as many as there are positions
    if limit is None:
        return
    indices = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    cut = truncated(model.tokenizer, [dataset.text(index) for index in indices], limit)
    if cut:
        sample = "looked at " if len(indices) < len(dataset) else ""
        print(
            f"{cut} of {len(indices)} training texts {sample}are longer than max_tokens {limit} "
            "and are cut",
            flush=True,
        )
