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

from sparse.compiling import kept_on_disk
from sparse.product import (
    BIAS,
    BYTES,
    COLUMNS,
    NEXT_TASK,
    NEXT_THREAD,
    OFFSETS,
    PANEL,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    STARTS,
    TASK_COUNT,
    TASKS,
    VALUES,
    X,
    Y,
)

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


def _loop(builder, start, stop, step: int, sums: list, body):
    """Counts from `start` while below `stop`; `body(j, sums)` gives the next sums.

    Returns:
        The first index that was not reached, and the sums.
    """
    before = builder.block
    test, inside, after = (
        builder.function.append_basic_block(name) for name in ("test", "inside", "after")
    )
    builder.branch(test)
    builder.position_at_end(test)
    j = builder.phi(_I64)
    j.add_incoming(start, before)
    phis = [builder.phi(value.type) for value in sums]
    for phi, value in zip(phis, sums, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", j, stop), inside, after)
    builder.position_at_end(inside)
    for phi, value in zip(phis, body(j, phis), strict=True):
        phi.add_incoming(value, inside)
    j.add_incoming(builder.add(j, _constant(step)), inside)
    builder.branch(test)
    builder.position_at_end(after)
    return j, phis


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

        def walk(step: int):
            def body(j, sums):
                sums = list(sums)
                for chain in range(step):
                    at = builder.add(j, _constant(chain))
                    column = builder.zext(builder.load(builder.gep(offsets, [at])), _I64)
                    value = _splat(builder, builder.load(builder.gep(values, [at])), vector)
                    source = builder.gep(x, [builder.mul(column, _constant(size))])
                    for i in range(count):
                        tokens = _load(builder, source, _constant(i * lanes), vector)
                        k = chain * count + i
                        sums[k] = builder.call(fma, [value, tokens, sums[k]])
                return sums

            return body

        if begins:
            sums = [_splat(builder, bias, vector)] * count
        else:
            sums = [_load(builder, y, _constant(i * lanes), vector) for i in range(count)]
        if chains > 1:
            sums += [ir.Constant(vector, [0.0] * lanes)] * (count * (chains - 1))
            limit = builder.sub(stop, _constant(chains - 1))
            start, sums = _loop(builder, start, limit, chains, sums, walk(chains))
            while len(sums) > count:
                half = len(sums) // 2
                sums = [builder.fadd(a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        _, sums = _loop(builder, start, stop, 1, sums, walk(1))
        for i, value in enumerate(sums):
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


def _reader(ir_type, numba_type):
    """An intrinsic that reads element `index` of an array at an address."""

    @intrinsic
    def read(typing_context, address, index):
        def codegen(context, builder, signature, arguments):
            base = builder.inttoptr(arguments[0], ir_type.as_pointer())
            return builder.load(builder.gep(base, [arguments[1]]))

        return numba_type(types.intp, types.intp), codegen

    return read


_read_i64 = _reader(_I64, types.int64)
_read_i32 = _reader(_I32, types.int32)
_read_f32 = _reader(_F32, types.float32)


@intrinsic
def _copy_element(typing_context, source, target):
    """Copies a float32 from one address to another."""

    def codegen(context, builder, signature, arguments):
        source, target = (builder.inttoptr(a, _F32.as_pointer()) for a in arguments)
        builder.store(builder.load(source), target)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _take(typing_context, address):
    """Counts up the int64 at an address, and returns what it was; no two threads get the same."""

    def codegen(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", counter, _constant(1), "monotonic")

    return types.int64(types.intp), codegen


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
    for t in range(tile):
        row = x + min(t, tokens - 1) * stride * BYTES
        for c in range(whole, columns):
            _copy_element(row + c * BYTES, target + (c * tile + t) * BYTES)


@_inline
def _to_tokens(side, tile, source, rows, y, stride, tokens):
    """Transposes (rows, tile) to `tokens` rows of `rows` elements."""
    whole = rows - rows % side
    for r in range(0, whole, side):
        for t in range(0, tokens, side):
            block = source + (r * tile + t) * BYTES
            corner = y + (t * stride + r) * BYTES
            _transpose(side, block, tile, side, corner, stride, min(tokens - t, side))
    for r in range(whole, rows):
        for t in range(tokens):
            _copy_element(source + (r * tile + t) * BYTES, y + (t * stride + r) * BYTES)


def compile_kernel(tile: int) -> int:
    """The address of a C function `void kernel(int64_t *arguments)` for tiles of `tile` tokens.

    Every thread that calls it with the same arguments takes tasks until none is left. It is
    compiled in about a second and kept on disk, for as long as this file and the processor are the
    same; where no folder can be written it is compiled anew in each process.
    """
    return kept_on_disk(cfunc, _kernel(tile), types.void(types.intp)).address


def _kernel(tile: int):
    side = min(tile, BLOCK)

    def kernel(arguments):
        x, columns = _read_i64(arguments, X), _read_i64(arguments, COLUMNS)
        rows = _read_i64(arguments, ROWS)
        y, bias = _read_i64(arguments, Y), _read_i64(arguments, BIAS)
        starts, offsets = _read_i64(arguments, STARTS), _read_i64(arguments, OFFSETS)
        values, tasks = _read_i64(arguments, VALUES), _read_i64(arguments, TASKS)
        thread = _take(arguments + NEXT_THREAD * 8)
        panel = _read_i64(arguments, SCRATCH) + thread * _read_i64(arguments, SCRATCH_BYTES)
        sums = panel + PANEL * tile * BYTES  # (rows of the task, tile)
        while True:
            task = _take(arguments + NEXT_TASK * 8)
            if task >= _read_i64(arguments, TASK_COUNT):
                return
            token, tokens = _read_i64(tasks, task * 4), _read_i64(tasks, task * 4 + 1)
            first, stop = _read_i64(tasks, task * 4 + 2), _read_i64(tasks, task * 4 + 3)
            for c in range(0, columns, PANEL):
                width = min(PANEL, columns - c)
                corner = x + (token * columns + c) * BYTES
                _to_features(side, tile, corner, columns, tokens, width, panel)
                starts_here = starts + c // PANEL * (rows + 1) * 4
                for r in range(first, stop):
                    begin = np.int64(_read_i32(starts_here, r))
                    end = np.int64(_read_i32(starts_here, r + 1))
                    here = sums + (r - first) * tile * BYTES
                    if c == 0:
                        value = _read_f32(bias, r)
                        _add_row(tile, True, panel, offsets, values, begin, end, here, value)
                    elif begin < end:
                        zero = np.float32(0)
                        _add_row(tile, False, panel, offsets, values, begin, end, here, zero)
            corner = y + (token * rows + first) * BYTES
            _to_tokens(side, tile, sums, stop - first, corner, rows, tokens)

    return kernel
