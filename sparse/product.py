"""The product of tokens with a sparse matrix: an operator of torch's, on torch's threads."""

import ctypes
import math
import os
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sparse.matrix import PANEL

TILES = (4, 16, 32, 64)  # tokens; a kernel is compiled for each
BYTES = 4  # of a float32
LINE = 16  # elements of a cache line
TRANSPOSITION = 32  # rows that are multiplied in the time in which a task transposes its tokens

_Arguments = ctypes.c_int64 * 14  # see `kernels`
_of_this_thread = threading.local()
_PROCESS = os.getpid()


@lru_cache
def compiled(tile: int):
    """The kernel for tiles of `tile` tokens, see `kernels.compile_kernel`."""
    import numba  # not on every machine, 0.2 s to load

    from sparse.kernels import compile_kernel

    if numba.config.DISABLE_JIT:  # some kernels may be on disk, but not all
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    return compile_kernel(tile)


@torch.library.custom_op("sparse::linear", mutates_args=(), device_types="cpu")
def multiply(
    x: Tensor, columns: int, starts: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """The product x @ matrix.T + bias of tokens (..., columns) float32, on torch's threads.

    `starts`, `offsets` and `values` are the parts of a `SparseMatrix`.
    """
    if x.shape[-1] != columns:
        raise RuntimeError(f"{tuple(x.shape)} are no tokens of {columns} features")
    x, rows = x.contiguous(), starts.shape[1] - 1
    bias = x.new_zeros(rows) if bias is None else bias.expand(rows).contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    operands = x.data_ptr(), columns, y.data_ptr(), rows
    matrix = [part.data_ptr() for part in (bias, starts, offsets, values)]
    for tile, tasks, threads in plan(x.numel() // columns, rows, torch.get_num_threads()):
        size = _round_up((PANEL + rows) * tile, LINE) * BYTES  # a thread's panel and sums
        places = tasks.ctypes.data, len(tasks), _scratch(size * threads).ctypes.data, size
        run_on_threads(
            compiled(tile).address, _Arguments(0, 0, *places, *operands, *matrix), threads
        )
    return y


@multiply.register_fake
def _(x, columns, starts, offsets, values, bias):
    return x.new_empty(*x.shape[:-1], starts.shape[1] - 1)


@lru_cache(4096)
def plan(tokens: int, rows: int, threads: int) -> list[tuple[int, np.ndarray, int]]:
    """Cuts a product into tasks that keep all threads busy to the end.

    Tokens are cut into the largest tiles; the rest takes the smallest tile that holds it. Tiles
    that do not share out evenly among the threads are cut along the rows. Returns for each size of
    tile: the size in tokens, tasks (n, 4) as the kernel takes them, threads.
    """
    largest, parts = TILES[-1], []
    whole = tokens - tokens % largest
    for height, firsts in ((largest, range(0, whole, largest)), (tokens - whole, [whole])):
        if height and firsts:
            tile = next(tile for tile in TILES if tile >= height)
            tasks = _tasks(firsts, height, rows, threads)
            parts.append((tile, tasks, min(threads, len(tasks))))
    return parts


def _tasks(firsts: Sequence[int], tokens: int, rows: int, threads: int) -> np.ndarray:
    shared = len(firsts) % threads
    even = len(firsts) - shared
    tasks = [(first, tokens, 0, rows) for first in firsts[:even]]

    def duration(parts: int) -> float:
        return math.ceil(shared * parts / threads) * (rows / parts + TRANSPOSITION)

    block = _round_up(rows / min(range(1, threads + 1), key=duration), LINE)
    for row in range(0, rows, block):
        tasks += [(first, tokens, row, min(row + block, rows)) for first in firsts[even:]]
    return np.array(tasks, np.int64)


def _round_up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _scratch(size: int) -> np.ndarray:
    """At least `size` bytes of this thread of Python, kept because new memory is slow."""
    if len(kept := getattr(_of_this_thread, "scratch", b"")) < size:
        kept = _of_this_thread.scratch = np.zeros(size, np.uint8)
    return kept


def run_on_threads(kernel: int, arguments: ctypes.Array, threads: int) -> None:
    """Calls a kernel on several of torch's threads at once, without the GIL.

    Threads of our own would share the cores with torch's, which stay awake after each operator.
    One thread works alone without GCC's entry point of OpenMP (on Windows), and in a forked
    process, where OpenMP waits for threads that are not there.
    """
    if threads > 1 and os.getpid() == _PROCESS and (team := _openmp_team()):
        team(kernel, arguments, threads, 0)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)(arguments)


@lru_cache
def _openmp_team():
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library in use, or None."""
    kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    try:
        return ctypes.CFUNCTYPE(None, *kinds)(("GOMP_parallel", ctypes.CDLL(None)))
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no such namespace
        return None
