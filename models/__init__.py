"""BLIP's captioner and NLVR2 model, composed from timm's ViT and transformers' BLIP text model."""

import compat  # noqa: F401  (before timm)

from models.captioner import Captioner, build_captioner
from models.checkpoint import LoadReport, load_checkpoint
from models.layers import modality, prunable_layers
from models.nlvr import build_nlvr
from models.sparse import sparsify_

__all__ = [
    "Captioner",
    "LoadReport",
    "build_captioner",
    "build_nlvr",
    "load_checkpoint",
    "modality",
    "prunable_layers",
    "sparsify_",
]
