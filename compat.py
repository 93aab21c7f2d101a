"""Makes torchvision importable beside a CPU-only torch. Import this before torchvision or timm.

PyPI serves torchvision as a CUDA build; beside a CPU-only torch its compiled operators do not
load, and its import dies because two of them are unknown. Their schemas alone make the import
succeed; neither the transforms nor the vision transformers call a compiled operator.
"""

import importlib.util
from pathlib import Path

import torch

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def compiled_operators_load() -> bool:
    """Whether torchvision's compiled operators can be loaded beside this torch."""
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


def declare_missing_operators() -> bool:
    """Declares the operators that torchvision's import needs, where the compiled ones are absent.

    Returns:
        Whether they were declared; False where the compiled operators work.
    """
    if compiled_operators_load():
        return False
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", NMS_SCHEMA)
    return True


DECLARED = declare_missing_operators()
