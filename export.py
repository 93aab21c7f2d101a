r"""Makes a pruned model small, or opens it to Hugging Face's transformers; says what it costs.

    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to compressed --out blip80.safetensors
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 \
        --to huggingface --out blip80 --dtype float16 --split val
    python export.py --config configs/caption_coco.yaml --pruned output/coco/PLATON80 --report

A compressed file is read wherever weights are: --pruned, --pretrained, a config's `pretrained`.
"""

import argparse
from pathlib import Path

from configs import load_config
from utils import UserError, launch


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
    if args.to == "huggingface" and config["task"] != "caption":
        why = "; transformers has no class for BLIP's NLVR2 model" * (config["task"] == "nlvr")
        raise UserError(
            f"--to huggingface writes captioners alone{why}; take --to compressed, which this "
            "project reads"
        )
    if args.split and args.dtype == "float32":
        raise UserError("--split shows what rounding does: give --dtype float16 or bfloat16, too")
    if args.out and args.out.exists():
        raise UserError(f"--out: {args.out} exists; remove it or choose another")


def main(args: argparse.Namespace) -> None:
    """Exports, then reports."""
    config = load_config(args.config)
    check_flags(args, config)
    # here, so that a mistake above does not wait for what takes seconds to import
    import torch

    from engine.exports import held_out_set, show_rounding, write_compressed, write_huggingface
    from engine.tasks import TASKS
    from models.checkpoint import load_trained
    from reports import costs

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
        show(costs.report(model, config))


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
    parser.add_argument("--to", choices=["compressed", "huggingface"], help="what to write")
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
