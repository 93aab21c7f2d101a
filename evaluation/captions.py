"""Captions of a split, over any number of processes, and the file that keeps them."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader


def generate_captions(
    model: nn.Module, loader: DataLoader, config: dict, device: torch.device
) -> list[dict]:
    """Captions this process's share of a split by beam search.

    Args:
        model: captioner, not wrapped (its `generate` is called).
        loader: batches of (images (B, 3, S, S), image ids (B,)).
        config: `num_beams`, `max_length`, `min_length`, `length_normalization` are read.
        device: where the model is.

    Returns:
        One `{"image_id": int, "caption": str}` an image, in the loader's order.
    """
    raise NotImplementedError


def caption_split(
    model: nn.Module,
    loader: DataLoader,
    config: dict,
    device: torch.device,
    results_path: str | Path,
) -> list[dict] | None:
    """Captions a split over all processes and writes the results file. Every process calls it.

    Args:
        model, loader, config, device: as in `generate_captions`.
        results_path: JSON file to write, the format of COCO's results: a list of
            `{"image_id": int, "caption": str}`, sorted by image, every image once.

    Returns:
        On the main process the list that was written, elsewhere None.
    """
    raise NotImplementedError
