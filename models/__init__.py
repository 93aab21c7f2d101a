"""BLIP's captioner and NLVR2 model from timm and transformers, and CLIP from open_clip."""

from utils import lazy_names

__getattr__ = lazy_names(
    {
        "Captioner": "models.captioner",
        "ClipRetrieval": "models.clip",
        "LoadReport": "models.checkpoint",
        "build_captioner": "models.captioner",
        "build_clip": "models.clip",
        "build_nlvr": "models.nlvr",
        "load_checkpoint": "models.checkpoint",
        "modality": "models.layers",
        "prunable_layers": "models.layers",
        "sparsify_": "sparse.linear",
    }
)
