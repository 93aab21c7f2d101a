"""What `export.py` does: files for other programs, and the report of what a model costs."""

import argparse
from collections.abc import Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.tasks import TASKS
from models import compressed
from models.checkpoint import load_trained, stored_tensors
from models.huggingface import write_folder
from reports import costs
from utils import UserError, atomic_folder


def export(args: argparse.Namespace, config: dict) -> None:
    """Writes the model in the format of --to, then reports."""
    model = TASKS[config["task"]].build_model(config).eval()
    print(load_trained(model, args.pruned))
    if args.to:
        weights, reader = rounded(model, getattr(torch, args.dtype)), f"--pruned {args.out}"
        try:
            if args.to == "compressed":
                compressed.write(args.out, weights)
            else:
                with atomic_folder(args.out) as folder:
                    write_folder(model, config, folder, dict(weights))
                reader += f", or BlipForConditionalGeneration.from_pretrained('{args.out}')"
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write {args.out} ({error}): make room, or choose --out"
            ) from error
        files = [file for file in (args.out, *args.out.rglob("*")) if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"{args.out}: {size / 1e6:.1f} MB; read it with {reader}")
    if args.report:
        show(costs.report(model, config))


def rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a model as `dtype`, one by one."""
    for name, tensor in stored_tensors(model):
        converted = tensor.to(dtype) + 0.0  # pruners may leave negative zeros
        if not converted.isfinite().all():
            raise UserError(f"--dtype: {name} has values beyond float16's range; take bfloat16")
        yield name, converted


def show(found: dict) -> None:
    """Prints a report of `costs.report`."""
    lines = {what: shares(found[what]) for what in ("parameters", "nonzeros")}
    lines |= {f"multiply-adds, {what}": shares(n) for what, n in found["multiply_adds"].items()}
    lines |= {form: f"{count / 1e6:.1f} MB" for form, count in found["bytes"].items()}
    for form in ("dense", "sparse"):
        memory = found[form]["resident_bytes"]
        resident = f", {memory / 1e6:.0f} MB resident" if memory else ""
        lines[f"{form}, here"] = f"{found[form]['milliseconds']:.0f} ms a sample{resident}"
    for what, value in lines.items():
        print(f"{what:24} {value}")
    print(found["sparse_layers"])


def shares(counts: dict[str, int]) -> str:
    """A line such as "224.0 M (vision 86.1, language 137.9)"."""
    total = sum(counts.values())
    unit, letter = (1e9, "G") if total >= 1e9 else (1e6, "M")
    parts = ", ".join(f"{kind} {count / unit:.1f}" for kind, count in counts.items())
    return f"{total / unit:.1f} {letter} ({parts})"
