"""Accuracy and loss of statements about pairs of images."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from engine.loading import EvalOptions
from engine.processes import sum_over_processes


@torch.no_grad()
def evaluate_statements(
    model: nn.Module, dataset: Dataset, split: str, options: EvalOptions
) -> dict:
    """Share of a split's statements that are judged right, and mean loss, the same everywhere.

    Every process calls it, with the model in eval mode.
    """
    correct, loss = 0, 0.0
    with options.autocast():
        for image0, image1, sentences, targets in options.batches(dataset, "statements"):
            logits = model.logits(image0, image1, sentences)  # (B, 2)
            correct += int((logits.argmax(dim=1) == targets).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
    correct, loss = sum_over_processes([correct, loss])
    return {"scores": {"accuracy": correct / len(dataset), "loss": loss / len(dataset)}}
