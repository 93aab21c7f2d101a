"""The layers that are profiled and pruned."""

import re

from torch import nn

from models.sparse import SparseLinear

# Linear layers of the transformer blocks; embeddings, norms, patch_embed and heads stay whole.
_IN_A_BLOCK = re.compile(
    r"^(visual_encoder\.blocks|text_decoder\.bert\.encoder\.layer|text_encoder\.encoder\.layer)\.\d"
)


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of all transformer blocks, vision first, in forward order.

    Args:
        model: a captioner or NLVR2 model, wrapped in DistributedDataParallel or not.

    Returns:
        Layer name to module: 168 for BLIP base captioning, 222 for NLVR2.

    Raises:
        ValueError: `sparsify_` has replaced some of the layers.
    """
    model = getattr(model, "module", model)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ValueError("a sparsified model has no prunable layers: list them before `sparsify_`")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _IN_A_BLOCK.match(name)
    }


def modality(layer_name: str) -> str:
    """Tells "vision" (the image encoder's layers) from "language" (the text transformer's)."""
    return "vision" if layer_name.startswith("visual_encoder.") else "language"


def sees_image(layer_name: str) -> bool:
    """Whether a layer's output has image tokens: vision, and keys and values of cross-attention."""
    keys_and_values = ".crossattention." in layer_name and layer_name.endswith((".key", ".value"))
    return modality(layer_name) == "vision" or keys_and_values
