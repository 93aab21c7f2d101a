"""The layers that are profiled and pruned."""

from torch import nn

# Where the transformer blocks of our models are. Their linear layers are pruned; embeddings, norms,
# patch_embed and heads stay whole.
TOWERS = (
    "visual_encoder.blocks.",  # BLIP
    "text_decoder.bert.encoder.layer.",  # its captioner
    "text_encoder.encoder.layer.",  # its NLVR2 model
    "visual.transformer.resblocks.",  # CLIP
    "transformer.resblocks.",
)
VISION = ("visual_encoder.", "visual.")  # the image encoders of BLIP and CLIP


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of all transformer blocks, vision first, in forward order.

    CLIP's attention keeps its input projections in one parameter that is no layer and stays whole;
    its `out_proj` is a layer whose own `forward` is never called.

    Args:
        model: a captioner, NLVR2 or retrieval model, wrapped in DistributedDataParallel or not.

    Returns:
        Layer name to module: 168 for BLIP base captioning, 222 for NLVR2, 108 for CLIP large.
    """
    model = getattr(model, "module", model)
    if is_sparse(model):
        raise ValueError("a sparsified model has no prunable layers: list them before `sparsify_`")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(TOWERS)
    }


def is_sparse(model: nn.Module) -> bool:
    """Whether `sparsify_` made any of a model's layers a `sparse.SparseLinear`."""
    return any(type(module).__name__ == "SparseLinear" for module in model.modules())


def modality(layer_name: str) -> str:
    """Tells "vision" (the image encoder's layers) from "language" (the text transformer's)."""
    return "vision" if layer_name.startswith(VISION) else "language"


def sees_image(layer_name: str) -> bool:
    """Whether a layer's output has image tokens: vision, and keys and values of cross-attention."""
    keys_and_values = ".crossattention." in layer_name and layer_name.endswith((".key", ".value"))
    return modality(layer_name) == "vision" or keys_and_values
