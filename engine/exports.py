"""What `export.py` does: files for other programs, and the report of what a model costs."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.tasks import TASKS
from models import compressed, huggingface, onnx
from models.checkpoint import load_trained, stored_tensors
from reports import costs
from utils import UserError, atomic_folder


def export(args: argparse.Namespace, config: dict) -> None:
    """Writes the model in the format of --to, then reports."""
    model = TASKS[config["task"]].build_model(config).eval()
    print(load_trained(model, args.pruned))
    if args.to:
        out, weights = Path(args.out), rounded(model, getattr(torch, args.dtype))
        reader = f"--pruned {out}"
        try:
            if args.to == "compressed":
                compressed.write(out, weights)
            else:
                with atomic_folder(out) as folder:
                    if args.to == "onnx":
                        print(onnx.write_folder(model, config, folder))
                        reader = "onnxruntime, as docs/onnx.md shows"
                    else:
                        huggingface.write_folder(model, config, folder, dict(weights))
                        reader += f", or BlipForConditionalGeneration.from_pretrained('{out}')"
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {out} ({error}): choose another --out") from error
        size = sum(file.stat().st_size for file in (out, *out.rglob("*")) if file.is_file())
        print(f"{out}: {size / 1e6:.1f} MB; read it with {reader}")
    if args.report:
        found = costs.report(model, config)
        lines = costs.lines(found)
        for form in ("dense", "sparse"):
            lines[f"memory, {form}"] = costs.with_prefix(found[form]["resident_bytes"]) + "B"
        for what, value in lines.items():
            print(f"{what:26} {value}")
        print(found["sparse_layers"])


def rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a model as `dtype`, one by one."""
    for name, tensor in stored_tensors(model):
        converted = tensor.to(dtype) + 0.0  # pruners may leave negative zeros
        if not converted.isfinite().all():
            raise UserError(f"--dtype: {name} has values beyond float16's range; take bfloat16")
        yield name, converted
