"""Captions of a split, over any number of processes, and the file that keeps them."""

from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import write_json


def caption_split(
    model: nn.Module,
    loader: DataLoader,
    config: dict,
    device: torch.device,
    results_path: str | Path,
) -> list[dict] | None:
    """Captions a split over all processes and writes the results file. Every process calls it.

    Args:
        model: see `generate_captions`.
        loader: see `generate_captions`; each image is in the share of one process.
        config: see `generate_captions`.
        device: see `generate_captions`.
        results_path: JSON file to write, in the format of COCO's results: a list of
            `{"image_id": int, "caption": str}` in the order of image ids.

    Returns:
        On the main process the list that was written, elsewhere None.
    """
    results = generate_captions(model, loader, config, device)
    if dist.is_initialized():
        shares = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(results, shares)
        if shares is None:
            return None
        results = chain.from_iterable(shares)
    results = sorted(results, key=lambda result: result["image_id"])
    write_json(results_path, results)
    return results


def generate_captions(
    model: nn.Module, loader: DataLoader, config: dict, device: torch.device
) -> list[dict]:
    """Captions this process's share of a split by beam search.

    Args:
        model: captioner in eval mode, not wrapped.
        loader: batches of images (B, 3, S, S) and image ids (B,).
        config: its `num_beams`, `max_length` and `min_length` are used.
        device: where the model is.

    Returns:
        One `{"image_id": int, "caption": str}` an image, in the loader's order.
    """
    lengths = {key: config[key] for key in ("num_beams", "max_length", "min_length")}
    results = []
    quiet = dist.is_initialized() and dist.get_rank() > 0
    for images, ids in tqdm(loader, desc="captions", disable=quiet, mininterval=5.0):
        captions = model.generate(images.to(device, non_blocking=True), **lengths)
        pairs = zip(ids.tolist(), captions, strict=True)
        results += [{"image_id": image, "caption": caption} for image, caption in pairs]
    return results
