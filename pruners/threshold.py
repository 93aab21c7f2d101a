"""The k-th smallest of very many scores, exactly, in one pass and without holding them.

A sample brackets the answer; one pass counts the scores below the bracket and keeps the few inside,
among which the answer is selected. Where the bracket misses or many scores are equal, a radix
select on the bit patterns takes two passes. Both rest on counts, which processes that each hold a
part of the scores could add up.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from pruners.score import BLOCK, STREAM_BLOCK

SAMPLE = 1 << 18  # scores; the bracket then holds about 0.5 % of all
GROUP = 8  # scores that are looked at together; about 1 group in 24 has one inside the bracket
PART = 1 << 15  # scores of the bracket that are counted together
MOST_INSIDE = 32  # at most 1 in so many scores may lie inside
MARGIN = 3  # standard deviations of a sample's rank, to either side; 1 bracket in 400 misses

FIRST_NAN = 0x7F81  # upper 16 bits; infinity has 0x7F80

Blocks = Callable[[int], Iterable[torch.Tensor]]


def kth_smallest(blocks: Blocks, n: int, k: int) -> float:
    """The k-th smallest score, as `torch.kthvalue` would find it, for any number of scores.

    Args:
        blocks: `blocks(stride)` streams every stride-th score in flat float32 blocks of at most
            STREAM_BLOCK, each valid until the next and changed here. No score is negative.
        n: number of scores.
        k: rank, from 1 to n.

    Returns:
        The score of that rank, ties included; NaN if a score is NaN.
    """
    stride = n // SAMPLE | 1  # odd: goes through all columns of a matrix of even width
    if stride > 1:
        lower, upper = bracket(blocks, stride, k / n)
        inside = select_inside(blocks, n, k, lower, upper) if lower < upper else None
        if inside is not None:
            return inside
    return radix_select(lambda: blocks(1), k)


def bracket(blocks: Blocks, stride: int, quantile: float) -> tuple[float, float]:
    """Two values between which a quantile lies almost surely, from every stride-th score."""
    sample = torch.cat([block.clone() for block in blocks(stride)])
    size = sample.numel()
    margin = MARGIN * math.sqrt(size * quantile * (1 - quantile)) + 2 * MARGIN
    low, high = int(quantile * size - margin), int(quantile * size + margin)
    lower = radix_select(lambda: [sample], low) if low >= 1 else -1.0
    upper = radix_select(lambda: [sample], high) if high <= size else math.inf
    return lower, upper


def select_inside(blocks: Blocks, n: int, k: int, lower: float, upper: float) -> float | None:
    """The k-th smallest score if it lies strictly between two values, in one pass.

    Returns:
        The score; None if it lies elsewhere, or if more than 1 in MOST_INSIDE scores lie inside.
    """
    under, size, below = None, 0, 0
    for scores in blocks(1):
        if under is None:
            under = torch.empty(BLOCK[scores.device.type], device=scores.device)
            least = torch.empty(STREAM_BLOCK // GROUP, device=scores.device)
            inside = torch.empty(n // MOST_INSIDE, device=scores.device)
        for part in scores.split(len(under)):  # in parts that stay in the cache
            # into float32: to compare into bool is not vectorised
            is_under = torch.le(part, lower, out=under[: part.numel()])
            below += is_under.sum().double()  # exact: a part is below 2^24
        # Scores up to `lower` become infinite, so a group has one inside only if its least is below
        # `upper`. NaN stays NaN, and is neither below nor not.
        F.threshold_(scores, lower, math.inf)
        count = scores.numel() // GROUP
        groups, rest = scores[: count * GROUP].view(GROUP, count), scores[count * GROUP :]
        torch.amin(groups, 0, out=least[:count])
        at = (~(least[:count] >= upper)).nonzero().view(-1)
        found = groups[:, at].flatten()
        if rest.numel():
            found = torch.cat([found, rest])
        found = found[~(found >= upper)]
        if size + found.numel() > inside.numel():
            return None
        inside[size : size + found.numel()] = found
        size += found.numel()
    rank = k - int(below)
    return radix_select(lambda: inside[:size].split(PART), rank) if 1 <= rank <= size else None


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
