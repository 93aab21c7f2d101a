r"""Captions pictures.

    python caption.py holiday.jpg other.png
    python caption.py pictures --config configs/caption_coco.yaml --pruned blip80.safetensors \
        --sparse

Without --config and --pruned it takes the small embedded model, which knows scenes of coloured
shapes only.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageOps

from configs import load_config
from data.images import find_pictures, to_rgb
from utils import UserError, launch

ROOT = Path(__file__).parent
EMBEDDED = ROOT / "configs" / "caption_demo.yaml"
EMBEDDED_FILES = {
    "pretrained": str(ROOT / "pretrained" / "blip_tiny_caption.safetensors"),
    "tokenizer": str(ROOT / "pretrained" / "tokenizer"),
    "med_config": str(ROOT / "configs" / "med_config_tiny.json"),
}


def read_model_config(args: argparse.Namespace) -> dict:
    """The config of the captioner that the flags name.

    Raises:
        UserError: a flag or the config is wrong.
    """
    if args.config:
        config = load_config(args.config, {"pretrained": args.pruned}, task="caption")
        if not config["pretrained"]:
            raise UserError(f"{args.config} names no pretrained weights: give --pruned")
    elif args.pruned:
        raise UserError("--pruned goes with --config, which says what model it is")
    else:
        config = load_config(str(EMBEDDED), EMBEDDED_FILES, task="caption")
        tell("with the small embedded model, which knows scenes of coloured shapes only")
    return config


def load_model(args: argparse.Namespace, config: dict):
    """The captioner in eval mode on its device."""
    import torch

    from models.captioner import build_captioner
    from models.checkpoint import load_trained
    from sparse.linear import sparsify_

    model = build_captioner(config).eval()
    report = load_trained(model, config["pretrained"])
    if args.config:
        tell(str(report))
    if args.sparse:
        tell(str(sparsify_(model)))
    elif torch.cuda.is_available():
        model.cuda()
    return model


def tell(message: str) -> None:
    """Prints beside the captions, which alone go to standard output."""
    print(message, file=sys.stderr, flush=True)


def open_upright(path: Path) -> Image.Image:
    """A picture as RGB, turned as its EXIF orientation says, transparency on white.

    Raises:
        Exception: of many kinds, for Pillow's readers raise what they meet in a damaged file.
    """
    with Image.open(path) as file:
        return to_rgb(ImageOps.exif_transpose(file), on_white=True)


def show(args: argparse.Namespace, path: Path, what: str, text: str) -> None:
    """Prints a picture's caption or error as soon as it is known."""
    if args.json:
        print(json.dumps({"image": str(path), what: text}), flush=True)
    elif what == "caption":
        print(f"{path}: {text}", flush=True)
    else:
        tell(f"{path}: cannot be read: {text}")


def main(args: argparse.Namespace) -> None:
    """Captions picture by picture; one that cannot be read is reported, and the others go on."""
    pictures = find_pictures(args.pictures)
    config = read_model_config(args)
    # here and above, so that a mistake does not wait for what takes seconds to import
    from data.transforms import build_transform

    model = load_model(args, config)
    transform = build_transform(config["image_size"], augment=False)
    lengths = config["num_beams"], config["max_length"], config["min_length"]
    device, unread = model.visual_encoder.cls_token.device, 0
    for path in pictures:
        try:
            image = open_upright(path)
        except Exception as error:  # whatever it is, it is this file's fault
            unread += 1
            show(args, path, "error", str(error) or type(error).__name__)
            continue
        (caption,) = model.generate(transform(image)[None].to(device), *lengths)
        show(args, path, "caption", caption)
    if unread:
        raise UserError(f"{unread} of {len(pictures)} pictures could not be read")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them"
    )
    parser.add_argument("--config", help="YAML file of the model's experiment")
    parser.add_argument("--pruned", help="weights, or the folder of a run; else the config's")
    parser.add_argument("--sparse", action="store_true", help="skip the zeros (on the CPU)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
