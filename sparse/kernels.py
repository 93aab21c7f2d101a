"""The compiled product of a sparse matrix and a tile of tokens.

Tokens come in tiles, transposed to (columns, tile), so that a nonzero of the matrix multiplies a
contiguous vector of tokens. A row of the matrix is walked along its nonzeros while the sums of the
whole tile stay in registers: each nonzero costs one broadcast and tile / 16 fused multiply-adds
whose second operand is read from the cache. Columns are taken in panels of 256, so that the part
of the tile in use stays in the L1 or L2 cache and a column of a panel fits in a byte.

The loops over tasks, panels and rows are compiled by Numba. The loop over nonzeros and the
transposition are written as LLVM instructions on vectors: from a plain loop Numba makes one that
keeps the sums in memory, at half the speed. LLVM splits a vector of 16 elements into as many as
the processor needs (one with AVX-512, two with AVX2, four on ARM64).
"""

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparse.matrix import PANEL

# Places in a kernel's arguments. The threads count up the first two. `TASKS` is the address of
# (n, 4) int64: first token, tokens, first row, end of rows; `SCRATCH` of the first thread's bytes,
# which the other threads' follow; `X` of (tokens, columns) float32; `Y` of (tokens, rows) float32;
# `BIAS` of (rows,) float32; the last three of a `SparseMatrix`.
NEXT_TASK, NEXT_THREAD, TASKS, TASK_COUNT, SCRATCH, SCRATCH_BYTES = range(6)
X, COLUMNS, Y, ROWS, BIAS, STARTS, OFFSETS, VALUES = range(6, 14)

BYTES = 4  # of a float32
LANES = 16  # elements of a vector
BLOCK = 8  # side of the blocks that are transposed in registers
CHAINS = 4  # sums that are independent: a multiply-add takes about four cycles to finish

_inline = njit(error_model="numpy")
_F32, _I64, _I32, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vector_at(builder, base, offset, vector):
    """The address of a vector, `offset` elements behind a pointer to elements."""
    return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())


def _load(builder, base, offset, vector):
    value = builder.load(_vector_at(builder, base, offset, vector))
    value.align = BYTES
    return value


def _store(builder, value, base, offset) -> None:
    builder.store(value, _vector_at(builder, base, offset, value.type)).align = BYTES


def _splat(builder, scalar, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    )


@intrinsic(prefer_literal=True)
def _add_row(typing_context, tile, first, x, offsets, values, start, stop, y, bias):
    """y[:] = (bias if first else y) + sum of values[j] * x[offsets[j], :] for j in start..stop.

    `tile` and `first` are constants; x (256, tile), y (tile,), offsets and values are addresses.
    """
    size, begins = tile.literal_value, first.literal_value
    lanes = min(size, LANES)
    count = size // lanes  # vectors of a tile
    chains = max(1, CHAINS // count)
    vector = ir.VectorType(_F32, lanes)
    signature = types.void(tile, first, *[types.intp] * 6, types.float32)

    def codegen(context, builder, signature, arguments):
        x, offsets, values, start, stop, y, bias = arguments[2:]
        x, values, y = (builder.inttoptr(a, _F32.as_pointer()) for a in (x, values, y))
        offsets = builder.inttoptr(offsets, _I8.as_pointer())
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f32")

        # LLVM keeps these in registers: nothing but loads and stores touches them
        sums = [cgutils.alloca_once(builder, vector) for _ in range(count * chains)]

        def walk(start, stop, step: int) -> None:
            with cgutils.for_range_slice(builder, start, stop, _constant(step), _I64) as (j, _):
                for chain in range(step):
                    at = builder.add(j, _constant(chain))
                    column = builder.zext(builder.load(builder.gep(offsets, [at])), _I64)
                    value = _splat(builder, builder.load(builder.gep(values, [at])), vector)
                    source = builder.gep(x, [builder.mul(column, _constant(size))])
                    for i in range(count):
                        tokens = _load(builder, source, _constant(i * lanes), vector)
                        k = sums[chain * count + i]
                        builder.store(builder.call(fma, [value, tokens, builder.load(k)]), k)

        if begins:
            begin = [_splat(builder, bias, vector)] * count
        else:
            begin = [_load(builder, y, _constant(i * lanes), vector) for i in range(count)]
        begin += [ir.Constant(vector, [0.0] * lanes)] * (len(sums) - count)
        for value, place in zip(begin, sums, strict=True):
            builder.store(value, place)
        if chains > 1:
            rest = builder.srem(builder.sub(stop, start), _constant(chains))
            walk(start, builder.sub(stop, rest), chains)
            start = builder.sub(stop, rest)
        walk(start, stop, 1)
        parts = [builder.load(place) for place in sums]
        while len(parts) > count:
            halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            parts = [builder.fadd(*pair) for pair in zip(*halves, strict=True)]
        for i, value in enumerate(parts):
            _store(builder, value, y, _constant(i * lanes))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _transpose(typing_context, side, source, source_stride, rows, target, target_stride, columns):
    """Transposes a block of `side` x `side` elements; strides are in elements.

    Only `rows` rows of the source are read and only `columns` rows of the target, which are columns
    of the source, are written: what lies beyond takes the last one's place, and is overwritten.
    """
    n = side.literal_value
    vector = ir.VectorType(_F32, n)
    signature = types.void(side, *[types.intp] * 6)

    def codegen(context, builder, signature, arguments):
        source, source_stride, rows, target, target_stride, columns = arguments[1:]
        source, target = (builder.inttoptr(a, _F32.as_pointer()) for a in (source, target))

        def offset(i, stride, count):
            last = builder.sub(count, _constant(1))
            inside = builder.icmp_signed("<", _constant(i), last)
            return builder.mul(stride, builder.select(inside, _constant(i), last))

        block = [_load(builder, source, offset(i, source_stride, rows), vector) for i in range(n)]
        half = 1
        while half < n:  # swaps the off-diagonal squares of all blocks of 2 * half
            low = [k if not k & half else k - half + n for k in range(n)]
            high = [k + half if not k & half else k + n for k in range(n)]
            masks = [ir.Constant(ir.VectorType(_I32, n), picks) for picks in (low, high)]
            for i in range(n):
                if not i & half:
                    pair = block[i], block[i + half]
                    block[i], block[i + half] = (builder.shuffle_vector(*pair, m) for m in masks)
            half *= 2
        for i in reversed(range(n)):
            _store(builder, block[i], target, offset(i, target_stride, columns))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _pointer(typing_context, address, dtype):
    """The elements of type `dtype` at an address, to be read and written by their index."""
    kind = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, dtype), codegen


@intrinsic
def _take(typing_context, counters, index):
    """Counts up an int64, and returns what it was; no two threads get the same."""

    def codegen(context, builder, signature, arguments):
        counter = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", counter, _constant(1), "monotonic")

    return types.int64(counters, types.intp), codegen


@_inline
def _to_features(side, tile, x, stride, tokens, columns, target):
    """Transposes `tokens` rows of `columns` elements to (columns, tile); the last row fills up."""
    whole = columns - columns % side
    for t in range(0, tile, side):
        first = x + min(t, tokens - 1) * stride * BYTES
        left = max(tokens - t, 1)
        for c in range(0, whole, side):
            block = target + (c * tile + t) * BYTES
            _transpose(side, first + c * BYTES, stride, left, block, tile, side)
    rest, source = _pointer(target, np.float32), _pointer(x, np.float32)
    for t in range(tile):
        row = min(t, tokens - 1) * stride
        for c in range(whole, columns):
            rest[c * tile + t] = source[row + c]


@_inline
def _to_tokens(side, tile, source, rows, y, stride, tokens):
    """Transposes (rows, tile) to `tokens` rows of `rows` elements."""
    whole = rows - rows % side
    for r in range(0, whole, side):
        for t in range(0, tokens, side):
            block = source + (r * tile + t) * BYTES
            corner = y + (t * stride + r) * BYTES
            _transpose(side, block, tile, side, corner, stride, min(tokens - t, side))
    rest, sums = _pointer(y, np.float32), _pointer(source, np.float32)
    for r in range(whole, rows):
        for t in range(tokens):
            rest[t * stride + r] = sums[r * tile + t]


def compile_kernel(tile: int):
    """Compiles `void kernel(int64_t *arguments)` for tiles of `tile` tokens; it has an `address`.

    Every thread that calls it with the same arguments takes tasks until none is left. It is
    compiled in about a second and kept on disk, for as long as this file and the processor are the
    same.
    """
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True)(_kernel(tile))
    except Exception:  # no folder can be written, or what Numba kept there is damaged
        return cfunc(signature)(_kernel(tile))


def _kernel(tile: int):
    side = min(tile, BLOCK)

    def kernel(arguments):
        x, columns = arguments[X], arguments[COLUMNS]
        y, rows = arguments[Y], arguments[ROWS]
        bias = _pointer(arguments[BIAS], np.float32)
        tasks = _pointer(arguments[TASKS], np.int64)
        offsets, values = arguments[OFFSETS], arguments[VALUES]
        thread = _take(arguments, NEXT_THREAD)
        panel = arguments[SCRATCH] + thread * arguments[SCRATCH_BYTES]
        sums = panel + PANEL * tile * BYTES  # (rows of the task, tile)
        while True:
            task = _take(arguments, NEXT_TASK)
            if task >= arguments[TASK_COUNT]:
                return
            token, tokens = tasks[task * 4], tasks[task * 4 + 1]
            first, stop = tasks[task * 4 + 2], tasks[task * 4 + 3]
            for c in range(0, columns, PANEL):
                width = min(PANEL, columns - c)
                corner = x + (token * columns + c) * BYTES
                _to_features(side, tile, corner, columns, tokens, width, panel)
                starts = _pointer(arguments[STARTS] + c // PANEL * (rows + 1) * 4, np.int32)
                for r in range(first, stop):
                    begin, end = np.int64(starts[r]), np.int64(starts[r + 1])
                    here = sums + (r - first) * tile * BYTES
                    if c == 0:
                        _add_row(tile, True, panel, offsets, values, begin, end, here, bias[r])
                    elif begin < end:
                        zero = np.float32(0)
                        _add_row(tile, False, panel, offsets, values, begin, end, here, zero)
            corner = y + (token * rows + first) * BYTES
            _to_tokens(side, tile, sums, stop - first, corner, rows, tokens)

    return kernel
