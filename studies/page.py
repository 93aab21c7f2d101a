"""A study's page: what was found, in tables and figures, made from its JSON alone.

Text that people wrote above the mark stays; what is below is written anew.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from dimension.figures import save_figure
from reports.tables import markdown
from studies.figures import plot_differences, plot_scores, plot_sparsity_shares, title
from studies.grid import DENSE, Cell, Study
from studies.statistics import (
    LOWER_IS_BETTER,
    SCORES,
    UNSEEN,
    compare,
    comparisons,
    groups,
    machine,
    paired_differences,
    planned_pairs,
    pooled_differences,
    results_by_weighting,
    weightings_of,
)
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
        rules = [f"{note}\n" for note in study.notes.values()]
        parts += ["## Verdicts\n", *rules, verdict_table(study)]
        parts += ["## Figures\n", *draw(study, path)]
        parts += ["## Scores\n", *score_tables(study)]
        parts += ["## Paired differences\n", *difference_tables(study)]
    with atomic_write(page) as file:
        file.write("\n".join(parts).rstrip() + "\n")
    return page


def progress(study: Study) -> str:
    """How many cells are done, the time they took, on what, and which diverged."""
    done = study.results.values()
    seconds = sum(result["seconds"] for result in done)
    where = "; ".join(f"{name} ({n} cells)" for name, n in Counter(map(machine, done)).items())
    lines = [
        f"\n{len(study.results)} of {len(study.cells)} planned cells are done, in "
        f"{seconds / 3600:.1f} hours of one process{where and f', on {where}'}.\n"
    ]
    if study.failures:
        lines.append("These have no result, which makes the others look better than they are:\n")
        lines += [f"- {cell.name}: {why}" for cell, why in study.failures.items()]
        lines.append("")
    return "\n".join(lines)


def draw(study: Study, path: Path) -> list[str]:
    """Draws the figures and returns the lines that show them."""
    lines = []
    for name, plot in FIGURES.items():
        file = path.with_name(f"{path.stem}_{name}.png")
        figure, caption = plot(study)
        save_figure(figure, file)
        lines.append(f"![{caption}]({file.name})\n\n{caption}\n")
    return lines


def verdict_table(study: Study) -> str:
    """Comparisons of each task and method by seeds' means over the pooled fractions."""
    rows = []
    for task, method in dict.fromkeys(group[:2] for group in groups(study.results)):
        cells = [cell for cell in study.cells if (cell.task, cell.method) == (task, method)]
        fractions = [f for f in study.pooled if f in {cell.remaining for cell in cells}]
        sparsity = " and ".join(f"{100 * (1 - f):.4g} %" for f in fractions)
        where = {"task": task, "method": method, "sparsity": sparsity}
        for pair in comparisons(list(dict.fromkeys(cell.weighting for cell in cells))):
            found = pooled_differences(study.results, task, method, fractions, *pair)
            planned = planned_pairs(study.cells, task, method, fractions, pair)
            rows += [where | row for row in comparison_rows(study, pair, found, planned)]
    return markdown(rows) + "\n" if rows else "No seed has all cells of a comparison yet.\n"


def comparison_rows(
    study: Study,
    pair: tuple[str, str],
    found: dict[str, dict[int, float]],
    planned: list[list[Cell]],
) -> list[dict]:
    """A row of cells for each score: the comparison of its paired differences.

    Pairs are lost whose cells have all run, but not on one machine, or with one that diverged.

    Args:
        study: whose results and failures tell which pairs are to come.
        pair: weighting and baseline.
        found: of `studies.statistics.paired_differences`.
        planned: of `studies.statistics.planned_pairs`.
    """
    ran = study.results.keys() | study.failures.keys()
    to_come = sum(not ran >= set(cells) for cells in planned)
    rows = []
    for score, by_seed in found.items():
        c = compare(list(by_seed.values()), score)
        pairs = str(c.pairs) if c.pairs == len(planned) else f"{c.pairs} of {len(planned)}"
        if lost := len(planned) - to_come - c.pairs:
            pairs += f", {lost} lost"
        so_far = " so far" if to_come and c.verdict != UNSEEN else ""
        spread = "" if math.isnan(c.low) else f"{c.low:+.4f} to {c.high:+.4f}"
        rows.append(
            {
                "weighting": pair[0],
                "against": pair[1],
                "score": arrow(score),
                "pairs": pairs,
                "mean difference": f"{c.mean:+.4f}",
                "95 % interval": spread,
                "sign test": f"p {c.p:.3f}",
                "verdict": c.verdict + so_far,
            }
        )
    return rows


def arrow(score: str) -> str:
    """A score's name, and which way is better."""
    return f"{score} {'↓' if score in LOWER_IS_BETTER else '↑'}"


def score_tables(study: Study) -> list[str]:
    """For each group a table: mean scores, and sparsity by modality, of each weighting."""
    tables = []
    dense = {cell.task: result for cell, result in study.results.items() if cell.method == DENSE}
    for group in groups(study.results):
        scores = SCORES[group[0]]
        of_group = results_by_weighting(study.cells, study.results, group)
        if not next(iter(of_group.values())):
            continue  # no seed has all weightings yet
        rows = [
            {"weighting": weighting} | mean_cells(results, scores)
            for weighting, results in of_group.items()
        ]
        start = ""
        if group[0] in dense:
            start = ", ".join(f"{score} {dense[group[0]][score]:.4f}" for score in scores)
            start = f" (the dense start: {start})"
        tables.append(f"{title(group)}{start}\n\n{markdown(rows)}\n")
    return tables


def mean_cells(results: list[dict], scores: tuple[str, ...]) -> dict[str, str]:
    """Means over seeds, of scores with standard deviations, as cells of a table."""
    row = {"seeds": str(len(results))}
    for score in scores:
        values = [result[score] for result in results]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        row[arrow(score)] = f"{np.mean(values):.4f}{spread}"
    for kind in ("vision", "language"):
        share = np.mean([result["sparsity"][kind] for result in results])
        row[f"{kind} pruned"] = f"{share:.1%}"
    return row


def difference_tables(study: Study) -> list[str]:
    """For each group a table of its comparisons."""
    tables = []
    for group in groups(study.results):
        rows = []
        for pair in comparisons(weightings_of(study.cells, study.results, group)):
            task, method, fraction = group
            planned = planned_pairs(study.cells, task, method, [fraction], pair)
            found = paired_differences(study.results, group, *pair)
            rows += comparison_rows(study, pair, found, planned)
        if rows:
            tables.append(f"{title(group)}\n\n{markdown(rows)}\n")
    return tables
