"""The k-th smallest of very many scores, exactly, in one pass and without holding them.

A sample brackets the answer; one pass counts the scores below the bracket and keeps the few inside,
among which the answer is selected. Where the bracket misses or many scores are equal, a radix
select on the bit patterns takes two passes. Both rest on counts, which processes that each hold a
part of the scores could add up.
"""

import math
from collections.abc import Callable, Iterable

import torch

from pruners import kernels
from pruners.score import Score

SAMPLE = 1 << 18  # scores; the bracket then holds about 0.5 % of all
MOST_INSIDE = 32  # at most 1 in so many scores may lie inside
MARGIN = 3  # standard deviations of a sample's rank, to either side; 1 bracket in 400 misses

AT_A_TIME = 32  # pieces, after which a bracket that holds too much is given up
PART = 1 << 16  # scores of the bracket that are counted together

FIRST_NAN = 0x7F81  # upper 16 bits; infinity has 0x7F80


def kth_smallest(score: Score, n: int, k: int) -> float:
    """The k-th smallest score, as `torch.kthvalue` would find it, for any number of scores.

    Args:
        score: of the parameters.
        n: number of scores.
        k: rank, from 1 to n.

    Returns:
        The score of that rank, ties included; NaN if a score is NaN.
    """
    stride = n // SAMPLE | 1  # odd: goes through all columns of a matrix of even width
    if stride > 1:
        lower, upper = bracket(score, stride, k / n)
        inside = select_inside(score, n, k, lower, upper) if lower < upper else None
        if inside is not None:
            return inside
    return radix_select(score.blocks, k)


def bracket(score: Score, stride: int, quantile: float) -> tuple[float, float]:
    """Two values between which a quantile lies almost surely, from every stride-th score."""
    sample = torch.cat(list(score.blocks(stride)))
    size = sample.numel()
    margin = MARGIN * math.sqrt(size * quantile * (1 - quantile)) + 2 * MARGIN
    low, high = int(quantile * size - margin), int(quantile * size + margin)
    lower = radix_select(lambda: [sample], low) if low >= 1 else -1.0
    upper = radix_select(lambda: [sample], high) if high <= size else math.inf
    return lower, upper


def select_inside(score: Score, n: int, k: int, lower: float, upper: float) -> float | None:
    """The k-th smallest score if it lies strictly between two values, in one pass.

    Returns:
        The score; None if it lies elsewhere, or if more than 1 in MOST_INSIDE scores lie inside.
    """
    pieces = [(*factors, lower, upper) for _, *factors in score.pieces()]
    below, size, inside = 0, 0, []
    for start in range(0, len(pieces), AT_A_TIME):
        for count, found in kernels.between(pieces[start : start + AT_A_TIME]):
            below += count
            size += len(found)
            inside.append(torch.as_tensor(found))
        if size > n // MOST_INSIDE:
            return None
    rank = k - int(below)
    if not 1 <= rank <= size:
        return None
    inside = torch.cat(inside).split(PART)
    return radix_select(lambda: inside, rank)


def radix_select(blocks: Callable[[], Iterable[torch.Tensor]], k: int) -> float:
    """The k-th smallest of non-negative float32 numbers, in two passes.

    Bit patterns of non-negative floats are ordered as the numbers are. The first pass counts the
    numbers by the upper 16 bits, the second those of the right upper bits by the lower 16.

    Args:
        blocks: called for each pass.
        k: rank, from 1 to the number of numbers.

    Returns:
        The number of that rank; NaN if a number is NaN.
    """
    counts = 0
    for block in blocks():
        upper = (block.view(torch.int32) & 0x7FFFFFFF) >> 16  # the sign bit is a NaN's only
        counts = torch.bincount(upper, minlength=1 << 15).add_(counts)
    if counts[FIRST_NAN:].any():
        return math.nan
    upper_bits, rank = _locate(counts, k)
    counts = 0
    for block in blocks():
        bits = block.view(torch.int32)
        lower = bits[(bits >> 16) == upper_bits] & 0xFFFF
        counts = torch.bincount(lower, minlength=1 << 16).add_(counts)
    lower_bits, _ = _locate(counts, rank)
    return torch.tensor(upper_bits << 16 | lower_bits, dtype=torch.int32).view(torch.float32).item()


def _locate(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th number, and the number's rank within the bin."""
    up_to = counts.cumsum(0)
    at = int(torch.searchsorted(up_to, k))
    return at, k - int(up_to[at] - counts[at])
