"""Pruning by importance scores: score, schedule, threshold, mask."""

from pruners.pruner import Pruner
from pruners.sparsity import sparsity_report

__all__ = ["Pruner", "sparsity_report"]
