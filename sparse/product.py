"""A sparse matrix in memory, and its product with tokens on several threads."""

import ctypes
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse.compiling import thread_pool

PANEL = 256  # columns; a panel of a tile stays in the cache, and a column of it fits in a byte
TILES = (4, 16, 32, 64)  # tokens; a kernel is compiled for each
BYTES = 4  # of a float32

# Where a kernel finds what in its arguments, an int64 array. The threads count up the first two.
NEXT_TASK, NEXT_THREAD = 0, 1
TASKS, TASK_COUNT = 2, 3  # address of (n, 4) int64: first token, tokens, first row, end of rows
SCRATCH, SCRATCH_BYTES = 4, 5  # address, and the bytes that each thread has from there
X, COLUMNS = 6, 7  # address of (tokens, columns) float32
Y, ROWS, BIAS = 8, 9, 10  # addresses of (tokens, rows) and (rows,) float32
STARTS, OFFSETS, VALUES = 11, 12, 13  # addresses of a SparseMatrix

LINE = 16  # elements of a cache line
TRANSPOSITION = 32  # rows that are multiplied in the time in which a task transposes its tokens

_Arguments = ctypes.c_int64 * (VALUES + 1)
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_of_this_thread = threading.local()


class SparseMatrix(NamedTuple):
    """The nonzeros of a matrix (rows, columns), by panel of columns, then row, then column.

    Five bytes a nonzero, and four a row and panel.
    """

    starts: Tensor  # (panels, rows + 1) int32: where in the other two a row of a panel begins
    offsets: Tensor  # (nonzeros,) uint8: column less the panel's first
    values: Tensor  # (nonzeros,) float32


def compress(matrix: Tensor) -> SparseMatrix:
    """Keeps the nonzeros of a float32 matrix (rows, columns); NaN is one."""
    starts, offsets, values, begin = [], [], [], 0
    for panel in matrix.split(PANEL, dim=1):
        panel = np.ascontiguousarray(panel.numpy())
        kept = panel != 0
        places = np.flatnonzero(kept)  # NumPy picks elements in a fifth of the time of torch
        offsets.append((places % panel.shape[1]).astype(np.uint8))
        values.append(panel.ravel()[places])
        ends = begin + np.count_nonzero(kept, axis=1).cumsum()
        starts.append(np.concatenate([[begin], ends]).astype(np.int32))
        begin += len(places)
    parts = np.stack(starts), np.concatenate(offsets), np.concatenate(values)
    return SparseMatrix(*map(torch.from_numpy, parts))


def decompress(sparse: SparseMatrix, columns: int) -> Tensor:
    """The matrix (rows, columns) that `compress` was given."""
    matrix = torch.zeros(sparse.starts.shape[1] - 1, columns)
    for starts, panel in zip(sparse.starts, matrix.split(PANEL, dim=1), strict=True):
        rows = torch.arange(len(matrix)).repeat_interleave(starts.diff())
        inside = slice(int(starts[0]), int(starts[-1]))
        panel[rows, sparse.offsets[inside].long()] = sparse.values[inside]
    return matrix


@lru_cache
def compiled(tile: int) -> int:
    """The address of the kernel for tiles of `tile` tokens, see `kernels.compile_kernel`."""
    from sparse.kernels import compile_kernel  # Numba: not on every machine, 0.2 s to load

    return compile_kernel(tile)


def multiply(x: Tensor, sparse: SparseMatrix, bias: Tensor | None) -> Tensor:
    """The product x @ matrix.T + bias, on as many threads as torch uses.

    Args:
        x: (tokens, columns) float32, contiguous.
        sparse: a matrix (rows, columns).
        bias: (rows,) float32, or None.

    Returns:
        (tokens, rows) float32.
    """
    tokens, rows = len(x), sparse.starts.shape[1] - 1
    bias = x.new_zeros(rows) if bias is None else bias
    y = x.new_empty(tokens, rows)
    addresses = [part.data_ptr() for part in sparse]
    for tile, tasks, threads in plan(tokens, rows, torch.get_num_threads()):
        piece = scratch_bytes(rows, tile)
        arguments = _Arguments(
            *(0, 0, tasks.data_ptr(), len(tasks), _scratch(piece * threads).data_ptr(), piece),
            *(x.data_ptr(), x.shape[1], y.data_ptr(), rows, bias.data_ptr(), *addresses),
        )
        run_on_threads(compiled(tile), arguments, threads)
    return y


@lru_cache(4096)
def plan(tokens: int, rows: int, threads: int) -> list[tuple[int, Tensor, int]]:
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


def _tasks(firsts: Sequence[int], tokens: int, rows: int, threads: int) -> Tensor:
    shared = len(firsts) % threads
    even = len(firsts) - shared
    tasks = [(first, tokens, 0, rows) for first in firsts[:even]]
    if shared:

        def duration(parts: int) -> float:
            return math.ceil(shared * parts / threads) * (rows / parts + TRANSPOSITION)

        block = _round_up(rows / min(range(1, threads + 1), key=duration), LINE)
        for row in range(0, rows, block):
            tasks += [(first, tokens, row, min(row + block, rows)) for first in firsts[even:]]
    return torch.tensor(tasks)


def _round_up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def scratch_bytes(rows: int, tile: int) -> int:
    """What a thread needs beside the operands: a panel of a tile, and its sums."""
    return _round_up((PANEL + rows) * tile, LINE) * BYTES


def _scratch(size: int) -> Tensor:
    """At least `size` bytes that no other thread of Python uses; kept, since new memory is slow."""
    kept = getattr(_of_this_thread, "scratch", None)
    if kept is None or len(kept) < size:
        kept = _of_this_thread.scratch = torch.empty(size, dtype=torch.uint8)
    return kept


def run_on_threads(kernel: int, arguments: ctypes.Array, threads: int) -> None:
    """Calls a kernel on several threads at once, without the GIL.

    The threads are those on which torch runs its own operators, if its OpenMP library offers the
    entry point that GCC's compiler calls: threads of our own would share the cores with theirs,
    which stay awake for a while after each operator.

    Args:
        kernel: address of a C function `void kernel(int64_t *arguments)`.
        arguments: of the kernel.
        threads: how many call it; this one is among them.
    """
    if threads == 1:
        _Kernel(kernel)(arguments)
    elif (team := _openmp_team()) is not None:
        team(kernel, arguments, threads, 0)
    else:
        for _ in thread_pool(threads).map(lambda _: _Kernel(kernel)(arguments), range(threads)):
            pass


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
