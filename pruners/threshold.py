"""The k-th smallest of very many scores, exactly, in one pass and without holding them.

A sample brackets the answer; one pass counts the scores below the bracket and keeps the few inside,
among which the answer is selected. Where the bracket misses or many scores are equal, a radix
select on the bit patterns takes two passes. Both rest on counts, which processes that each hold a
part of the scores could add up.
"""

import math
from collections.abc import Callable, Iterable

import torch

from pruners.score import BLOCK, STREAM_BLOCK

SAMPLE = 1 << 18  # scores; the bracket then holds about 0.5 % of all
ROW = 16  # scores that are counted together; about 1 row in 12 has one inside the bracket
MARGIN = 3  # standard deviations of a sample's rank, to either side; 1 bracket in 400 misses

FIRST_NAN = 0x7F81  # upper 16 bits; infinity has 0x7F80

Blocks = Callable[[int], Iterable[torch.Tensor]]


def kth_smallest(blocks: Blocks, n: int, k: int) -> float:
    """The k-th smallest score, as `torch.kthvalue` would find it, for any number of scores.

    Args:
        blocks: `blocks(stride)` streams every stride-th score in flat float32 blocks of at most
            STREAM_BLOCK, each valid until the next. No score is negative.
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
        The score; None if it lies elsewhere, or if more than a sixteenth of all scores lie inside.
    """
    outside, kept, size, below = None, [], 0, 0
    for scores in blocks(1):
        if outside is None:  # of float32: to compare into bool is not vectorised
            outside = torch.empty(2, STREAM_BLOCK, device=scores.device)
            ones = torch.ones(ROW, device=scores.device)
        rows = scores.numel() // ROW
        in_rows, rest = scores[: rows * ROW], scores[rows * ROW :]
        under, over = outside[:, : rows * ROW]
        torch.le(in_rows, lower, out=under)
        torch.ge(in_rows, upper, out=over)
        # Few are inside, so a row is looked into only if its counts do not add up: by NaN, too.
        under, over = under.view(rows, ROW).mv(ones), over.view(rows, ROW).mv(ones)
        below += under.sum().double() + (rest <= lower).sum()  # exact: a block is below 2^24
        looked_into = (under + over < ROW).nonzero().view(-1)
        found = torch.cat([in_rows.view(rows, ROW).index_select(0, looked_into).view(-1), rest])
        kept.append(found[~((found <= lower) | (found >= upper))])
        size += kept[-1].numel()
        if size > n // 16:
            return None
    kept, rank = torch.cat(kept), k - int(below)
    del outside
    return radix_select(lambda: kept.split(BLOCK // 8), rank) if 1 <= rank <= size else None


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
