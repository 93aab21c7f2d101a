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
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_of_this_thread = threading.local()
_PROCESS = os.getpid()


@lru_cache
def compiled(tile: int):
    """The kernel for tiles of `tile` tokens, see `kernels.compile_kernel`."""
    from sparse.kernels import compile_kernel  # Numba: not on every machine, 0.2 s to load

    return compile_kernel(tile)


@torch.library.custom_op("sparse::linear", mutates_args=(), device_types="cpu")
def multiply(
    x: Tensor, columns: int, starts: Tensor, offsets: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """The product x @ matrix.T + bias, on as many threads as torch uses.

    Args:
        x: (..., columns) float32.
        columns: of the matrix.
        starts: with `offsets` and `values` the parts of a `SparseMatrix` (rows, columns).
        offsets: see `starts`.
        values: see `starts`.
        bias: (rows,) float32, or None.

    Returns:
        (..., rows) float32.

    Raises:
        RuntimeError: the tokens have another number of features.
    """
    if x.shape[-1] != columns:
        raise RuntimeError(f"{tuple(x.shape)} are no tokens of {columns} features")
    x, rows = x.contiguous(), starts.shape[1] - 1
    bias = x.new_zeros(rows) if bias is None else bias.expand(rows).contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    addresses = [part.data_ptr() for part in (bias, starts, offsets, values)]
    for tile, tasks, threads in plan(x.numel() // columns, rows, torch.get_num_threads()):
        piece = scratch_bytes(rows, tile)
        arguments = _Arguments(
            *(0, 0, tasks.ctypes.data, len(tasks), _scratch(piece * threads).ctypes.data, piece),
            *(x.data_ptr(), columns, y.data_ptr(), rows, *addresses),
        )
        run_on_threads(compiled(tile).address, arguments, threads)
    return y


@multiply.register_fake
def _(x, columns, starts, offsets, values, bias):
    return x.new_empty(*x.shape[:-1], starts.shape[1] - 1)


@lru_cache(4096)
def plan(tokens: int, rows: int, threads: int) -> list[tuple[int, np.ndarray, int]]:
    """Cuts a product into tasks that keep all threads busy to the end.

    Tokens are cut into the largest tiles; what is left takes the smallest tile that holds it.
    Tiles that are left when every thread has had as many as the others are cut along the rows.

    Returns:
        For each size of tile: the size in tokens, tasks (n, 4) as the kernel takes them, threads.
    """
    largest = TILES[-1]
    whole = tokens - tokens % largest
    parts = []
    if whole:
        parts.append((largest, _tasks(range(0, whole, largest), largest, rows, threads)))
    if whole < tokens:
        tile = next(tile for tile in TILES if tile >= tokens - whole)
        parts.append((tile, _tasks([whole], tokens - whole, rows, threads)))
    return [(tile, tasks, min(threads, len(tasks))) for tile, tasks in parts]


def _tasks(firsts: Sequence[int], tokens: int, rows: int, threads: int) -> np.ndarray:
    shared = len(firsts) % threads
    even = len(firsts) - shared
    tasks = [(first, tokens, 0, rows) for first in firsts[:even]]
    if shared:

        def duration(parts: int) -> float:
            return math.ceil(shared * parts / threads) * (rows / parts + TRANSPOSITION)

        block = _round_up(rows / min(range(1, threads + 1), key=duration), LINE)
        for row in range(0, rows, block):
            tasks += [(first, tokens, row, min(row + block, rows)) for first in firsts[even:]]
    return np.array(tasks, np.int64)


def _round_up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def scratch_bytes(rows: int, tile: int) -> int:
    """What a thread needs beside the operands: a panel of a tile, and its sums."""
    return _round_up((PANEL + rows) * tile, LINE) * BYTES


def _scratch(size: int) -> np.ndarray:
    """At least `size` bytes that no other thread of Python uses; kept, since new memory is slow."""
    kept = getattr(_of_this_thread, "scratch", None)
    if kept is None or len(kept) < size:
        kept = _of_this_thread.scratch = np.empty(size, np.uint8)
    return kept


def run_on_threads(kernel: int, arguments: ctypes.Array, threads: int) -> None:
    """Calls a kernel on several threads at once, without the GIL; this one is among them.

    The threads are those on which torch runs its own operators: threads of our own would share the
    cores with theirs, which stay awake for a while after each operator. This thread is alone where
    torch's OpenMP library lacks the entry point that GCC's compiler calls (on Windows), and in a
    forked process, where OpenMP waits for threads that are not there.
    """
    if threads > 1 and os.getpid() == _PROCESS and (team := _openmp_team()):
        team(kernel, arguments, threads, 0)
    else:
        _Kernel(kernel)(arguments)


@lru_cache
def _openmp_team():
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library in use, or None."""
    try:
        team = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no such namespace
        return None
    team.restype = None
    team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return team
