"""The passes over all prunable numbers: averaging, folding, finding, masking.

Memory traffic bounds this work. A chain of tensor operations goes through memory, or at least the
cache, once for each of them; a loop that Numba compiles goes through once for all. Every kernel
has both forms: the loop for float32 on the CPU, tensor operations for all else.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

GROUP = 32  # scores that are looked at together; about one group in seven has one in the bracket

# Without the GIL, so that threads run side by side. a + b * c may be rounded once, as in torch.
compiled = njit(nogil=True, fastmath={"contract"})


class Kernel:
    """A pass over pieces of memory.

    Args:
        loop: compiled, of flat arrays and numbers.
        operations: the same, of flat tensors and numbers.
    """

    def __init__(self, loop: Callable, operations: Callable):
        self.loop, self.operations = loop, operations

    def __call__(self, pieces: list[tuple]) -> list:
        """Works on all pieces, and returns a result for each.

        Args:
            pieces: arguments of the loop or of the operations; numbers become float32.
        """
        if fit_loops(pieces):
            return self._on_threads(pieces)
        return [self.operations(*piece) for piece in pieces]

    def _on_threads(self, pieces: list[tuple]) -> list:
        """Runs the loop on as many threads as torch uses."""
        results = [None] * len(pieces)
        left = iter(range(len(pieces)))  # a thread takes the next: none waits for another

        def work(_: int) -> None:
            for i in left:
                results[i] = self.loop(*map(_argument, pieces[i]))

        threads = torch.get_num_threads()
        for _ in _pool(threads).map(work, range(threads)):
            pass  # raises here what was raised there
        return results


def fit_loops(pieces: list[tuple]) -> bool:
    """Whether all tensors are float32 in the CPU's memory."""
    tensors = (value for piece in pieces for value in piece if isinstance(value, Tensor))
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _argument(value: Tensor | float):
    return value.numpy() if isinstance(value, Tensor) else np.float32(value)


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@compiled
def _average_loop(p, grad, ipt, weight):
    for i in range(len(p)):
        ipt[i] += weight * (abs(p[i] * grad[i]) - ipt[i])


def _average_operations(p: Tensor, grad: Tensor, ipt: Tensor, weight: float) -> None:
    ipt.lerp_(scores_of(p, grad), weight)


@compiled
def _fold_loop(p, grad, ipt, avg, unc, weight1, weight2):
    for i in range(len(p)):
        avg[i] += weight1 * (ipt[i] - avg[i])
        unc[i] += weight2 * (abs(ipt[i] - avg[i]) - unc[i])
        ipt[i] = abs(p[i] * grad[i])


def _fold_operations(
    p: Tensor, grad: Tensor, ipt: Tensor, avg: Tensor, unc: Tensor, weight1: float, weight2: float
) -> None:
    avg.lerp_(ipt, weight1)
    unc.lerp_((ipt - avg).abs_(), weight2)
    ipt.copy_(scores_of(p, grad))


@compiled
def _mask_loop(p, a, b, weight, threshold):
    for i in range(len(p)):
        p[i] *= np.float32(abs(a[i] * b[i]) * weight >= threshold)


def _mask_operations(p: Tensor, a: Tensor, b: Tensor, weight: float, threshold: float) -> None:
    p.mul_(scores_of(a, b, weight) >= threshold)


@compiled
def _between_loop(a, b, weight, lower, upper):
    found = np.empty_like(a)
    below = size = 0
    whole = len(a) - len(a) % GROUP
    for first in range(0, whole, GROUP):
        under = over = np.int32(0)
        for i in range(GROUP):  # a constant, and no branch inside: vectorised
            score = abs(a[first + i] * b[first + i]) * weight
            under += np.int32(score <= lower)
            over += np.int32(score >= upper)
        below += under
        if under + over < GROUP:
            group = slice(first, first + GROUP)
            _, size = _pick(a[group], b[group], weight, lower, upper, found, size)
    under, size = _pick(a[whole:], b[whole:], weight, lower, upper, found, size)
    return below + under, found[:size].copy()


@compiled
def _pick(a, b, weight, lower, upper, found, size):
    """Appends scores to the first `size` in `found`; returns how many lie below, and the size."""
    below = 0
    for i in range(len(a)):
        score = abs(a[i] * b[i]) * weight
        below += score <= lower
        found[size] = score
        size += not (score <= lower or score >= upper)
    return below, size


def _between_operations(
    a: Tensor, b: Tensor, weight: float, lower: float, upper: float
) -> tuple[Tensor, Tensor]:
    scores = scores_of(a, b, weight)
    under = scores <= lower
    return under.sum(), scores[~(under | (scores >= upper))]


def scores_of(a: Tensor, b: Tensor, weight: float = 1.0) -> Tensor:
    """Scores |a * b| * weight in float32."""
    return (a.float() * b.float()).abs_().mul_(weight)


# (p, grad, ipt, weight): moves `ipt` by a share of the way to |p * grad|.
average = Kernel(_average_loop, _average_operations)

# (p, grad, ipt, avg, unc, weight1, weight2): moves `avg` towards `ipt`, `unc` towards the
# distance of `ipt` from the new `avg`, and begins `ipt` anew with |p * grad|.
fold = Kernel(_fold_loop, _fold_operations)

# (p, a, b, weight, threshold): zeroes the numbers of `p` whose scores are below the threshold.
mask = Kernel(_mask_loop, _mask_operations)

# (a, b, weight, lower, upper): how many scores lie up to `lower`, and those strictly between the
# bounds; NaN lies between.
between = Kernel(_between_loop, _between_operations)
