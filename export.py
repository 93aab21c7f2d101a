"""Makes a pruned model small, or opens it to Hugging Face's transformers; says what it costs.

    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to compressed --out blip80.safetensors
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to huggingface --out blip80 --dtype float16 --split val
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 --report

A compressed file is read wherever weights are: --pruned, --pretrained, a config's `pretrained`.
"""

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

from configs import load_config
from engine.run import Run
from engine.tasks import TASKS
from evaluation import costs
from models import compressed, sparsify_
from models.checkpoint import load_trained, stored_tensors
from models.huggingface import write_folder
from utils import Process, UserError, launch


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


def report(model: nn.Module, config: dict) -> dict:
    """Measures what a model costs, here; sparse as well, which makes it sparse.

    Returns:
        Fit for JSON: what `costs.sizes` and `costs.multiply_adds` return, and for the model as it
        is ("dense") and with sparse layers ("sparse") milliseconds a sample and resident bytes.
    """
    sample = costs.example(config["task"], config["image_size"])
    found = costs.sizes(model) | {"multiply_adds": costs.multiply_adds(model, sample)}
    found["dense"] = measured(model, config, sample)
    found["sparse_layers"] = str(sparsify_(model))
    found["sparse"] = measured(model, config, sample)
    return found


def measured(model: nn.Module, config: dict, sample: tuple[Tensor, ...]) -> dict:
    """Milliseconds of one sample (a caption; the judgement of a pair), and resident bytes."""
    if config["task"] == "caption":
        lengths = config["num_beams"], config["max_length"], config["min_length"]
        time = costs.milliseconds(lambda: model.generate(sample[0], *lengths))
    else:
        with torch.no_grad():
            time = costs.milliseconds(lambda: model.logits_from_ids(*sample[:-1]))
    return {"milliseconds": time, "resident_bytes": costs.resident_bytes()}


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


def show(found: dict) -> None:
    """Prints a report for people."""
    lines = {what: shares(found[what]) for what in ("parameters", "nonzeros")}
    lines |= {
        f"multiply-adds, {what}": shares(counts) for what, counts in found["multiply_adds"].items()
    }
    lines |= {form: f"{count / 1e6:.1f} MB" for form, count in found["bytes"].items()}
    for form in ("dense", "sparse"):
        memory = found[form]["resident_bytes"]
        resident = f", {memory / 1e6:.0f} MB resident" if memory else ""
        lines[f"{form}, here"] = f"{found[form]['milliseconds']:.0f} ms a sample{resident}"
    for what, value in lines.items():
        print(f"{what:24} {value}")
    print(found["sparse_layers"])


def shares(counts: dict[str, int]) -> str:
    """For instance "224.0 M (vision 86.1, language 137.9)"."""
    total = sum(counts.values())
    unit, letter = (1e9, "G") if total >= 1e9 else (1e6, "M")
    parts = ", ".join(f"{kind} {count / unit:.1f}" for kind, count in counts.items())
    return f"{total / unit:.1f} {letter} ({parts})"


def check_flags(args: argparse.Namespace, config: dict) -> None:
    """Checks before the model is built what can be known then.

    Raises:
        UserError: naming the flag.
    """
    if not (args.to or args.report or args.split):
        raise UserError("nothing to do: give --to with --out, --split or --report")
    if bool(args.to) != bool(args.out):
        raise UserError("--to and --out go together")
    if args.to == "huggingface" and config["task"] == "nlvr":
        raise UserError(
            "--to huggingface: transformers has no class for BLIP's NLVR2 model; take --to "
            "compressed, which this project reads"
        )
    if args.split and args.dtype == "float32":
        raise UserError("--split shows what rounding does: give --dtype float16 or bfloat16, too")
    if args.out and args.out.exists():
        raise UserError(f"--out: {args.out} exists; remove it or choose another")


def main(args: argparse.Namespace) -> None:
    """Exports, then reports."""
    config = load_config(args.config)
    check_flags(args, config)
    dataset = held_out_set(config, args.split) if args.split else None
    model = TASKS[config["task"]].build_model(config).eval()
    print(load_trained(model, args.pruned))
    dtype = getattr(torch, args.dtype)
    if args.to == "compressed":
        write_compressed(model, args.out, dtype)
    elif args.to == "huggingface":
        write_huggingface(model, config, args.out, dtype)
    if args.to:
        reader = f"--pruned {args.out}"
        if args.to == "huggingface":
            reader += f", or BlipForConditionalGeneration.from_pretrained('{args.out}')"
        print(f"{args.out}: {bytes_of(args.out) / 1e6:.1f} MB; read it with {reader}")
    if args.split:
        show_rounding(model, config, dtype, dataset, args.split)
    if args.report:
        show(report(model, config))


def bytes_of(path: Path) -> int:
    """Size of a file, or of the files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the model's experiment")
    parser.add_argument("--pruned", required=True, help="weights, or the folder of a run")
    parser.add_argument("--to", choices=["compressed", "huggingface"])
    parser.add_argument("--out", type=Path, help="file (compressed) or folder (huggingface)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of weights"
    )
    parser.add_argument(
        "--split", metavar="SPLIT", help="evaluate this split before and after rounding to --dtype"
    )
    parser.add_argument("--report", action="store_true", help="sizes, multiply-adds, time, memory")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
