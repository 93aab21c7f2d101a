"""Prunes BLIP's captioner while it is fine-tuned, and scores its captions.

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

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from data import build_caption_datasets
from engine import loop as training
from engine import run as launching
from evaluation import caption_split, contact_sheet, generate_captions, score_results
from models import build_captioner, load_checkpoint
from utils import UserError, load_config


def evaluate(run: launching.Run, model: nn.Module, dataset: Dataset, split: str) -> dict:
    """Captions a split over all processes, writes the captions, then scores them.

    Args:
        run: of `launching.prepare`.
        model: captioner in eval mode, not wrapped.
        dataset: the split.
        split: "val" or "test".

    Returns:
        `scores` and `left_out` of `evaluation.score_results`; on other processes nothing in them.
    """
    loader = launching.eval_loader(run, dataset, run.batch_size)
    results = results_path(run, split)
    with run.autocast():
        caption_split(model, loader, run.config, run.process.device, results)
    if not run.process.is_main:
        return {"scores": {}, "left_out": {}}
    slow = run.args.evaluate  # METEOR takes seconds to start; a validation goes without
    return score_results(results, ground_truth(run.config, split), run.args.spice, meteor=slow)


def results_path(run: launching.Run, split: str) -> Path:
    """The file of a split's captions."""
    return run.folder / "results" / f"{split}.json"


def ground_truth(config: dict, split: str) -> Path:
    """The file of a split's references."""
    return Path(config["coco_gt_root"], f"coco_karpathy_{split}_gt.json")


def show(reports: dict[str, dict]) -> None:
    """Prints the scores by split, and once the tokenizer and what was left out."""
    for split, report in reports.items():
        print(f"{split}: {json.dumps(report['scores'])}")
    print(f"tokens: {report['tokenizer']}")
    for metric, reason in report["left_out"].items():
        print(f"{metric} is left out: {reason}")


def draw_samples(run: launching.Run, model: nn.Module, dataset: Dataset, split: str) -> None:
    """Draws a few images of a split with their captions, and with the dense model's beside them.

    Args:
        run: of `launching.prepare`, on the main process.
        model: takes the dense weights.
        dataset: the split, evaluated before.
        split: "val" or "test".
    """
    samples = min(run.args.samples, len(dataset))
    captions = {"pruned": json.loads(results_path(run, split).read_text())}
    if run.args.pruned and run.config["pretrained"]:
        load_checkpoint(model, run.config["pretrained"])
        drawn = Subset(dataset, [place * len(dataset) // samples for place in range(samples)])
        with run.autocast():
            dense = generate_captions(
                model, DataLoader(drawn, run.batch_size), run.config, run.process.device
            )
        captions = {"dense": dense, **captions}
    sheet = run.folder / "results" / f"{split}_samples.png"
    contact_sheet(dataset, captions, sheet, samples)
    print(f"samples: {sheet}", flush=True)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes; with --evaluate or --score_only scores weights or captions."""
    if args.score_only:
        split = args.score_only.stem
        if split not in ("val", "test"):
            raise UserError("--score_only takes the val.json or test.json of an evaluation")
        references = ground_truth(load_config(args.config, task="caption"), split)
        show({split: score_results(args.score_only, references, args.spice)})
        return
    run, model, (train_set, val_set, test_set) = launching.prepare(
        args, "caption", build_caption_datasets, build_captioner
    )
    if args.evaluate:
        model.eval()
        splits = {"val": val_set, "test": test_set}
        reports = {split: evaluate(run, model, data, split) for split, data in splits.items()}
        if run.process.is_main:
            show(reports)
            for split, dataset in splits.items() if args.samples else ():
                draw_samples(run, model, dataset, split)
        return
    training.train(
        run,
        model,
        train_set,
        validate=lambda: {
            f"val_{metric}": value
            for metric, value in evaluate(run, model, val_set, "val")["scores"].items()
        },
        best_by="val_CIDEr",
        model_inputs=lambda batch: batch[:2],  # image, caption; not the image's id
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    launching.add_flags(parser, config="configs/caption_coco.yaml", warmups=(1, 1))
    scores = parser.add_argument_group("scores")
    scores.add_argument("--spice", action="store_true", help="also SPICE; downloads its models")
    scores.add_argument("--samples", type=int, default=0, help="images to draw with their captions")
    scores.add_argument("--score_only", type=Path, help="score this file of captions again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launching.launch(main, parse_args())
