"""Intrinsic dimensions of layers, and pruning by importance that they weight."""

from pruners.pruner import Pruner
from pruners.report import plot_sparsity, sparsity_report

__all__ = ["Pruner", "plot_sparsity", "sparsity_report"]
