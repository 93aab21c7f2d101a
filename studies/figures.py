"""Figures of a study. Each function returns one, and the sentence below it."""

from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.grid import DENSE, Study
from studies.statistics import (
    BASELINES,
    SCORES,
    Group,
    groups,
    interval,
    paired_differences,
    results_by_weighting,
    weightings_of,
)
from studies.weightings import POWER, WEIGHTINGS

COLOURS = ["black", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red"]
POWERS = colormaps["cool"]  # of ID^A, from A = -1 to 3
COLUMNS = 4


def colour(weighting: str):
    """Of a weighting in all figures."""
    of_weighting = dict(zip(WEIGHTINGS, COLOURS, strict=True))
    if weighting in of_weighting:
        return of_weighting[weighting]
    return POWERS((1 + float(POWER.match(weighting).group(1))) / 4)


def title(group: Group) -> str:
    """Task, method and sparsity in words."""
    task, method, remaining = group
    return f"{task}, {method}, {100 * (1 - remaining):.4g} % pruned"


def plot_scores(study: Study) -> tuple[Figure, str]:
    """Each score against sparsity: means over seeds, with bands."""
    panels = list(dict.fromkeys(group[:2] for group in groups(study.results)))
    figure = Figure(figsize=(4.5 * len(panels), 6.5), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (task, method) in zip(axes.T, panels, strict=True):
        found = [group for group in groups(study.results) if group[:2] == (task, method)]
        for panel, score in zip(column, SCORES[task], strict=True):
            _plot_score(panel, study, found, score)
            panel.set(ylabel=f"validation {score}", xlabel="pruned, %")
            panel.grid(alpha=0.3)
        column[0].set_title(f"{task}, {method}")
        column[0].legend(fontsize="x-small")
    return figure, (
        "Scores against sparsity: means over the seeds that all weightings have; the bands and "
        "bars are 95 % bootstrap intervals of the means. They hold the spread of seeds, which "
        "pairs share: differences are in the next figure."
    )


def _plot_score(panel: Axes, study: Study, found: list[Group], score: str) -> None:
    """One score of a task and method: a line a weighting, and the dense start's."""
    lines = {}
    for group in found:
        for weighting, results in results_by_weighting(study.cells, study.results, group).items():
            if not (scores := [result[score] for result in results]):
                continue
            point = (100 * (1 - group[2]), np.mean(scores), *interval(scores))
            lines.setdefault(weighting, []).append(point)
    for weighting, points in lines.items():
        x, means, lows, highs = zip(*points, strict=True)
        panel.plot(x, means, "o-", ms=3, color=colour(weighting), label=weighting)
        panel.fill_between(x, lows, highs, color=colour(weighting), alpha=0.12, lw=0)
        panel.vlines(x, lows, highs, color=colour(weighting), lw=1, alpha=0.5)
    for cell, result in study.results.items():
        if cell.method == DENSE and cell.task == found[0][0]:
            panel.axhline(result[score], color="gray", ls="--", lw=1, label="dense start")


def plot_differences(study: Study) -> tuple[Figure, str]:
    """Paired differences of the loss to each baseline: a dot a seed, mean and interval."""
    found = groups(study.results)
    names = [weightings_of(study.cells, study.results, group) for group in found]
    heights = [0.8 + 0.2 * len(of_group) for of_group in names]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(found), len(BASELINES), sharey="row", squeeze=False, height_ratios=heights
    )
    for row, group, of_group in zip(axes, found, names, strict=True):
        for panel, baseline in zip(row, BASELINES, strict=True):
            for place, weighting in enumerate(of_group):
                by_score = paired_differences(study.results, group, weighting, baseline)
                differences = list(by_score.get("loss", {}).values())
                if weighting == baseline or not differences:
                    continue
                style = {"color": colour(weighting)}
                panel.plot(differences, [place] * len(differences), "o", ms=3, alpha=0.4, **style)
                panel.plot(interval(differences), [place, place], lw=2, **style)
                panel.plot(np.mean(differences), place, "D", ms=5, **style)
            panel.axvline(0, color="black", lw=0.8)
            panel.set_yticks(range(len(of_group)), of_group, fontsize=7)
            panel.set_ylim(len(of_group) - 0.5, -0.5)
            panel.tick_params(axis="x", labelsize=7)
            panel.locator_params(axis="x", nbins=6)
            panel.grid(alpha=0.3, axis="x")
            panel.set_title(f"{title(group)}, against {baseline}", fontsize=8)
    return figure, (
        "Paired differences of the validation loss (left of zero: better than the baseline): a "
        "dot a seed, the mean, and its 95 % bootstrap interval."
    )


def plot_sparsity_shares(study: Study) -> tuple[Figure, str]:
    """The share of vision and of language layers that each weighting prunes."""
    found = groups(study.results)
    rows = -(-len(found) // COLUMNS)
    columns = min(len(found), COLUMNS)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for group, panel in zip(found, panels, strict=False):
        found_here = results_by_weighting(study.cells, study.results, group)
        names = [weighting for weighting, results in found_here.items() if results]
        for place, weighting in enumerate(names):
            results = found_here[weighting]
            for kind, marker in (("vision", "o"), ("language", "s")):
                share = _mean(results, lambda result, kind=kind: result["sparsity"][kind])
                panel.plot(place, 100 * share, marker, color=colour(weighting))
        panel.axhline(100 * (1 - group[2]), color="gray", ls="--", lw=1)
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        panel.set_title(title(group), fontsize=8)
        panel.set_ylabel("pruned, %")
        panel.grid(alpha=0.3, axis="y")
    for panel in list(panels):
        panel.axis("off")
    return figure, (
        "Where sparsity went: means over seeds of the share pruned in vision layers (circles) and "
        "language layers (squares); the dashed line is the share pruned overall."
    )


def _mean(results: list[dict], pick: Callable[[dict], float]) -> float:
    return float(np.mean([pick(result) for result in results]))
