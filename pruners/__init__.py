"""Pruning by importance scores: score, schedule, threshold, mask."""

from pruners.pruner import NonFiniteScores, Pruner
from pruners.score import METHODS
from pruners.sparsity import off_target, sparsity_report

__all__ = ["METHODS", "NonFiniteScores", "Pruner", "off_target", "sparsity_report"]
