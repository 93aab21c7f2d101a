"""How sparse the layers are: the share of zeros by layer and by modality."""

from collections import defaultdict

import torch
from torch import nn

from models import modality


def sparsity_report(layers: dict[str, nn.Linear]) -> dict:
    """Counts the zeros of layers, weights and biases, in one pass.

    Args:
        layers: by name, as `models.prunable_layers` gives them.

    Returns:
        `overall`, `by_modality` and `by_layer`: shares of zeros, in [0, 1]; `pruned` of `prunable`:
        numbers; `vision_share_of_pruned`: share of all zeros that lie in vision layers, 0 without
        zeros. Fit for JSON.
    """
    nonzero = torch.stack(
        [sum(p.count_nonzero() for p in layer.parameters()) for layer in layers.values()]
    ).tolist()
    numel = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    zeros = {name: numel[name] - count for name, count in zip(layers, nonzero, strict=True)}
    members = defaultdict(list)
    for name in layers:
        members[modality(name)].append(name)

    def share(names) -> float:
        return sum(zeros[n] for n in names) / sum(numel[n] for n in names)

    pruned = sum(zeros.values())
    return {
        "overall": share(layers),
        "by_modality": {kind: share(names) for kind, names in members.items()},
        "vision_share_of_pruned": sum(zeros[n] for n in members["vision"]) / max(pruned, 1),
        "pruned": pruned,
        "prunable": sum(numel.values()),
        "by_layer": {name: share([name]) for name in layers},
    }
