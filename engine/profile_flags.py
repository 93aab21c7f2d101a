"""The flags of ComputeID.py."""

import argparse
from pathlib import Path

from configs import COUNT, FROM_ZERO, Number, load_config

DEFAULT_CONFIG = "configs/caption_coco.yaml"
FEWEST_SAMPLES = 3  # `dimension.twonn.FEWEST_POINTS`, without importing torch
# flags that do not go with --hf
OURS_ONLY = "skip save_distances keep_padding skip_bad_images pretrained pruned".split()


def parse_profile_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
        description: of the script.
        argv: the command line; None takes the process's.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-n",
        "--nsamples",
        type=Number(int, FEWEST_SAMPLES),
        default=2000,
        help="samples of the training set (2000)",
    )
    add("--Path", help="folder for the results; default: ID/Blip_coco, or ID/ and the model's name")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="run on the CPU")
    device.add_argument(
        "--gpu", type=FROM_ZERO, metavar="N", help="run on GPU N; default: a GPU if there is one"
    )
    add("-s", "--skip", action="store_true", help="no model: estimate again from kept distances")
    add("--save_distances", action="store_true", help="keep distances for -s, 4 n^2 bytes a layer")
    add(
        "--fraction",
        type=Number(float, 0, 1),
        default=1.0,
        help="share of the points that is fitted, in (0, 1]",
    )
    add("--keep_padding", action="store_true", help="as the original: a batch's padding counts")
    add(
        "--skip_bad_images",
        action="store_true",
        help="take other samples for those whose images cannot be read, and count them",
    )
    add(
        "--memory_gb",
        type=Number(float, 0),
        help="for activations, states and matrices of each process",
    )
    add("--compare", nargs="+", default=[], metavar="PROFILE", help="draw these profiles, too")
    add(
        "--batch_size",
        type=COUNT,
        help="samples in a forward pass; default: the config's eval_batch_size, 8 with --hf",
    )
    add("--seed", type=FROM_ZERO, default=0, help="of the choice of samples and blocks")
    add(
        "--config",
        default=DEFAULT_CONFIG,
        help=f"YAML file of the model; default: {DEFAULT_CONFIG}",
    )
    add("--pretrained", help="weights instead of the config's")
    add("--pruned", help="measure pruned weights (a file, or the folder of a pruning run)")
    add("--hf", metavar="NAME_OR_FOLDER", help="measure this model of Hugging Face's")
    add("--images", metavar="FOLDER", help="with --hf: pictures, taken in the order of their names")
    add("--texts", metavar="FILE", help="with --hf: a text on each line, one for each picture")
    args = parser.parse_args(argv)
    for flag in ("images", "texts") if args.hf is None else OURS_ONLY:
        if getattr(args, flag):
            how = "goes with --hf" if args.hf is None else "does not go with --hf"
            parser.error(f"argument --{flag} {how}")
    if args.Path is None:
        args.Path = default_folder(args)
    if args.fraction == 0:
        parser.error("argument --fraction: no points are left to fit; 1 takes all")
    return args


def default_folder(args: argparse.Namespace) -> str:
    """The paper's for its captioner, else of the model, so that no profile replaces another's."""
    if args.hf is not None:
        return f"ID/{Path(args.hf).resolve().name}"
    return "ID/Blip_coco" if args.config == DEFAULT_CONFIG else f"ID/{Path(args.config).stem}"


def check_profile_flags(args: argparse.Namespace) -> None:
    """Reads the config, where one is needed, for what is wrong in it.

    Raises:
        UserError: something is.
    """
    if not args.skip and args.hf is None:
        load_config(args.config)
