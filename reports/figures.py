"""The figure of a pruned model: where sparsity went."""

import re
from collections import defaultdict

from matplotlib.figure import Figure

from dimension.figures import STYLES, layer_kind
from models.layers import modality

ANY = STYLES["other"]


def plot_sparsity(
    title: str, report: dict, lowest: float = 0.0, what: str = "share of zeros"
) -> Figure:
    """Draws each layer's share of zeros, from `lowest` on, by depth."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for name, share in report["by_modality"].items():
        _plot_modality(panel, report, name, f"{name} ({share:.1%})")
    label = f"overall ({report['overall']:.1%})"
    panel.axhline(report["overall"], color="gray", linestyle="--", linewidth=1, label=label)
    panel.set(xlabel="transformer block", ylabel=what, ylim=(lowest - 0.03, 1.03))
    panel.set_title(title, parse_math=False)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend(title="lines: mean of a block", fontsize="small", title_fontsize=8)
    return figure


def _plot_modality(panel, report: dict, name: str, label: str) -> None:
    """A marker for each layer, by kind as in `ID.png`, and a line through the blocks' means."""
    blocks, block, known = defaultdict(list), 0, list(report["by_modality"])
    kinds = report.get("kinds", {})  # of a foreign model
    for layer, share in report["by_layer"].items():
        ours = not kinds and modality(layer) in known
        if (number := re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)) is not None:
            block = int(number[1])  # a layer without a number stands with the one before it
        if name == (modality(layer) if ours else kinds.get(layer, known[-1])):
            blocks[block].append((layer_kind(layer) if ours else name, share))
    points = [(block, *layer) for block, layers in blocks.items() for layer in layers]
    for kind in dict.fromkeys(kind for _, kind, _ in points):
        x, y = zip(*[(block, share) for block, of, share in points if of == kind], strict=True)
        colour, marker, fill = STYLES.get(kind, ANY)
        style = {"ms": 4, "fillstyle": fill, "color": colour, "alpha": 0.7}
        panel.plot(x, y, marker, label=f"{kind} layer", **style)
    depths = sorted(blocks)
    means = [sum(share for _, share in blocks[at]) / len(blocks[at]) for at in depths]
    panel.plot(depths, means, color=STYLES.get(name, ANY)[0], linewidth=2, label=label)
