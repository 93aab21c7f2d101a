"""Pruning by importance scores: score, schedule, threshold, mask."""

from utils import lazy_names

__getattr__ = lazy_names(
    {
        "METHODS": "pruners.score",
        "NonFiniteScores": "pruners.pruner",
        "Pruner": "pruners.pruner",
        "off_target": "pruners.sparsity",
        "prune_": "pruners.oneshot",
        "sparsity_report": "pruners.sparsity",
    }
)
