r"""Prunes BLIP's captioner while it is fine-tuned, and scores its captions.

    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --pruned output/coco/PLATON80 --evaluate

Without torchrun on one CPU or GPU; --config configs/caption_demo.yaml takes embedded scenes.
"""

import argparse
from pathlib import Path

from configs import load_config
from engine.experiment import run_trainer
from engine.flags import parse, trainer_parser
from engine.tasks import later
from utils import launch, user_path

score_again = later("evaluation.scoring:score_again")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser, evaluation = trainer_parser("caption", __doc__)
    add = evaluation.add_argument
    add("--spice", action="store_true", help="SPICE, too, which downloads its models")
    add("--score_only", type=user_path, help="file of captions to score again, without a model")
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes; with --evaluate or --score_only scores weights or captions."""
    if args.score_only:
        config = load_config(args.config, task="caption")
        score_again(Path(args.score_only), config, args.spice)
    else:
        run_trainer(args, "caption")


if __name__ == "__main__":
    launch(main, parse_args())
