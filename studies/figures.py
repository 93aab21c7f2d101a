"""Figures of a study. Each function returns one, and the sentence below it."""

import numpy as np
from matplotlib.figure import Figure

from studies.grid import DENSE, Cell, Study
from studies.statistics import BASELINES, SCORES, groups, interval, paired_differences
from studies.weightings import WEIGHTINGS

COLOURS = dict(
    zip(
        WEIGHTINGS,
        ["black", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red"],
        strict=True,
    )
)


def colour(weighting: str) -> str:
    """Of a weighting in all figures."""
    return COLOURS.get(weighting, "tab:cyan")


def panels_of(study: Study) -> list[tuple[str, str]]:
    """Task and method of each panel."""
    return list(dict.fromkeys(group[:2] for group in groups(study.results)))


def values(study: Study, group: tuple[str, str, float], weighting: str, pick) -> list[float]:
    """What `pick` takes from the results of a group's cells with a weighting."""
    return [
        pick(result)
        for cell, result in study.results.items()
        if cell == Cell(*group, weighting, cell.seed)
    ]


def used(study: Study, task: str, method: str) -> list[str]:
    """The weightings of a panel, in the order of the cells."""
    return list(
        dict.fromkeys(
            cell.weighting
            for cell in study.cells
            if (cell.task, cell.method) == (task, method) and cell in study.results
        )
    )


def plot_scores(study: Study) -> tuple[Figure, str]:
    """Each score against sparsity: means over seeds, with bands."""
    panels = panels_of(study)
    figure = Figure(figsize=(4.5 * len(panels), 6.5), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (task, method) in zip(axes.T, panels, strict=True):
        fractions = [group[2] for group in groups(study.results) if group[:2] == (task, method)]
        for panel, score in zip(column, SCORES[task], strict=True):
            for weighting in used(study, task, method):
                x, means, lows, highs = [], [], [], []
                for fraction in fractions:
                    found = values(
                        study, (task, method, fraction), weighting, lambda r, s=score: r[s]
                    )
                    if found:
                        low, high = interval(found)
                        x.append(100 * (1 - fraction))
                        means.append(np.mean(found))
                        lows.append(low)
                        highs.append(high)
                panel.plot(x, means, "o-", ms=3, color=colour(weighting), label=weighting)
                panel.fill_between(x, lows, highs, color=colour(weighting), alpha=0.12, lw=0)
            for cell, result in study.results.items():
                if cell.method == DENSE and cell.task == task:
                    panel.axhline(result[score], color="gray", ls="--", lw=1, label="dense start")
            panel.set(ylabel=f"validation {score}", xlabel="pruned, %")
            panel.grid(alpha=0.3)
        column[0].set_title(f"{task}, {method}")
        column[0].legend(fontsize="x-small")
    return figure, (
        "Scores against sparsity: means over seeds; the bands are 95 % bootstrap intervals of "
        "the means. Seeds differ more than weightings of one seed do, hence the next figure."
    )


def plot_differences(study: Study) -> tuple[Figure, str]:
    """Paired differences of the loss to each baseline: a dot a seed, mean and interval."""
    found = groups(study.results)
    rows = len(found)
    figure = Figure(figsize=(9, 0.6 + 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, len(BASELINES), sharey="row", squeeze=False)
    for row, group in zip(axes, found, strict=True):
        names = used(study, *group[:2])
        for panel, baseline in zip(row, BASELINES, strict=True):
            for place, weighting in enumerate(names):
                by_score = paired_differences(study.results, group, weighting, baseline)
                differences = list(by_score.get("loss", {}).values())
                if weighting == baseline or not differences:
                    continue
                style = {"color": colour(weighting)}
                panel.plot(differences, [place] * len(differences), "o", ms=3, alpha=0.4, **style)
                panel.plot(interval(differences), [place, place], lw=2, **style)
                panel.plot(np.mean(differences), place, "D", ms=5, **style)
            panel.axvline(0, color="black", lw=0.8)
            panel.set_yticks(range(len(names)), names, fontsize=7)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.tick_params(axis="x", labelsize=7)
            panel.grid(alpha=0.3, axis="x")
            task, method, remaining = group
            panel.set_title(
                f"{task}, {method}, {1 - remaining:.4g} pruned, against {baseline}", fontsize=8
            )
    return figure, (
        "Paired differences of the validation loss (left of zero: better than the baseline): a "
        "dot a seed, the mean, and its 95 % bootstrap interval."
    )


def plot_sparsity_shares(study: Study) -> tuple[Figure, str]:
    """The share of vision and of language layers that each weighting prunes."""
    found = groups(study.results)
    figure = Figure(figsize=(3.4 * len(found), 3.6), layout="constrained")
    for panel, group in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        names = used(study, *group[:2])
        for kind, marker in (("vision", "o"), ("language", "s")):
            for place, weighting in enumerate(names):
                shares = values(study, group, weighting, lambda r, k=kind: 100 * r["sparsity"][k])
                if shares:
                    panel.plot(place, np.mean(shares), marker, color=colour(weighting))
        panel.axhline(100 * (1 - group[2]), color="gray", ls="--", lw=1)
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        panel.set_title(f"{group[0]}, {group[1]}, {1 - group[2]:.4g} pruned", fontsize=8)
        panel.set_ylabel("pruned, %")
        panel.grid(alpha=0.3, axis="y")
    return figure, (
        "Where sparsity went: means over seeds of the share pruned in vision layers (circles) and "
        "language layers (squares); the dashed line is the share pruned overall."
    )
