"""Prunes BLIP's captioner while it is fine-tuned, and scores its captions.

    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_caption.py \
        --pruned output/coco/PLATON80 --evaluate

On one CPU or GPU `python train_caption.py ...` does; `--config configs/caption_demo.yaml` takes the
embedded scenes.
"""

import argparse

import training
from data import build_caption_datasets
from evaluation import caption_split, score_results
from models import build_captioner


def evaluate(run: training.Run, model, dataset, split: str) -> dict[str, float]:
    """Captions a split over all processes, writes the captions, then scores them.

    Args:
        run: of `training.start`.
        model: captioner, not wrapped.
        dataset: the split.
        split: "val" or "test".

    Returns:
        Metric name to score on the main process; empty on the others.
    """
    loader = training.eval_loader(run, dataset, run.batch_size)
    results = run.folder / "results" / f"{split}.json"
    with run.autocast():
        caption_split(model, loader, run.config, run.process.device, results)
    if not run.process.is_main:
        return {}
    gt_path = f"{run.config['coco_gt_root']}/coco_karpathy_{split}_gt.json"
    return score_results(results, gt_path, run.args.spice)["scores"]


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate scores weights."""
    run, model, (train_set, val_set, test_set) = training.prepare(
        args, "caption", build_caption_datasets, build_captioner
    )
    if args.evaluate:
        model.eval()
        for split, dataset in (("val", val_set), ("test", test_set)):
            run.say(f"{split}: {evaluate(run, model, dataset, split)}")
        return
    training.train(
        run,
        model,
        train_set,
        validate=lambda: {
            f"val_{name}": score for name, score in evaluate(run, model, val_set, "val").items()
        },
        best_by="val_CIDEr",
        model_inputs=lambda batch: batch[:2],  # image, caption; the image's name is not needed
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training.add_flags(parser, config="configs/caption_coco.yaml", warmups=(1, 1))
    parser.add_argument("--spice", action="store_true", help="also SPICE, which needs Java")
    return parser.parse_args(argv)


if __name__ == "__main__":
    training.launch(main, parse_args())
