"""Datasets of captions, of statements about image pairs and for retrieval; embedded scenes."""

import compat  # noqa: F401  (must come before torchvision)

from data.caption_dataset import build_caption_datasets
from data.captions import normalize_caption
from data.flickr_dataset import build_flickr_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.samplers import EvalSampler, TrainBatchSampler
from data.transforms import build_transform

__all__ = [
    "EvalSampler",
    "TrainBatchSampler",
    "build_caption_datasets",
    "build_flickr_datasets",
    "build_nlvr_datasets",
    "build_transform",
    "normalize_caption",
]
