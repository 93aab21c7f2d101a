"""A sparse matrix in memory."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PANEL = 256  # columns; a panel of a tile stays in the cache, and a column of it fits in a byte


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


@torch.library.custom_op("sparse::decompress", mutates_args=())
def decompress(starts: Tensor, offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix (rows, columns) of a `SparseMatrix`."""
    panels, rows = starts.shape[0], starts.shape[1] - 1
    first = torch.arange(panels, device=starts.device)[:, None] * PANEL
    first = first + torch.arange(rows, device=starts.device) * columns  # of a panel's row
    places = first.flatten().repeat_interleave(starts.diff().flatten()) + offsets
    return values.new_zeros(rows * columns).index_copy_(0, places, values).view(rows, columns)


@decompress.register_fake
def _(starts, offsets, values, columns):
    return values.new_empty(starts.shape[1] - 1, columns)
