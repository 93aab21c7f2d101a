"""Datasets of image captions and of statements about image pairs, and the embedded scenes."""

import compat  # noqa: F401  (must come before torchvision)

from data.caption_dataset import build_caption_datasets
from data.captions import normalize_caption
from data.nlvr_dataset import build_nlvr_datasets
from data.samplers import EvalSampler, TrainBatchSampler
from data.transforms import build_transform

__all__ = [
    "EvalSampler",
    "TrainBatchSampler",
    "build_caption_datasets",
    "build_nlvr_datasets",
    "build_transform",
    "normalize_caption",
]
