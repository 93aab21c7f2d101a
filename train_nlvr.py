"""Prunes BLIP's NLVR2 model while it is fine-tuned, and measures its accuracy.

    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --final_threshold 0.2 --model_dir nlvr/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --pruned output/nlvr/PLATON80 --evaluate

On one CPU or GPU `python train_nlvr.py ...` does; `--config configs/nlvr_demo.yaml` takes the
embedded scenes.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import Dataset

from data import build_nlvr_datasets
from engine import loop as training
from engine import run as launching
from models import build_nlvr
from utils import write_json


@torch.no_grad()
def evaluate(run: launching.Run, model: nn.Module, dataset: Dataset) -> float:
    """The share of a split's statements that are judged correctly, counted over all processes.

    Args:
        run: of `launching.prepare`.
        model: NLVR2 model in eval mode, not wrapped.
        dataset: the split; each statement is judged by one process, however uneven the shares.

    Returns:
        A fraction in [0, 1], the same on every process.
    """
    loader = launching.eval_loader(run, dataset, run.config["batch_size_test"])
    correct = torch.zeros((), dtype=torch.int64, device=run.process.device)
    for batch in loader:
        image0, image1, sentences, targets = launching.move(batch, run.process.device)
        with run.autocast():
            logits = model.logits(image0, image1, sentences)  # (B, 2)
        correct += (logits.argmax(dim=1) == targets).sum()
    (all_correct,) = launching.sum_over_processes(run, [correct.item()])
    return all_correct / len(dataset)


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate measures the accuracy of weights."""
    run, model, (train_set, dev_set, test_set) = launching.prepare(
        args, "nlvr", build_nlvr_datasets, build_nlvr
    )
    if args.evaluate:
        model.eval()
        accuracy = {"dev": evaluate(run, model, dev_set), "test": evaluate(run, model, test_set)}
        run.say(f"accuracy: dev {accuracy['dev']:.4f}, test {accuracy['test']:.4f}")
        if run.process.is_main:
            write_json(run.folder / "results" / "accuracy.json", accuracy)
        return
    training.train(
        run,
        model,
        train_set,
        validate=lambda: {"dev_accuracy": evaluate(run, model, dev_set)},
        best_by="dev_accuracy",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    launching.add_flags(parser, config="configs/nlvr.yaml", warmups=(0, 5))
    return parser.parse_args(argv)


if __name__ == "__main__":
    launching.launch(main, parse_args())
