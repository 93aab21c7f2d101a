r"""Prunes a model at once, without training: any model of Hugging Face's, or one of this project's.

    python prune.py --hf openai/clip-vit-base-patch32 --images pictures --texts captions.txt \
        --sparsity 0.5 --out clip50
    python prune.py --hf FOLDER --texts captions.txt --sparsity 0.5 --allocation ID/mpnet --out x
    python prune.py --config configs/caption_coco.yaml --pretrained W --sparsity 0.5 \
        --allocation modality --id_profile ID/Blip_coco --out caption50

Scores are compared within a layer. A profile of numbers by layer name, such as IDs of ComputeID.py,
says how much of each layer remains: more where the number is higher. --out opens as the model did,
and holds pruning.json: zeros and the error of the output by layer.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from configs import COUNT, FROM_ZERO, Number, load_config
from utils import UserError, launch, script_parser, user_path


def neighbours(text: str) -> tuple[int, int]:
    """N and M of "N:M"."""
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return int(found[1]), int(found[2])
    raise argparse.ArgumentTypeError(f"must be N:M, such as 2:4, got {text!r}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser, path = script_parser(__doc__), user_path
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=path, metavar="NAME_OR_FOLDER", help="model of Hugging Face's")
    model.add_argument("--config", type=path, help="YAML file of a model of this project")
    add("--pretrained", type=path, help="with --config: weights instead of the config's")
    add("--images", type=path, metavar="FOLDER", help="with --hf: pictures to calibrate with")
    add("--texts", type=path, metavar="FILE", help="with --hf: a line of text for each sample")
    add("--out", type=path, required=True, help="folder of the pruned model")
    add("--sparsity", type=Number(float, 0, 1), help="share of the weights that becomes zero")
    add("--nm", type=neighbours, metavar="N:M", help="in place of it: N of M neighbours remain")
    score = {"choices": ["Magnitude", "Wanda"], "default": "Wanda"}
    add("--method", **score, help="|w|, or |w| times the norm of its input")
    what = "uniform, modality, inverse, or a profile or its folder"
    add("--allocation", type=path, default="uniform", help=f"what remains of each layer: {what}")
    add("--id_profile", type=path, help="profile for modality (its means by modality) and inverse")
    add("--sequential", action="store_true", help="inputs from pruned layers; a pass for each")
    skip = {"action": "extend", "nargs": "+", "default": [], "metavar": "PATTERN"}
    add("--skip", **skip, help='layers to leave out, such as "*.0.*"')
    add("-n", "--n", type=COUNT, default=128, help="calibration samples")
    add("--batch_size", type=COUNT, default=8, help="samples in a forward pass")
    add("--seed", type=FROM_ZERO, default=0, help="seed of the choice of samples")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    args.argv = ["prune.py", *(sys.argv[1:] if argv is None else argv)]
    return args


def main(args: argparse.Namespace) -> None:
    """Checks the flags, then prunes."""
    kind, others = ("--hf", ["pretrained"]) if args.hf else ("--config", ["images", "texts"])
    for flag in others:
        if getattr(args, flag):
            raise UserError(f"--{flag} does not go with {kind}")
    if (args.sparsity is None) == (args.nm is None):
        raise UserError("give --sparsity, or --nm in its place")
    derived = args.allocation in ("modality", "inverse")
    changes = {"pretrained": args.pretrained, "augment": False}
    config = None if args.hf else load_config(args.config, changes)
    if derived and not (args.id_profile or config and config["id_profile"]):
        raise UserError(f"--allocation {args.allocation} is made of a profile: give --id_profile")
    if args.id_profile and not derived:
        raise UserError(
            "--id_profile goes with --allocation modality or inverse; a profile as it is goes to "
            "--allocation itself"
        )
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; remove it or choose another")
    above = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out: cannot write to {above}; choose another")

    from engine.pruning import prune

    prune(args, config)


if __name__ == "__main__":
    launch(main, parse_args())
