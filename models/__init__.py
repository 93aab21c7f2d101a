"""BLIP's captioner and NLVR2 model from timm and transformers, and CLIP from open_clip."""

import compat  # noqa: F401  (before timm and open_clip)

from models.captioner import Captioner, build_captioner
from models.checkpoint import LoadReport, load_checkpoint
from models.clip import ClipRetrieval, build_clip
from models.layers import modality, prunable_layers
from models.nlvr import build_nlvr
from models.sparse import sparsify_

__all__ = [
    "Captioner",
    "ClipRetrieval",
    "LoadReport",
    "build_captioner",
    "build_clip",
    "build_nlvr",
    "load_checkpoint",
    "modality",
    "prunable_layers",
    "sparsify_",
]
