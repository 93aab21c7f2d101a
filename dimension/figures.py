"""Figures of ID profiles. The functions return them; `save_figure` writes a file."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dimension.profile import IDProfile, load_kinds, load_profile
from dimension.twonn import ESTIMATORS
from models.layers import modality, sees_image
from utils import atomic_write

KINDS = {  # of layers: colour, marker, and the marker's filling
    "vision": ("tab:blue", "o", "full"),
    "language": ("tab:orange", "o", "none"),
    "cross-attention key, value": ("tab:red", "^", "full"),
}
STYLES = KINDS | {"other": ("tab:green", "s", "none")}  # in models that are not ours


def layer_kind(name: str) -> str:
    """Which of `KINDS` a layer is: keys and values of cross-attention see the image."""
    if modality(name) == "language" and sees_image(name):
        return "cross-attention key, value"
    return modality(name)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def draw_profile(profile: IDProfile, folder: Path, compare: list[str]) -> list[str]:
    """Draws a profile into a folder, and other profiles beside it; returns the files' names."""
    figures = {"ID.png": plot_depth(profile), "scale.png": plot_scale(profile)}
    found = {name: layer.estimates for name, layer in profile.layers.items()}
    if all(ids.keys() == ESTIMATORS.keys() for ids in found.values()):
        several = {key: {name: ids[key] for name, ids in found.items()} for key in ESTIMATORS}
        kinds = dict.fromkeys(ESTIMATORS, profile.kinds())
        figures["estimators.png"] = plot_comparison(several, kinds)
    if compare:
        own = {str(folder): {name: layer.id for name, layer in profile.layers.items()}}
        kinds = {path: load_kinds(path) for path in compare} | {str(folder): profile.kinds()}
        others = {path: load_profile(path) for path in compare}
        figures["compare.png"] = plot_comparison(own | others, kinds)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def plot_depth(profile: IDProfile) -> Figure:
    """ID of each layer with its error bar, against its position in the model."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for kind, (colour, marker, fill) in STYLES.items():
        layers = [
            (position, layer.id, math.nan if layer.error is None else layer.error)
            for position, (name, layer) in enumerate(profile.layers.items())
            if (layer.kind or layer_kind(name)) == kind
        ]
        if layers:
            x, y, error = zip(*layers, strict=True)
            style = {"fmt": marker, "fillstyle": fill, "ms": 4, "color": colour}
            axes.errorbar(x, y, error, elinewidth=0.6, label=kind, **style)
    return _finished(figure, xlabel="layer", ylabel="intrinsic dimension")


def plot_comparison(
    profiles: dict[str, dict[str, float]], kinds: dict[str, dict[str, str]] | None = None
) -> Figure:
    """IDs of several models against relative depth, overlaid as in the paper's figure.

    `profiles` has layer names to IDs, in forward order, by label; `kinds` has layer names to kinds
    by label, where the names do not show them.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    present = set(KINDS)
    for number, (label, layers) in enumerate(profiles.items()):
        colour, ids = f"C{number}", list(layers.values())
        depth = [position / max(1, len(ids) - 1) for position in range(len(ids))]
        shown = label.encode("utf-8", "replace").decode()  # a path may hold any bytes
        shown = shown.replace("$", r"\$")  # matplotlib sets $...$ as a formula,
        shown = f"./{shown}" if label.startswith("_") else shown  # and leaves out _...
        axes.plot(depth, ids, lw=0.5, color=colour, label=shown)
        known = (kinds or {}).get(label, {})
        own = [known.get(name) or layer_kind(name) for name in layers]
        present |= set(own)
        for kind, (_, marker, fill) in STYLES.items():
            chosen = [i for i, other in enumerate(own) if other == kind]
            x, y = [depth[i] for i in chosen], [ids[i] for i in chosen]
            axes.plot(x, y, marker, ms=4, color=colour, fillstyle=fill)
    for kind in [kind for kind in STYLES if kind in present]:
        _, marker, fill = STYLES[kind]
        axes.plot([], [], marker, ms=4, color="grey", fillstyle=fill, label=kind)
    return _finished(figure, xlabel="relative depth", ylabel="intrinsic dimension")


def plot_scale(profile: IDProfile) -> Figure:
    """ID against the number of points in a block, one line a layer.

    Where a line is level, the ID does not depend on the scale at which the data is seen.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    labelled = set()
    for name, layer in profile.layers.items():
        sizes = [profile.settings["nsamples"] // b for b in range(1, len(layer.block_means) + 1)]
        means = [math.nan if mean is None else mean for mean in layer.block_means]
        kind = layer.kind or layer_kind(name)
        label = None if kind in labelled else kind
        labelled.add(kind)
        axes.plot(sizes, means, color=STYLES[kind][0], lw=0.6, alpha=0.6, label=label)
    labels = {"xlabel": "points in a block", "ylabel": "mean intrinsic dimension"}
    _finished(figure, **labels, xscale="log")
    ticks = [profile.settings["nsamples"] // blocks for blocks in (1, 2, 5, 10, 20)]
    axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def _finished(figure: Figure, **settings: str) -> Figure:
    """The figure with settings of its axes, which begin at zero, and a legend above."""
    (axes,) = figure.axes
    axes.set(**settings)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure
