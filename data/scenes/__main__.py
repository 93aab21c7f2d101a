"""Generates the embedded data: scenes with captions and NLVR2 statements.

    python -m data.scenes --out datasets/scenes

writes, in half a minute and always the same for the same settings:

    images/{train,val,test}/scene_0000000.png     64 x 64 pixels, named by COCO id
    annotation/coco_karpathy_{train,val,test}.json and coco_karpathy_{val,test}_gt.json
    annotation/flickr30k_{train,val,test}.json    the captions in Flickr30k's layout
    annotation/nlvr_{train,dev,test}.json         statements about pairs of the images
    annotation/scenes_{train,val,test}.json       what the pictures show, for attribute_accuracy
    tokenizer/vocab.txt                           WordPiece vocabulary
    settings.json                                 a run that finds its own settings does nothing
"""

import argparse

from data.scenes.generate import make
from utils import launch, script_parser, user_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=user_path, default="datasets/scenes", help="folder to write")
    parser.add_argument("--train", type=int, default=20000, help="scenes with a caption")
    parser.add_argument("--val", type=int, default=500, help="scenes with 5 references")
    parser.add_argument("--test", type=int, default=500, help="scenes with 5 references")
    parser.add_argument("--statements", type=int, default=40000, help="about training pairs")
    parser.add_argument("--heldout_statements", type=int, default=1000, help="in dev, and in test")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Generates the data and prints where it is."""
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    done = make(args.out, settings)
    print(f"{args.out}: {'written' if done else 'up to date'}")


if __name__ == "__main__":
    launch(main, parse_args())
