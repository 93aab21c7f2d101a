"""The compiled product of a sparse matrix and a tile of tokens.

Tokens come in tiles, transposed to (columns, tile): a nonzero multiplies a contiguous vector of
tokens. The sums of a tile stay in registers while a row's nonzeros are walked, at one broadcast and
tile / 16 multiply-adds each. Of a tile, the panel of 256 columns in use stays in the cache.

The loop over nonzeros and the transposition are LLVM instructions on vectors, because a plain loop
of Numba keeps the sums in memory, at half the speed.
"""

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparse.matrix import PANEL

# Places in a kernel's arguments; the threads count up the first two. Addresses: `TASKS` of (n, 4)
# int64 (first token, tokens, first row, end of rows), `SCRATCH` of `SCRATCH_BYTES` for each thread,
# `X` of (tokens, columns), `Y` of (tokens, rows), `BIAS` of (rows,), then a `SparseMatrix`'s parts.
NEXT_TASK, NEXT_THREAD, TASKS, TASK_COUNT, SCRATCH, SCRATCH_BYTES = range(6)
X, COLUMNS, Y, ROWS, BIAS, STARTS, OFFSETS, VALUES = range(6, 14)

BYTES = 4  # of a float32
LANES = 16  # elements of a vector, which LLVM splits into the processor's
BLOCK = 16  # side of the blocks that are transposed in registers: whole cache lines are written
CHAINS = 4  # independent sums: a multiply-add takes about four cycles to finish

_inline = njit(error_model="numpy")
_F32, _I64, _I32, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vector_at(builder, base, offset, vector):
    return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())


def _load(builder, base, offset, vector):
    return builder.load(_vector_at(builder, base, offset, vector), align=BYTES)


def _store(builder, value, base, offset) -> None:
    builder.store(value, _vector_at(builder, base, offset, value.type), align=BYTES)


def _splat(builder, scalar, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(_I32, vector.count), None)
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
        begin += [ir.Constant(vector, None)] * (len(sums) - count)
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
def _transpose_block(
    typing_context, side, source, source_stride, rows, target, target_stride, columns
):
    """Transposes a block of `side` x `side` elements; strides are in elements.

    Beyond `rows` of the source and `columns` of them in the target, the last one's place is taken.
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
    """A pointer to elements of `dtype` at an address."""
    kind = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, dtype), codegen


@intrinsic
def _take(typing_context, counters, index):
    """Counts up an int64 and returns its value before; no two threads get the same one."""

    def codegen(context, builder, signature, arguments):
        counter = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", counter, _constant(1), "monotonic")

    return types.int64(counters, types.intp), codegen


@_inline
def _transpose(side, source, source_shape, rows, target, target_shape, columns):
    """Transposes (rows, columns); blocks may reach into the room of a shape, (rows, stride)."""
    elements, turned = _pointer(source, np.float32), _pointer(target, np.float32)
    (row_room, stride), (column_room, target_stride) = source_shape, target_shape
    for r in range(0, rows, side):
        for c in range(0, columns, side):
            if r + side <= row_room and c + side <= column_room:
                block = source + (r * stride + c) * BYTES
                corner = target + (c * target_stride + r) * BYTES
                _transpose_block(side, block, stride, rows - r, corner, target_stride, columns - c)
                continue
            for i in range(r, min(r + side, rows)):
                for j in range(c, min(c + side, columns)):
                    turned[j * target_stride + i] = elements[i * stride + j]


def compile_kernel(tile: int):
    """Compiles `void kernel(int64_t *arguments)` for tiles of `tile` tokens, in about a second.

    Each thread that calls it with the same arguments takes tasks until none is left. It is kept on
    disk for as long as this file and the processor are the same.
    """
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
                _transpose(side, corner, (tile, columns), tokens, panel, (width, tile), width)
                starts = _pointer(arguments[STARTS] + c // PANEL * (rows + 1) * 4, np.int32)
                for r in range(first, stop):
                    begin, end = np.int64(starts[r]), np.int64(starts[r + 1])
                    here = sums + (r - first) * tile * BYTES
                    if c == 0:
                        _add_row(tile, True, panel, offsets, values, begin, end, here, bias[r])
                    elif begin < end:
                        zero = np.float32(0)
                        _add_row(tile, False, panel, offsets, values, begin, end, here, zero)
            height = stop - first
            for t in range(0, tokens, side):  # lines of few tokens at a time stay in the cache
                corner = y + ((token + t) * rows + first) * BYTES
                room, strip = (tile - t, rows), min(side, tokens - t)
                _transpose(side, sums + t * BYTES, (height, tile), height, corner, room, strip)

    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True)(kernel)
    except Exception:  # no folder can be written, or what Numba kept there is damaged
        return cfunc(signature)(kernel)
