"""The fast form of the pruner's equations: compiled loops for float32 on a CPU.

The equations stand in score.py, mask.py and threshold.py as lines of tensor operations. Memory
traffic bounds them: each tensor operation goes through memory, or at least the cache, while a loop
that Numba compiles goes through it once for a whole equation. `on_pieces` takes the loop where all
tensors are float32 on a CPU, and the tensor lines everywhere else.

Work is done piece by piece. A piece is the same stretch of a few tensors of one shape, as flat
views, followed by the scalars of the equation.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

thread_pool = lru_cache(ThreadPoolExecutor)  # started once: that takes longer than a piece

PIECE_ON_CPU = 9 << 15  # elements: few enough to stay in the cache and to share among threads
PIECE_ON_ACCELERATOR = 9 << 18  # elements: BLIP base's largest matrix, for each call costs a launch
VECTOR = 32  # neighbouring scores that are compared without a branch; 1 in 7 holds one inside

# Without the GIL, so that threads run side by side. a + b * c may be rounded once, as in torch.
compiled = njit(nogil=True, fastmath={"contract"})


def cut(*tensors: Tensor, stride: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors of one shape into pieces.

    Args:
        tensors: contiguous, of the same shape.
        stride: takes every stride-th element.

    Yields:
        Flat views of one piece, one of each tensor. All pieces are nearly equally long.
    """
    flat = [tensor.detach().view(-1)[::stride] for tensor in tensors]
    longest = PIECE_ON_CPU if flat[0].device.type == "cpu" else PIECE_ON_ACCELERATOR
    count = -(-flat[0].numel() // longest)
    return zip(*(tensor.chunk(count) for tensor in flat), strict=True)


def on_pieces(equation: Callable, loop: Callable, pieces: list[tuple]) -> list:
    """Calls an equation, or the loop that is its fast form, on each piece.

    Args:
        equation: tensor lines, a function of a piece's tensors and scalars.
        loop: compiled, of the same arguments, with arrays for tensors and floats for scalars.
        pieces: the arguments of each call.

    Returns:
        The result of each call.
    """
    if all_float32_on_cpu(pieces):
        return _on_threads(loop, pieces)
    return [equation(*piece) for piece in pieces]


def all_float32_on_cpu(pieces: list[tuple]) -> bool:
    """Whether every tensor of the pieces is float32 and in the CPU's memory."""
    tensors = (value for piece in pieces for value in piece if isinstance(value, Tensor))
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _on_threads(loop: Callable, pieces: list[tuple]) -> list:
    """Runs the loop on as many threads as torch uses."""
    results = [None] * len(pieces)
    left = iter(range(len(pieces)))  # each thread takes the next piece, so that none waits

    def work(_: int) -> None:
        for i in left:
            results[i] = loop(*map(_argument, pieces[i]))

    threads = torch.get_num_threads()
    for _ in thread_pool(threads).map(work, range(threads)):
        pass  # raises here what a thread raised
    return results


def _argument(value: Tensor | float) -> np.ndarray | float:
    return value.numpy() if isinstance(value, Tensor) else float(value)


# Scalars arrive in double precision. Each loop rounds them to float32 first, as torch does.


@compiled
def average_loop(ipt, p, grad, position):
    """The fast form of `score.average_`."""
    weight = np.float32(1 / (position + 1))
    for i in range(len(p)):
        ipt[i] += weight * (abs(p[i] * grad[i]) - ipt[i])


@compiled
def fold_loop(ipt, avg, unc, p, grad, beta1, beta2):
    """The fast form of `score.fold_`."""
    weight1, weight2 = np.float32(1 - beta1), np.float32(1 - beta2)
    for i in range(len(p)):
        avg[i] += weight1 * (ipt[i] - avg[i])
        unc[i] += weight2 * (abs(ipt[i] - avg[i]) - unc[i])
        ipt[i] = abs(p[i] * grad[i])


@compiled
def zero_below_loop(p, a, b, dimension, threshold):
    """The fast form of `mask.zero_below_`."""
    dimension, threshold = np.float32(dimension), np.float32(threshold)
    for i in range(len(p)):
        kept = abs(a[i] * b[i]) * dimension >= threshold
        p[i] = p[i] if kept else np.float32(0)


@compiled
def between_loop(a, b, dimension, lower, upper):
    """The fast form of `threshold.between`.

    Most neighbours lie all below or all above: counting them needs no branch and is vectorised.
    """
    dimension, lower, upper = np.float32(dimension), np.float32(lower), np.float32(upper)
    found = np.empty_like(a)
    below = size = 0
    whole = len(a) - len(a) % VECTOR
    for first in range(0, whole, VECTOR):
        under = over = np.int32(0)
        for i in range(VECTOR):
            score = abs(a[first + i] * b[first + i]) * dimension
            under += np.int32(score <= lower)
            over += np.int32(score >= upper)
        below += under
        if under + over < VECTOR:
            here = slice(first, first + VECTOR)
            _, size = _pick(a[here], b[here], dimension, lower, upper, found, size)
    under, size = _pick(a[whole:], b[whole:], dimension, lower, upper, found, size)
    return below + under, found[:size].copy()


@compiled
def _pick(a, b, dimension, lower, upper, found, size):
    """Writes scores that lie between behind the first `size` of `found`.

    Returns how many scores lie below, and how many `found` holds now.
    """
    below = 0
    for i in range(len(a)):
        score = abs(a[i] * b[i]) * dimension
        below += score <= lower
        found[size] = score
        size += not (score <= lower or score >= upper)
    return below, size
