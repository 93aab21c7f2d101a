"""The compiled loop that puts the elements of a compressed tensor in their places."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from sparse.compiling import kept_on_disk

_ONE, _WORD = np.uint64(1), np.uint64(64)


@intrinsic
def _lowest_bit(typing_context, word):
    """The place of the lowest bit that is set, of a uint64 that is not zero."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


def _expand(words, values, first, target):
    """Writes zeros, and for each bit that is set the next of `values`, from place `first` on.

    Args:
        words: uint64, for 64 elements of `target` each; no bit beyond its last element is set.
        values: at least as many from `first` on as bits are set; neither is checked.
        first: place in `values`.
        target: changed in place, of the values' type.
    """
    place = np.uint64(first)
    for i in range(np.uint64(len(words))):  # unsigned, for Numba lets a signed index be negative
        word, start = words[i], i * _WORD
        elements = target[start : start + _WORD]
        for k in range(np.uint64(len(elements))):
            elements[k] = 0
        while word:
            elements[_lowest_bit(word)] = values[place]
            place += _ONE
            word &= word - _ONE


expand = kept_on_disk(njit, _expand, nogil=True)
