"""A study's page: what was found, in tables and figures, made from its JSON alone.

Text that people wrote above the mark stays; what is below is written anew.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from dimension.figures import save_figure
from evaluation.tables import markdown
from studies.figures import plot_differences, plot_scores, plot_sparsity_shares
from studies.grid import DENSE, Cell, Study
from studies.statistics import (
    BASELINES,
    SCORES,
    Comparison,
    compare,
    groups,
    paired_differences,
    pooled_differences,
)
from studies.weightings import NONE
from utils import atomic_write

MARK = "<!-- below: written by study.py -->"
HEAD = "# What weighting by ID does\n\n"
FIGURES = {"scores": plot_scores, "differences": plot_differences, "sparsity": plot_sparsity_shares}


def report(path: Path) -> Path:
    """Writes the page beside the study's file, and the figures beside the page.

    Args:
        path: `NAME.json` of the study; the page is `NAME.md`, a figure `NAME_<figure>.png`.

    Returns:
        The page.
    """
    study = Study.read(path)
    page = path.with_suffix(".md")
    text = page.read_text() if page.exists() else HEAD + MARK
    parts = [text.partition(MARK)[0] + MARK, progress(study)]
    if groups(study.results):
        parts += ["## Verdicts\n", study.notes["rule"] + "\n", verdicts(study)]
        parts += ["## Figures\n", *draw(study, path)]
        parts += ["## Scores\n", *score_tables(study)]
        parts += ["## Paired differences\n", *difference_tables(study)]
    with atomic_write(page) as file:
        file.write("\n".join(parts).rstrip() + "\n")
    return page


def progress(study: Study) -> str:
    """How many cells are done, the time they took, and on what."""
    done = study.results.values()
    seconds = sum(result["seconds"] for result in done)
    machines = Counter(f"{result['processor']}, torch {result['torch']}" for result in done)
    where = "; ".join(f"{machine} ({cells} cells)" for machine, cells in machines.items())
    return (
        f"\n{len(study.results)} of {len(study.cells)} planned cells are done, in "
        f"{seconds / 3600:.1f} hours of one process{where and f', on {where}'}.\n"
    )


def draw(study: Study, path: Path) -> list[str]:
    """Draws the figures and returns the lines that show them."""
    lines = []
    for name, plot in FIGURES.items():
        file = path.with_name(f"{path.stem}_{name}.png")
        figure, caption = plot(study)
        save_figure(figure, file)
        lines.append(f"![{caption}]({file.name})\n\n{caption}\n")
    return lines


def verdicts(study: Study) -> str:
    """A table of each weighting against each baseline, over the pooled fractions and one by one."""
    rows = []
    for task, method in dict.fromkeys(group[:2] for group in groups(study.results)):
        planned = {c.remaining for c in study.cells if (c.task, c.method) == (task, method)}
        fractions = [fraction for fraction in study.pooled if fraction in planned]
        for baseline in BASELINES:
            for weighting in weightings(study):
                found = pooled_differences(
                    study.results, task, method, fractions, weighting, baseline
                )
                over = " and ".join(f"{1 - fraction:.4g}" for fraction in fractions)
                for score in SCORES[task] if found and weighting != baseline else ():
                    comparison = compare(list(found[score].values()), score)
                    what = {"task": task, "method": method, "sparsity": over}
                    pair = {"weighting": weighting, "against": baseline, "score": score}
                    rows.append(what | pair | cells_of(comparison))
    return markdown(rows) + "\n" if rows else ""


def cells_of(comparison: Comparison) -> dict[str, str]:
    """A comparison as cells of a table."""
    spread = ""
    if not math.isnan(comparison.low):
        spread = f"{comparison.low:+.4f} to {comparison.high:+.4f}"
    return {
        "pairs": str(comparison.pairs),
        "mean difference": f"{comparison.mean:+.4f}",
        "95 % interval": spread,
        "sign test": f"p {comparison.p:.3f}",
        "verdict": comparison.verdict,
    }


def title(group: tuple[str, str, float]) -> str:
    """A heading for task, method and remaining fraction."""
    task, method, remaining = group
    return f"{task}, {method}, {1 - remaining:.4g} pruned"


def weightings(study: Study) -> list[str]:
    """Those of the study, in the order of its cells."""
    return list(dict.fromkeys(cell.weighting for cell in study.cells))


def score_tables(study: Study) -> list[str]:
    """For each group a table: mean scores, and sparsity by modality, of each weighting."""
    tables = []
    dense = {cell.task: result for cell, result in study.results.items() if cell.method == DENSE}
    for group in groups(study.results):
        task = group[0]
        rows = []
        for weighting in weightings(study):
            done = results_of(study, group, weighting)
            if done:
                rows.append({"weighting": weighting} | mean_cells(done, SCORES[task]))
        start = "".join(f", {score} {dense[task][score]:.4f}" for score in SCORES[task])
        start = f" (dense start{start})" if task in dense else ""
        tables.append(f"{title(group)}{start}\n\n{markdown(rows)}\n")
    return tables


def results_of(study: Study, group: tuple[str, str, float], weighting: str) -> list[dict]:
    """The results of a group's cells with a weighting, by seed."""
    cells = [cell for cell in study.results if cell == Cell(*group, weighting, cell.seed)]
    return [study.results[cell] for cell in sorted(cells, key=lambda cell: cell.seed)]


def mean_cells(results: list[dict], scores: tuple[str, ...]) -> dict[str, str]:
    """Means over seeds (and standard deviations of scores) as cells of a table."""
    row = {"seeds": str(len(results))}
    for score in scores:
        values = [result[score] for result in results]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        row[score] = f"{np.mean(values):.4f}{spread}"
    for kind in ("vision", "language"):
        share = np.mean([result["sparsity"][kind] for result in results])
        row[f"{kind} pruned"] = f"{share:.1%}"
    return row


def difference_tables(study: Study) -> list[str]:
    """For each group a table of paired differences to each baseline, with verdicts."""
    tables = []
    for group in groups(study.results):
        rows = []
        for baseline in BASELINES:
            for weighting in weightings(study):
                if weighting in (baseline, NONE):
                    continue
                found = paired_differences(study.results, group, weighting, baseline)
                for score, by_seed in found.items():
                    pair = {"weighting": weighting, "against": baseline, "score": score}
                    rows.append(pair | cells_of(compare(list(by_seed.values()), score)))
        if rows:
            tables.append(f"{title(group)}\n\n{markdown(rows)}\n")
    return tables
