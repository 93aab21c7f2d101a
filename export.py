r"""Makes a pruned model small, or opens it to other programs; reports what it costs.

    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to compressed --out blip80.safetensors
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to huggingface --out blip80 --dtype float16
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to onnx --out blip80
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 --report

A compressed file is read wherever weights are: --pruned, --pretrained, a config's `pretrained`.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from configs import load_config
from utils import UserError, launch, script_parser, user_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--config", type=user_path, required=True, help="YAML file of the experiment")
    add("--pruned", type=user_path, required=True, help="weights, or the folder of a run")
    add("--to", choices=["compressed", "huggingface", "onnx"], help="format of --out")
    add("--out", type=user_path, help="file (compressed) or folder (others)")
    types = ["float32", "float16", "bfloat16"]
    add("--dtype", choices=types, default="float32", help="type of the written weights")
    add("--report", action="store_true", help="sizes, multiply-adds, time and memory, printed")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Checks the flags before the model is built, then exports and reports."""
    if not (args.to or args.report):
        raise UserError("nothing to do: give --to with --out, or --report")
    if bool(args.to) != bool(args.out):
        raise UserError("--to and --out go together")
    config = load_config(args.config)
    if args.to == "huggingface" and config["task"] != "caption":
        why = "; transformers has no class for BLIP's NLVR2 model" * (config["task"] == "nlvr")
        raise UserError(f"--to huggingface writes captioners alone{why}; take --to compressed")
    if args.to == "onnx":
        if args.dtype != "float32":
            raise UserError(f"--to onnx writes float32: leave out --dtype {args.dtype}")
        if not (find_spec("onnx") and find_spec("onnxscript")):
            remedy = "pip install onnx onnxscript, and onnxruntime to have the files checked"
            raise UserError(f"--to onnx needs packages that are not installed: {remedy}")
    if args.out and Path(args.out).exists():
        raise UserError(f"--out: {args.out} exists; remove it or choose another")

    from engine.exports import export

    export(args, config)


if __name__ == "__main__":
    launch(main, parse_args())
