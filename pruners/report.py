"""How sparse the layers are, by layer and modality, in numbers and as a figure."""

import re
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from models import modality

COLORS = {"vision": "tab:blue", "language": "tab:orange"}
SEES_IMAGE = re.compile(r"crossattention\.self\d?\.(key|value)$")


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


def plot_sparsity(reports: dict[str, dict], path: str | Path) -> None:
    """Draws sparsity against depth, vision and language told apart, one panel a report.

    Args:
        reports: panel title to result of `sparsity_report`.
        path: of the figure; its suffix tells the format.
    """
    figure = Figure(figsize=(1.5 + 5 * len(reports), 4.2), layout="constrained")
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for panel, (title, report) in zip(panels, reports.items(), strict=True):
        for kind, share in report["by_modality"].items():
            layers = {n: s for n, s in report["by_layer"].items() if modality(n) == kind}
            _plot_modality(panel, layers, f"{kind} ({share:.1%})", COLORS[kind])
        label = f"overall ({report['overall']:.1%})"
        panel.axhline(report["overall"], color="gray", linestyle="--", linewidth=1, label=label)
        panel.set(title=title, xlabel="transformer block", ylim=(-0.03, 1.03))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(title="line: mean of a block's layers", fontsize="small", title_fontsize=8)
    panels[0].set_ylabel("share of zeros")
    figure.savefig(path, dpi=150)


def _plot_modality(panel, layers: dict[str, float], label: str, color: str) -> None:
    """Dots for layers, diamonds for cross-attention keys and values, a line for block means."""
    blocks = defaultdict(list)
    for name, share in layers.items():
        block = int(re.search(r"\.(\d+)\.", name).group(1))
        blocks[block].append(share)
        marker, size = ("D", 22) if SEES_IMAGE.search(name) else ("o", 16)
        panel.scatter(block, share, s=size, marker=marker, color=color, alpha=0.4, linewidths=0)
    means = [sum(shares) / len(shares) for shares in blocks.values()]
    panel.plot(list(blocks), means, color=color, linewidth=2, label=label)
