"""How sparse the layers are: the share of zeros by layer and by modality, and whether as asked."""

from collections import defaultdict

import torch
from torch import nn

from models.layers import TOWERS, modality

UNTOLD = 1e-3  # a difference from the asked-for share that is not worth a sentence


def sparsity_report(layers: dict[str, nn.Module], kinds: dict[str, str] | None = None) -> dict:
    """Counts the zeros of layers, weights and biases. Fit for JSON.

    `kinds` is the modality by layer name; without it, layers of other models than ours are "other".

    Returns:
        `overall`, `by_modality`, `by_layer`: shares of zeros, in [0, 1]; `pruned` of `prunable`
        parameters; `vision_share_of_pruned`: share of all zeros that lie in vision layers; `kinds`,
        if given.
    """
    nonzero = torch.stack(
        [sum(p.count_nonzero() for p in layer.parameters()) for layer in layers.values()]
    ).tolist()
    numel = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    zeros = {name: numel[name] - count for name, count in zip(layers, nonzero, strict=True)}
    members = defaultdict(list)
    for name in layers:
        known = modality(name) if name.startswith(TOWERS) else "other"
        members[kinds[name] if kinds else known].append(name)

    def share(names) -> float:
        return sum(zeros[n] for n in names) / sum(numel[n] for n in names)

    pruned = sum(zeros.values())
    return {
        "overall": share(layers),
        "by_modality": {kind: share(names) for kind, names in members.items()},
        "vision_share_of_pruned": sum(zeros[n] for n in members.get("vision", ())) / max(pruned, 1),
        "pruned": pruned,
        "prunable": sum(numel.values()),
        "by_layer": {name: share([name]) for name in layers},
    } | ({"kinds": kinds} if kinds else {})


def off_target(report: dict, final_threshold: float, tied: int) -> str | None:
    """A sentence if the share of zeros at the end is not the one asked for; else None.

    A mask event zeroes the scores strictly below the k-th smallest: the k-th stays, and so do all
    `tied` scores equal to it.
    """
    prunable, zeros = report["prunable"], report["pruned"]
    missing = int(prunable * (1 - final_threshold)) - zeros
    if abs(missing) <= max(1, UNTOLD * prunable):
        return None
    what = f"asked for {final_threshold:.4g} remaining, but {1 - zeros / prunable:.4g} remain"
    if 0 < missing <= tied:
        return f"{what}, because {tied:,} scores tie at the threshold and none of them is pruned"
    return (
        f"{what}; ties at the threshold (scores: {tied:,}) do not explain it: parameters "
        "above the threshold were zero already, or parameters changed after the last mask event"
    )
