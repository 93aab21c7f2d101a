"""Accuracy of statements about pairs of images."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


@torch.no_grad()
def count_correct(model: nn.Module, batches: Iterable[tuple], device: torch.device) -> int:
    """How many statements of this process's share of a split are judged correctly.

    Args:
        model: NLVR2 model in eval mode, not wrapped.
        batches: left images (B, 3, S, S), right images, B statements, labels (B,).
        device: where the model is.
    """
    correct = torch.zeros((), dtype=torch.int64, device=device)
    quiet = dist.is_initialized() and dist.get_rank() > 0
    for batch in tqdm(batches, desc="statements", disable=quiet, mininterval=5.0):
        image0, image1, sentences, targets = batch
        images = (image.to(device, non_blocking=True) for image in (image0, image1))
        logits = model.logits(*images, sentences)  # (B, 2)
        correct += (logits.argmax(dim=1) == targets.to(device)).sum()
    return int(correct)
