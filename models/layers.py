"""The layers that are profiled and pruned."""

from torch import nn

# Transformer blocks, whose linear layers are pruned; embeddings, norms, patch_embed, heads are not
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

    The model may be wrapped in DistributedDataParallel. BLIP base has 168 for captioning and 222
    for NLVR2, CLIP large 108: its attention's input projections are no layers, and its `out_proj`
    is a layer whose own `forward` is never called.
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
    """Either "vision" (a layer of the image encoder) or "language" (of the text transformer)."""
    return "vision" if layer_name.startswith(VISION) else "language"


def sees_image(layer_name: str) -> bool:
    """Whether a layer's output has image tokens: vision, and cross-attention's keys and values."""
    keys_and_values = ".crossattention." in layer_name and layer_name.endswith((".key", ".value"))
    return modality(layer_name) == "vision" or keys_and_values
