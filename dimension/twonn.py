"""Intrinsic dimension by TwoNN: distances, fit, block analysis.

Source: Facco et al., Scientific Reports 7:12140, 2017. Blocks and the fraction of points as in
Ansuini et al., NeurIPS 2019.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from utils import UserError

BLOCK_COUNTS = range(1, 21)  # the points are cut into 1, 2, ..., 20 blocks
FEWEST_POINTS = 3  # the last two ratios are dropped, so a fit needs three
# A fit to few points is too high and scatters. With exponential log ratios, which TwoNN assumes, it
# gives on average 1.03 of the true dimension (scatter 0.11) in blocks of 100 points, 1.10 (0.28) of
# 20, 1.21 (0.50) of 10, 1.64 (1.6) of 5; of 3, where a single ratio is left, there is no average.
ENOUGH_POINTS = 20

DIRECT_FEATURES = 64  # up to here differences cost no more than a matrix product
PRODUCT_FEATURES = 8192  # summed in float32 before float64 takes over; narrower points: float64
RECOMPUTED_FEATURES = 1024  # of all close pairs of a point at a time
CHUNK_ELEMENTS = 2**21  # centred at a time, if that is more than a product's: 8 MB stay in cache
CENTRING_POINTS = 16  # their mean is near enough to that of all points, and quicker to take
STRIP_ON_CPU, STRIP_ON_GPU = 192, 1024  # most columns of a product, which starts at the diagonal
CLOSE = 1e-2  # squared distance over summed squared norms below which a product loses digits
NEIGHBOURS = 64  # in each point's list; in blocks of a 20th one point in six needs more


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances (n, n) in float64 between points (n, D) of any floating type.

    Symmetric to the bit, with exact zeros on the diagonal and between duplicates.
    """
    return roots_(squared_distances(points))


def roots_(squared: Tensor) -> Tensor:
    """Turns squared distances (n, n) into distances, in place, symmetric to the bit."""
    return _mirror_(squared.sqrt_())  # a vectorised root's last bit may depend on the place


def squared_distances(points: Tensor, centred: bool = False) -> Tensor:
    """Squares of `pairwise_distances`; the squares over several sets of features add up.

    They are |x|^2 + |y|^2 - 2xy of centred points, with products in float32 over `PRODUCT_FEATURES`
    features and their sums in float64. Pairs much closer than their norms are subtracted directly.
    Pairs above the diagonal are copies, because a product may sum the two in different orders.

    Args:
        points: (n, D), of any floating type.
        centred: whether the mean of the points is subtracted already. No shift changes a distance,
            but products lose digits to what all points have in common.

    Returns:
        (n, n) float64, on the device of the points, or on the CPU if that device has no float64.
    """
    if not has_float64(points.device):
        points = points.cpu()
    n, width = points.shape
    if width <= DIRECT_FEATURES:
        exact = points.double()
        result = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square_()
        return _mirror_(_require_finite(result))
    result = torch.zeros(n, n, dtype=torch.float64, device=points.device)
    with full_float32():
        for chunk in _chunks(points, centred):
            add_products_(result, chunk)
    norms = _require_finite(result.diagonal().clone())  # squared
    _recompute_(result, points, _products_to_distances_(result, norms))
    return result


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; GPUs of Apple and some of Intel do not."""
    try:
        return torch.ones(1, dtype=torch.float64, device=device).sum().item() == 1
    except (TypeError, RuntimeError):
        return False


def _require_finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise UserError("values are NaN, infinite, or too large for their squares in float32")
    return values


def _chunks(points: Tensor, centred: bool) -> Iterator[Tensor]:
    """Centred chunks of the features; in float64 if there are few."""
    n, width = points.shape
    dtype = torch.float64 if width <= PRODUCT_FEATURES else torch.float32
    size = PRODUCT_FEATURES * max(1, CHUNK_ELEMENTS // (n * PRODUCT_FEATURES))
    chunks = points.split(size, dim=1)
    if centred:
        yield from (features.to(dtype) for features in chunks)
        return
    buffer = torch.empty(n, min(size, width), dtype=dtype, device=points.device)
    for features in chunks:
        centre = features[:: max(1, n // CENTRING_POINTS)].mean(0)
        yield torch.sub(features, centre, out=buffer[:, : features.shape[1]])


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiplies and convolves in float32 proper: no TF32 on a GPU, no bfloat16 on a CPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # true by default, for convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def add_products_(gram: Tensor, chunk: Tensor) -> None:
    """Adds chunk @ chunk.T to `gram` (n, n): in each strip, whose rows begin at the diagonal."""
    for down, columns in strips(gram):
        target = gram[down, columns]
        product = torch.empty(target.shape, dtype=chunk.dtype, device=chunk.device)
        for features in chunk.split(PRODUCT_FEATURES, dim=1):
            target += torch.mm(features[down], features[columns].T, out=product)


def strips(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of strips that cover the lower half of a symmetric matrix (n, n).

    A strip is a few neighbouring columns, in the rows from the diagonal down. At least two strips
    keep half a matrix from being computed as a whole one.
    """
    n = len(matrix)
    width = min(STRIP_ON_CPU if matrix.device.type == "cpu" else STRIP_ON_GPU, -(-n // 2))
    for left in range(0, n, width):
        yield slice(left, n), slice(left, left + width)


def _mirror_(matrix: Tensor) -> Tensor:
    """Copies what is below the diagonal to its place above, and zeroes the diagonal, in place."""
    for down, columns in strips(matrix):
        square = matrix[columns, columns].tril_(-1)  # at the strip's upper end
        square += square.T.clone()
        matrix[columns, down] = matrix[down, columns].T.clone()
    return matrix


def _products_to_distances_(gram: Tensor, norms: Tensor) -> Tensor:
    """Turns products, filled in the strips, into the full matrix of squared distances.

    Returns (n, n) bool, true above the diagonal only: the pairs too close for a product.
    """
    close = torch.zeros_like(gram, dtype=torch.bool)
    for down, columns in strips(gram):
        both = norms[down, None] + norms[columns]
        squared = gram[down, columns]
        squared.mul_(-2).add_(both)
        torch.lt(squared, both.mul_(CLOSE), out=close[down, columns])
        squared.clamp_(min=0)
    _mirror_(gram)
    return close.tril_(-1).T


def _recompute_(squared: Tensor, points: Tensor, close: Tensor) -> None:
    """Replaces the close pairs' squared distances by sums of squared differences in float64."""
    original = torch.arange(len(points), device=points.device)
    for i in close.any(1).nonzero().flatten().tolist():
        if original[i] != i:
            continue  # a duplicate has the distances of the point it repeats
        others = close[i].nonzero().flatten()
        exact = torch.zeros(len(others), dtype=torch.float64, device=points.device)
        for features in torch.split(points, RECOMPUTED_FEATURES, dim=1):
            exact += (features[others].double() - features[i].double()).square_().sum(1)
        squared[i, others] = squared[others, i] = exact
        original[others[exact == 0]] = i
    repeats = (original != torch.arange(len(points), device=points.device)).nonzero().flatten()
    squared[repeats] = squared[original[repeats]]
    squared[:, repeats] = squared[:, original[repeats]]


class BlockAnalysis(NamedTuple):
    """The dimension at several scales: b blocks of n / b points, b = 1, ..., 20.

    A level is the analysis at one number of blocks. A block without three usable points is left
    out; a level without any block left is NaN. If all points are equal, the dimension is 0.

    Attributes:
        mean: (20,) float64, mean dimension of the b blocks.
        std: (20,) float64, population standard deviation over the blocks.
        points: Points used when there is one block.
        duplicates: Points dropped there because their nearest neighbour is a duplicate.
    """

    mean: Tensor
    std: Tensor
    points: int
    duplicates: int

    @property
    def id(self) -> float:
        """The intrinsic dimension: the average of the levels; NaN if there is none."""
        return self.mean.nanmean().item()

    @property
    def error(self) -> float:
        """The error bar: the standard deviation at the most blocks; NaN if that is one block."""
        levels = (~self.std.isnan()).nonzero().flatten().tolist()
        if not levels or (levels[-1] == 0 and self.id > 0):
            return math.nan
        return self.std[levels[-1]].item()


def estimate_id(distances: Tensor, fraction: float = 1.0) -> float:
    """TwoNN dimension: the slope of -log(1 - F) against log(r2 / r1) through the origin.

    Args:
        distances: (n, n).
        fraction: share of the usable points, in (0, 1]: the smallest ratios are fitted. The paper's
            profiles have 1, Ansuini et al. use 0.9.

    Returns:
        NaN if fewer than three points have two neighbours at different, positive distances.
    """
    nearest, _ = _nearest_neighbours(distances, 2)
    return _slope(nearest, fraction).item()


def draw_permutations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """(20, n) random orders of the points, for `block_analysis`."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in BLOCK_COUNTS])


def block_analysis(
    distances: Tensor,
    fraction: float = 1.0,
    permutations: Tensor | None = None,
    generator: torch.Generator | None = None,
    fewest: int = FEWEST_POINTS,
) -> BlockAnalysis:
    """Dimension of all points, of random halves, thirds, ..., twentieths.

    Each point's first two neighbours inside its block are looked up in a list of its nearest
    points, so that no block's distances are gathered or sorted.

    Args:
        distances: (n, n).
        fraction: as in `estimate_id`.
        permutations: (20, n); the first b * (n // b) entries of row b - 1 are cut into b blocks.
            Drawn at random if not given.
        generator: CPU generator for that draw.
        fewest: points of a block; levels with smaller blocks are left out, but never all points
            together. The default is the original's rule: whatever can be fitted.
    """
    n = len(distances)
    if permutations is None:
        permutations = draw_permutations(n, generator)
    permutations = permutations.to(distances.device)
    values, indices = _nearest_neighbours(distances, NEIGHBOURS)
    mean, std = torch.full((2, len(BLOCK_COUNTS)), math.nan, dtype=torch.float64)
    for level, count in enumerate(BLOCK_COUNTS):
        size = n // count
        if size < (fewest if level else FEWEST_POINTS):
            break
        blocks = permutations[level, : count * size].view(count, size)
        nearest = _nearest_in_block(distances, values, indices, blocks)
        slopes = _slope(nearest[blocks], fraction)
        slopes = slopes[~slopes.isnan()]
        if len(slopes):
            mean[level], std[level] = slopes.mean(), slopes.std(correction=0)
    if not distances[:1].any():  # all equal the first, which the lists cannot tell
        mean[0] = std[0] = 0
    r1, r2 = values[:, :2].unbind(1) if n >= FEWEST_POINTS else values.new_zeros(2, 0)
    return BlockAnalysis(mean, std, int(((r1 > 0) & (r2 > r1)).sum()), int((r1 == 0).sum()))


def _nearest_neighbours(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices, (n, at most k), of each point's nearest other points, ascending."""
    others = distances.clone().fill_diagonal_(math.inf)
    return others.topk(min(k, len(distances) - 1), largest=False)


def _nearest_in_block(distances: Tensor, values: Tensor, indices: Tensor, blocks: Tensor) -> Tensor:
    """Distances (n, 2) to each point's first two neighbours inside its block.

    Args:
        distances: (n, n).
        values: (n, k) distances to the nearest neighbours, ascending.
        indices: (n, k) numbers of these neighbours.
        blocks: (b, m) points; the rows of other points are meaningless.
    """
    count, size = blocks.shape
    label = torch.full((len(distances),), -1, dtype=torch.int8, device=distances.device)
    label[blocks] = torch.arange(count, dtype=torch.int8, device=distances.device)[:, None]
    same = label[indices] == label[:, None]  # (n, k)
    first = same.int().argmax(1, keepdim=True)
    same.scatter_(1, first, False)
    second = same.int().argmax(1, keepdim=True)
    nearest = values.gather(1, torch.cat([first, second], 1))
    # fewer than two on the list: look at the whole block
    missing = (~same.gather(1, second)[:, 0] & (label >= 0)).nonzero()  # (r, 1)
    members = blocks[label[missing[:, 0]].long()]  # (r, m)
    whole = distances[missing, members].masked_fill(members == missing, math.inf)
    nearest[missing[:, 0]] = whole.topk(2, largest=False).values
    return nearest


def _slope(nearest: Tensor, fraction: float) -> Tensor:
    """Slopes (...) of -log(1 - F) against log(r2 / r1), given r1 and r2 of m points (..., m, 2)."""
    r1, r2 = nearest.unbind(-1)
    usable = (r1 > 0) & (r2 > r1)
    x = torch.where(usable, r2 / r1, math.inf).sort().values.log()
    count = usable.sum(-1, keepdim=True)
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    fitted = rank <= torch.minimum(count - 2, (count * fraction).floor())
    y = -torch.log1p(-rank / count).masked_fill(~fitted, 0)
    x = x.masked_fill(~fitted, 0)
    return (x * y).sum(-1) / x.square().sum(-1)
