"""Paired differences between weightings: mean, bootstrap interval, sign test and a verdict.

Pairs share task, method, remaining fraction and seed, hence the data's order, and the processor,
its threads and the version of torch, whose rounding moves scores as far as weightings do.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from studies.grid import DENSE, Cell
from studies.weightings import ID, MEAN, NONE, SHUFFLED, WITHIN

Group = tuple[str, str, float]  # task, method and remaining fraction

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05  # of the sign test, two-sided
TIE = 1e-12  # differences up to it are of rounding, and have no sign
RESAMPLES = 10_000
BASELINES = (NONE, SHUFFLED)
SCORES = {"caption": ("loss", "CIDEr"), "nlvr": ("loss", "accuracy")}  # of a task's cells
LOWER_IS_BETTER = {"loss"}
BETTER, WORSE, UNSEEN = "better", "worse", "no difference seen at this n"
RULE = (
    'A weighting is "better" than another where the 95 % bootstrap interval of the mean paired '
    "difference lies wholly on the better side of zero, most signs are on that side and the "
    'two-sided sign test gives p < 0.05; "worse" likewise; else "no difference seen at this n". '
    "With fewer than 6 pairs the sign test cannot reach p < 0.05; with 8 all must have one sign, "
    "with 10 all but one; to it a tie is a pair that is missing. So where there is no effect, "
    "chance gives a verdict in at most 0.8 % of comparisons of 8 pairs, 2.1 % of 10. While planned "
    'pairs are to come a verdict is of the moment, "so far".'
)


@dataclass(frozen=True)
class Comparison:
    """What paired differences, a weighting's score minus the baseline's, have come to.

    Attributes:
        differences: by seed, in the order of seeds.
        mean: of the differences.
        low: lower end of the bootstrap interval of the mean; nan of a single pair.
        high: upper end.
        p: of the two-sided sign test; ties are left out.
        verdict: see RULE.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    verdict: str

    @property
    def pairs(self) -> int:
        """Their number."""
        return len(self.differences)


def compare(differences: list[float], score: str) -> Comparison:
    """Judges paired differences.

    Args:
        differences: at least one.
        score: its name tells which direction is better.
    """
    from scipy.stats import binomtest

    low, high = interval(differences)
    above = sum(d > TIE for d in differences)
    below = sum(d < -TIE for d in differences)
    p = binomtest(above, above + below).pvalue if above + below else 1.0
    verdict = UNSEEN
    higher, lower = low > 0 and above > below, high < 0 and below > above
    if p < SIGNIFICANCE and (higher or lower):
        verdict = BETTER if higher != (score in LOWER_IS_BETTER) else WORSE
    return Comparison(tuple(differences), float(np.mean(differences)), low, high, p, verdict)


def interval(values: list[float]) -> tuple[float, float]:
    """The bootstrap interval of the mean: the percentiles of resampled means, seeded.

    Returns:
        Its ends; nan where there is one value only.
    """
    from scipy.stats import bootstrap  # takes a second to import

    if len(values) < 2:
        return math.nan, math.nan
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_differences(
    results: dict[Cell, dict], group: Group, weighting: str, baseline: str
) -> dict[str, dict[int, float]]:
    """Score to seed to difference, over the seeds for which both cells are done on one machine.

    Args:
        results: of a study.
        group: task, method and remaining fraction.
        weighting: to compare with the baseline.
        baseline: a weighting.
    """
    differences = defaultdict(dict)
    for cell, result in sorted(results.items(), key=lambda pair: pair[0].seed):
        if (cell.task, cell.method, cell.remaining, cell.weighting) != (*group, weighting):
            continue
        other = results.get(Cell(*group, baseline, cell.seed))
        if other is not None and machine(other) == machine(result):
            for score in SCORES[cell.task]:
                differences[score][cell.seed] = result[score] - other[score]
    return dict(differences)


def machine(result: dict) -> str:
    """What computed a result; one that tells no threads is of one, or of a GPU."""
    threads = result.get("threads", 1)
    of_several = f", {threads} threads" if threads > 1 else ""
    return f"{result['processor']}, torch {result['torch']}{of_several}"


def pooled_differences(
    results: dict[Cell, dict],
    task: str,
    method: str,
    fractions: list[float],
    weighting: str,
    baseline: str,
) -> dict[str, dict[int, float]]:
    """As `paired_differences`, each seed's mean over remaining fractions; it counts with all done.

    Args:
        results: of a study.
        task: a group's.
        method: a group's.
        fractions: to take the mean over.
        weighting: to compare with the baseline.
        baseline: a weighting.
    """
    found = [
        paired_differences(results, (task, method, fraction), weighting, baseline)
        for fraction in fractions
    ]
    pooled = {}
    for score in SCORES[task] if found and all(found) else ():
        of_score = [differences[score] for differences in found]
        seeds = sorted(set.intersection(*map(set, of_score)))
        if seeds:
            pooled[score] = {s: sum(d[s] for d in of_score) / len(of_score) for s in seeds}
    return pooled


def groups(results: dict[Cell, dict]) -> list[Group]:
    """Task, method and remaining fraction of finished cells, least pruned first."""
    found = {(c.task, c.method, c.remaining) for c in results if c.method != DENSE}
    order = {"PLATON": 0}
    return sorted(found, key=lambda g: (g[0], order.get(g[1], 1), g[1], -g[2]))


def weightings_of(cells: list[Cell], results: dict[Cell, dict], group: Group) -> list[str]:
    """The weightings of a group's finished cells, in the order of the study's cells."""
    done = {c.weighting for c in results if (c.task, c.method, c.remaining) == group}
    return [w for w in dict.fromkeys(cell.weighting for cell in cells) if w in done]


def results_by_weighting(
    cells: list[Cell], results: dict[Cell, dict], group: Group
) -> dict[str, list[dict]]:
    """A group's results by weighting, of the seeds that all its weightings have, in their order.

    All of a seed are of one machine. Means over other seeds could not be compared: seeds differ by
    more than weightings, and machines by as much.
    """
    found = {
        weighting: {c.seed: r for c, r in results.items() if c == Cell(*group, weighting, c.seed)}
        for weighting in weightings_of(cells, results, group)
    }
    seeds = [
        seed
        for seed in sorted(set.intersection(*map(set, found.values())))
        if len({machine(by_seed[seed]) for by_seed in found.values()}) == 1
    ]
    return {weighting: [by_seed[s] for s in seeds] for weighting, by_seed in found.items()}


def planned_pairs(cells: list[Cell], task: str, method: str, fractions, pair) -> list[list[Cell]]:
    """The cells of each pair that a comparison is to have.

    Args:
        cells: of the study.
        task: a group's.
        method: a group's.
        fractions: over which each seed's mean is taken, one or several.
        pair: weighting and baseline.
    """
    planned = set(cells)
    pairs = [
        [
            Cell(task, method, fraction, weighting, seed)
            for fraction in fractions
            for weighting in pair
        ]
        for seed in sorted({cell.seed for cell in cells})
    ]
    return [of_pair for of_pair in pairs if planned.issuperset(of_pair)]


def comparisons(weightings: list[str]) -> list[tuple[str, str]]:
    """Pairs (weighting, baseline) to report: all against BASELINES, and ID against its controls."""
    pairs = [(w, NONE) for w in weightings if w != NONE]
    pairs += [(w, SHUFFLED) for w in weightings if w not in BASELINES]
    pairs += [(ID, control) for control in (WITHIN, MEAN) if {ID, control} <= set(weightings)]
    return pairs
