r"""Prunes CLIP while it is fine-tuned for retrieval, and measures its recalls.

    python -m torch.distributed.run --nproc_per_node=2 train_clip_flickr30k.py \
        --final_threshold 0.2 --model_dir flickr_clip/PLATONID80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_clip_flickr30k.py \
        --pruned output/flickr_clip/PLATONID80 --evaluate

Without torchrun on one CPU or GPU; --config configs/retrieval_demo.yaml takes embedded scenes.
"""

import argparse

from engine.experiment import run_trainer
from engine.flags import parse, trainer_parser
from utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    return parse(trainer_parser("retrieval", __doc__)[0], argv)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate measures the recalls of weights."""
    run_trainer(args, "retrieval")


if __name__ == "__main__":
    launch(main, parse_args())
