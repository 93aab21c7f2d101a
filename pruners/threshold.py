"""The k-th smallest of very many scores, exactly, in one pass and without holding them.

A sample brackets the answer; one pass counts the scores below the bracket and keeps the few inside,
among which the answer is selected. Where the bracket misses or many scores are equal, a radix
select on the bit patterns takes two passes. Both rest on counts, which processes that each hold a
part of the scores could add up.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pruners import kernels
from pruners.score import Score, scores

SAMPLE = 1 << 18  # scores; the bracket then holds about 0.5 % of all
MOST_INSIDE = 32  # at most 1 in so many scores may lie inside
MARGIN = 3  # standard deviations of a sample's rank, to either side; 1 bracket in 400 misses
PIECES_AT_A_TIME = 32  # after so many, a bracket that holds too much is given up

FIRST_NAN = 0x7F81  # upper 16 bits; infinity has 0x7F80


def kth_smallest(score: Score, n: int, k: int) -> tuple[float, int]:
    """The k-th smallest score, as `torch.kthvalue` would find it, for any number of scores.

    Args:
        score: of the parameters.
        n: number of scores.
        k: rank, from 1 to n.

    Returns:
        The score of that rank, and how many scores equal it; NaN and 0 if a score is NaN.
    """
    stride = n // SAMPLE | 1  # odd: goes through all columns of a matrix of even width
    if stride > 1:
        lower, upper = bracket(score, stride, k / n)
        found = select_between(score, n, k, lower, upper) if lower < upper else None
        if found is not None:
            return found
    return radix_select(score.stream, k)


def bracket(score: Score, stride: int, quantile: float) -> tuple[float, float]:
    """Two values between which a quantile lies almost surely, from every stride-th score."""
    sample = torch.cat(list(score.stream(stride)))
    size = sample.numel()
    margin = MARGIN * math.sqrt(size * quantile * (1 - quantile)) + 2 * MARGIN
    low, high = int(quantile * size - margin), int(quantile * size + margin)
    lower = radix_select(lambda: [sample], low)[0] if low >= 1 else -1.0
    upper = radix_select(lambda: [sample], high)[0] if high <= size else math.inf
    return lower, upper


def between(
    a: Tensor, b: Tensor, dimension: float, lower: float, upper: float
) -> tuple[Tensor, Tensor]:
    """How many scores are at most `lower`, and those strictly between the bounds; NaN is between.

    Scores are `scores(a, b, dimension)`.
    """
    found = scores(a, b, dimension)
    below = found <= lower
    return below.sum(), found[~(below | (found >= upper))]


def select_between(
    score: Score, n: int, k: int, lower: float, upper: float
) -> tuple[float, int] | None:
    """The k-th smallest score if it lies strictly between two values, in one pass.

    Returns:
        As `kth_smallest`; None if it lies elsewhere, or if more than 1 in MOST_INSIDE scores lie
        inside.
    """
    pieces = [(*arguments, lower, upper) for _, *arguments in score.pieces()]
    below, size, inside = 0, 0, []
    for first in range(0, len(pieces), PIECES_AT_A_TIME):
        some = pieces[first : first + PIECES_AT_A_TIME]
        for count, found in kernels.on_pieces(between, kernels.between_loop, some):
            below += count
            size += len(found)
            inside.append(torch.as_tensor(found))
        if size > n // MOST_INSIDE:
            return None
    rank = k - int(below)
    if not 1 <= rank <= size:
        return None
    inside = torch.cat(inside)
    return radix_select(lambda: (piece for (piece,) in kernels.cut(inside)), rank)


def radix_select(pieces: Callable[[], Iterable[Tensor]], k: int) -> tuple[float, int]:
    """The k-th smallest of non-negative float32 scores, in two passes.

    Bit patterns of non-negative floats are ordered as the floats are. The first pass counts the
    scores by their upper 16 bits, the second those of the right upper bits by their lower 16.

    Args:
        pieces: the scores, flat; called for each pass.
        k: rank, from 1 to the number of scores.

    Returns:
        As `kth_smallest`.
    """
    counts = 0
    for piece in pieces():
        upper = (piece.view(torch.int32) & 0x7FFFFFFF) >> 16  # the sign bit is a NaN's only
        counts = torch.bincount(upper, minlength=1 << 15).add_(counts)
    if counts[FIRST_NAN:].any():
        return math.nan, 0
    upper_bits, rank, _ = _locate(counts, k)
    counts = 0
    for piece in pieces():
        bits = piece.view(torch.int32)
        lower = bits[(bits >> 16) == upper_bits] & 0xFFFF
        counts = torch.bincount(lower, minlength=1 << 16).add_(counts)
    lower_bits, _, equal = _locate(counts, rank)
    bits = torch.tensor(upper_bits << 16 | lower_bits, dtype=torch.int32)
    return bits.view(torch.float32).item(), equal


def _locate(counts: Tensor, k: int) -> tuple[int, int, int]:
    """The bin that holds the k-th score, the score's rank within the bin, and the bin's count."""
    up_to = counts.cumsum(0)
    at = int(torch.searchsorted(up_to, k))
    count = int(counts[at])
    return at, k - int(up_to[at]) + count, count
