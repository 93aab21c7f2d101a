r"""Prunes BLIP's captioner while it is fine-tuned, and scores its captions.

    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --pruned output/coco/PLATON80 --evaluate

On one CPU or GPU `python train_caption.py ...` does; `--config configs/caption_demo.yaml` takes the
embedded scenes.
"""

import argparse

from configs import load_config
from engine.experiment import read_experiment
from engine.flags import parse, trainer_parser
from utils import launch, user_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser, evaluation = trainer_parser("caption", __doc__)
    evaluation.add_argument("--spice", action="store_true", help="SPICE, too; downloads its models")
    evaluation.add_argument("--score_only", type=user_path, help="file of captions to score again")
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes; with --evaluate or --score_only scores weights or captions."""
    if args.score_only:
        config = load_config(args.config, task="caption")
        from evaluation.scoring import score_again

        score_again(args.score_only, config, args.spice)
        return
    experiment = read_experiment(args, "caption")
    from engine.main import run_task  # which takes seconds to import: mistakes do not wait for it

    run_task(experiment)


if __name__ == "__main__":
    launch(main, parse_args())
