r"""Prunes BLIP's captioner while it is fine-tuned, and scores its captions.

    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --pruned output/coco/PLATON80 --evaluate

On one CPU or GPU `python train_caption.py ...` does; `--config configs/caption_demo.yaml` takes the
embedded scenes.
"""

import argparse
import json
from pathlib import Path

from configs import FROM_ZERO, load_config
from engine.flags import add_flags, read_experiment
from utils import UserError, launch


def main(args: argparse.Namespace) -> None:
    """Trains and prunes; with --evaluate or --score_only scores weights or captions."""
    if args.score_only:
        score_again(args)
        return
    if not args.evaluate and (args.spice or args.samples):
        raise UserError("--spice and --samples go with --evaluate")
    read_experiment(args, "caption")  # its mistakes do not wait for what takes seconds to import
    from engine.run import prepare_run
    from engine.tasks import CAPTION

    run, model, train_set, splits = prepare_run(args, CAPTION)
    if not args.evaluate:
        from engine.loop import train

        train(run, model, train_set, splits)
        return
    model.eval()
    if args.samples:
        from engine.samples import draw_samples, find_dense

        dense = find_dense(run)
    reports = {split: CAPTION.evaluate(run, model, data, split) for split, data in splits.items()}
    if run.process.is_main:
        show(reports)
        for split, dataset in splits.items() if args.samples else ():
            draw_samples(run, dataset, split, dense)
        print(f"wrote {run.folder / 'results'}", flush=True)


def score_again(args: argparse.Namespace) -> None:
    """Scores a file of captions that an evaluation wrote.

    Raises:
        UserError: the file's name does not tell its split.
    """
    split = args.score_only.stem
    if split not in ("val", "test"):
        raise UserError("--score_only takes the val.json or test.json of an evaluation")
    config = load_config(args.config, task="caption")
    from engine.tasks import ground_truth
    from evaluation.scoring import score_results

    references = ground_truth(config, split)
    show({split: score_results(args.score_only, references, args.spice)})


def show(reports: dict[str, dict]) -> None:
    """Prints the scores by split, and once the tokenizer, what was left out, and remarks."""
    for split, report in reports.items():
        print(f"{split}: {json.dumps(report['scores'])}")
    print(f"tokens: {report['tokenizer']}")
    for metric, reason in report["left_out"].items():
        print(f"{metric} is left out: {reason}")
    for remark in report["remarks"]:
        print(f"note: {remark}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scores = add_flags(parser, "caption")
    scores.add_argument("--spice", action="store_true", help="also SPICE; downloads its models")
    scores.add_argument(
        "--samples", type=FROM_ZERO, default=0, help="images to draw with their captions"
    )
    scores.add_argument("--score_only", type=Path, help="score this file of captions again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
