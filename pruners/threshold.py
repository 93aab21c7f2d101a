"""The k-th smallest of very many scores, exactly, in two passes and without holding them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FIRST_NAN = 0x7F81  # upper 16 bits; infinity has 0x7F80


def kth_smallest(scores: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[float, int]:
    """The k-th smallest (from 1) of non-negative float32 scores, and how many scores equal it.

    A radix select: bit patterns of non-negative floats are ordered as the floats are. The first
    pass counts scores by their upper 16 bits, the second those of the right upper bits by their
    lower 16. NaN and 0 if a score is NaN.
    """
    counts = 0
    for _, piece in scores:
        upper = (piece.view(torch.int32) >> 16).bitwise_and_(0x7FFF)  # the sign is a NaN's only
        counts = torch.bincount(upper, minlength=1 << 15).add_(counts)
    if counts[FIRST_NAN:].any():
        return math.nan, 0
    upper, rank, _ = _locate(counts, k)
    counts = 0
    for _, piece in scores:
        bits = piece.view(torch.int32)
        lower = bits[bits >> 16 == upper] & 0xFFFF
        counts = torch.bincount(lower, minlength=1 << 16).add_(counts)
    lower, _, equal = _locate(counts, rank)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item(), equal


def _locate(counts: Tensor, k: int) -> tuple[int, int, int]:
    """The bin that holds the k-th score, the score's rank within the bin, and the bin's count."""
    up_to = counts.cumsum(0)
    at = int(torch.searchsorted(up_to, k))
    count = int(counts[at])
    return at, k - int(up_to[at]) + count, count
