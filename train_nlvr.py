r"""Prunes BLIP's NLVR2 model while it is fine-tuned, and measures its accuracy.

    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --final_threshold 0.2 --model_dir nlvr/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --pruned output/nlvr/PLATON80 --evaluate

Without torchrun on one CPU or GPU; --config configs/nlvr_demo.yaml takes embedded scenes.
"""

import argparse

from engine.experiment import run_trainer
from engine.flags import parse, trainer_parser
from utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    return parse(trainer_parser("nlvr", __doc__)[0], argv)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate measures the accuracy of weights."""
    run_trainer(args, "nlvr")


if __name__ == "__main__":
    launch(main, parse_args())
