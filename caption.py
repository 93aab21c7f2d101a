r"""Captions pictures.

    python caption.py holiday.jpg other.png
    python caption.py pictures --config configs/caption_coco.yaml --pruned blip80.safetensors \
        --sparse

The default is the small embedded model, which knows scenes of coloured shapes only.
"""

import argparse
import json
import sys
from pathlib import Path

from configs import ROOT, load_config
from data.images import BadImageError, find_pictures, open_image
from utils import UserError, launch, script_parser, user_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="+", type=user_path, metavar="PICTURE", help="files, or folders of them")
    config = "YAML file of the experiment (default: the embedded model)"
    add("--config", type=user_path, help=config)
    pruned = "weights, or a run's folder (default: the config's pretrained)"
    add("--pruned", type=user_path, help=pruned)
    add("--sparse", action="store_true", help="products with the nonzeros alone, on the CPU")
    add("--json", action="store_true", help="lines of JSON, one a picture")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Captions picture by picture; reports one that cannot be read, and goes on."""
    pictures = find_pictures(list(map(Path, args.pictures)))
    config = read_model_config(args)
    unread = [path for path in pictures if not path.exists()]
    for path in unread:
        show(args, path, "error", f"{path}: there is no such file")
    there = [path for path in pictures if path not in unread]
    if there:
        from engine.captioning import load_captioner

        caption = load_captioner(config, args.sparse, tell)
    for path in there:
        try:
            show(args, path, "caption", caption(open_image(path, on_white=True)))
        except BadImageError as error:
            unread.append(path)
            show(args, path, "error", str(error))
    if unread:
        raise UserError(f"{len(unread)} of {len(pictures)} pictures could not be read")


def read_model_config(args: argparse.Namespace) -> dict:
    """The config of the captioner that the flags name."""
    if args.config:
        config = load_config(args.config, {"pretrained": args.pruned}, task="caption")
        if not config["pretrained"]:
            raise UserError(f"{args.config} names no pretrained weights: give --pruned")
        return config
    if args.pruned:
        raise UserError("--pruned goes with --config, which describes the model")
    tell("with the small embedded model, which knows scenes of coloured shapes only")
    shipped = {"tokenizer": str(ROOT / "pretrained/tokenizer")}
    return load_config(ROOT / "configs/caption_demo.yaml", shipped, task="caption")


def show(args: argparse.Namespace, path: Path, what: str, text: str) -> None:
    """Prints a picture's caption or error as soon as it is known."""
    if args.json:
        print(json.dumps({"image": str(path), what: text}), flush=True)
    elif what == "caption":
        print(f"{path}: {text}", flush=True)
    else:
        tell(text)


def tell(message: str) -> None:
    """Prints to standard error: only captions go to standard output."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    launch(main, parse_args())
