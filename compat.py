"""Makes torchvision importable beside a CPU-only torch. Import this before torchvision or timm.

PyPI's torchvision is a CUDA build; beside a CPU-only torch its compiled operators do not load, and
its import fails because two are unknown. Their schemas suffice: nothing here calls them.
"""

import importlib.util
from pathlib import Path

import torch

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing_operators() -> bool:
    """Declares the two operators where the compiled ones do not load; whether it did."""
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(str(library))
        if hasattr(torch.ops.torchvision, "nms"):
            return False
    except OSError:
        pass
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", NMS_SCHEMA)
    return True


DECLARED = declare_missing_operators()
