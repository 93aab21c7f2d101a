"""Intrinsic dimension: distances, estimators, block analysis.

Blocks and TwoNN's fraction of points as in Ansuini et al., NeurIPS 2019.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import UserError

BLOCK_COUNTS = range(1, 21)  # the points are cut into 1, 2, ..., 20 blocks
FEWEST_POINTS = 3  # the last two ratios are dropped, so a fit needs three
# A fit to few points is too high and scatters. With exponential log ratios, which TwoNN assumes, it
# gives on average 1.03 of the true dimension (scatter 0.11) in blocks of 100 points, 1.10 (0.28) of
# 20, 1.21 (0.50) of 10, 1.64 (1.6) of 5; of 3, where a single ratio is left, there is no average.
ENOUGH_POINTS = 20
MOST_NEIGHBOURS = 20  # that any estimator asks for: scikit-dimension's default of the MLE
GRIDE_NEIGHBOURS = 4  # k, of which 2k is in the smallest block
NEWTON_STEPS = 4  # three give all digits, of heavy tails, too

DIRECT_FEATURES = 64  # up to here differences cost no more than a matrix product
PRODUCT_FEATURES = 8192  # summed in float32 before float64 takes over; narrower points: float64
RECOMPUTED_FEATURES = 1024  # of all close pairs of a point at a time
CHUNK_ELEMENTS = 2**21  # centred at a time, if that is more than a product's: 8 MB stay in cache
STRIP_ON_CPU, STRIP_ON_GPU = 192, 1024  # most columns of a product, which starts at the diagonal
CENTRING_POINTS = 16  # their mean is near enough to that of all points, and quicker to take
ROWS = 64  # of a block, in which neighbours are sought at a time: 1 MB of 2000 points
CLOSE = 1e-2  # squared distance over summed squared norms below which a product loses digits


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances (n, n) in float64 between points (n, D) of any floating type.

    Symmetric to the bit, with exact zeros on the diagonal and between duplicates.
    """
    return roots_(squared_distances(points))


def roots_(squared: Tensor) -> Tensor:
    """Turns squared distances (n, n) into distances, in place, symmetric to the bit."""
    return _mirror_(squared.sqrt_())  # a vectorised root's last bit may depend on the place


def squared_distances(points: Tensor, centred: bool = False) -> Tensor:
    """Squares of `pairwise_distances`, on the CPU where the device of the points has no float64.

    They add up over several sets of features. They are |x|^2 + |y|^2 - 2xy of centred points, with
    products in float32 over `PRODUCT_FEATURES` features and sums in float64. Pairs much closer than
    their norms are subtracted directly. Pairs above the diagonal are copies, because a product may
    sum the two in different orders. If the points are `centred` already, no mean is subtracted;
    products lose digits to what all points have in common.
    """
    if not has_float64(points.device):
        points = points.cpu()
    n, width = points.shape
    if width <= DIRECT_FEATURES:
        exact = points.double()
        result = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square_()
        return _mirror_(_require_finite(result))
    result = torch.zeros(n, n, dtype=torch.float64, device=points.device)
    dtype = torch.float64 if width <= PRODUCT_FEATURES else torch.float32
    size = PRODUCT_FEATURES * max(1, CHUNK_ELEMENTS // (n * PRODUCT_FEATURES))
    with full_float32():
        for features in points.split(size, dim=1):
            if not centred:
                features = features - features[:: max(1, n // CENTRING_POINTS)].mean(0)
            add_products_(result, features.to(dtype))
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
    """Strips, neighbouring columns from the diagonal down: a symmetric matrix's lower half.

    At least two keep half a matrix from being computed as a whole one.
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
    `mean` and the population standard deviation `std` over the blocks are (20,) float64. In one
    block, `points` have two neighbours at different distances; `duplicates` repeat another point.
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


def estimate_id(distances: Tensor, fraction: float = 1.0, estimator: str = "twonn") -> float:
    """The dimension of all points by a key of `ESTIMATORS`; NaN if fewer than three are usable.

    TwoNN fits a fraction, in (0, 1], of the usable points of distances (n, n): the smallest ratios.
    The paper's profiles have 1, Ansuini et al. use 0.9.
    """
    if len(distances) < FEWEST_POINTS:
        return math.nan
    every = torch.arange(len(distances), device=distances.device)[None]
    return ESTIMATORS[estimator](_nearest_in_blocks(distances, every), fraction).item()


def draw_permutations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """(20, n) random orders of the points, for `block_analysis`."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in BLOCK_COUNTS])


def block_analysis(
    distances: Tensor,
    fraction: float = 1.0,
    permutations: Tensor | None = None,
    generator: torch.Generator | None = None,
    fewest: int = FEWEST_POINTS,
    estimator: str = "twonn",
) -> BlockAnalysis:
    """Dimension of all points, of random halves, thirds, ..., twentieths.

    Args:
        distances: (n, n).
        fraction: as in `estimate_id`.
        permutations: (20, n); the first b * (n // b) entries of row b - 1 are cut into b blocks.
            Drawn at random if not given.
        generator: CPU generator for that draw.
        estimator: as in `estimate_id`.
        fewest: points of a block; levels with smaller blocks are left out, but never all points
            together. The default is the original's rule: whatever can be fitted.
    """
    if permutations is None:
        permutations = draw_permutations(len(distances), generator)
    return block_analyses(distances, permutations, fewest, fraction, (estimator,))[estimator]


def block_analyses(
    distances: Tensor, permutations: Tensor, fewest: int, fraction: float, estimators: Iterable[str]
) -> dict[str, BlockAnalysis]:
    """`block_analysis` by several estimators, which share the search for neighbours."""
    n, r = len(distances), distances.new_zeros(0, 2)
    empty = torch.full((2, len(BLOCK_COUNTS)), math.nan, dtype=torch.float64)
    found = {name: empty.clone() for name in estimators}
    for level, count in enumerate(BLOCK_COUNTS):
        size = n // count
        if size < (fewest if level else FEWEST_POINTS):
            break
        blocks = permutations[level, : count * size].view(count, size).sort(1).values
        nearest = _nearest_in_blocks(distances, blocks.to(distances.device))
        r = r if level else nearest[0]
        for name, levels in found.items():
            values = ESTIMATORS[name](nearest, fraction)
            values = values[~values.isnan()]
            if len(values):
                levels[:, level] = torch.stack([values.mean(), values.std(correction=0)])
    if not distances[:1].any():  # all equal the first, which no estimator can tell
        for levels in found.values():
            levels[:, 0] = 0
    points, duplicates = int(((r[:, 0] > 0) & (r[:, 1] > r[:, 0])).sum()), int((r[:, 0] == 0).sum())
    return {name: BlockAnalysis(*levels, points, duplicates) for name, levels in found.items()}


def _nearest_in_blocks(distances: Tensor, blocks: Tensor) -> Tensor:
    """Distances (b, m, at most 20) of points, (b, m) ascending, to the nearest in their block."""
    k = min(MOST_NEIGHBOURS + 1, blocks.shape[1])  # each point comes first itself
    if distances.device.type != "cpu":
        inside = distances[blocks[:, :, None], blocks[:, None, :]]
        return inside.topk(k, largest=False).values[..., 1:]
    nearest = np.empty((*blocks.shape, k))
    for block, found in zip(blocks.numpy(), nearest, strict=True):
        for start in range(0, len(block), ROWS):
            rows = slice(start, start + ROWS)
            inside = distances.numpy().take(block[rows], 0)
            inside = inside.take(block, 1) if len(blocks) > 1 else inside
            inside.partition(k - 1)  # several times as fast as topk
            found[rows] = inside[:, :k]
    nearest.sort()
    return torch.from_numpy(nearest[..., 1:])


def two_nn(nearest: Tensor, fraction: float = 1.0) -> Tensor:
    """TwoNN: the slope of -log(1 - F) against log(r2 / r1) through the origin, but for two ratios.

    Source: Facco et al., Scientific Reports 7:12140, 2017.

    Args:
        nearest: (..., m, k), distances of m points to their k nearest neighbours, ascending.
        fraction: as in `estimate_id`; other estimators take all points.

    Returns:
        (...), NaN with fewer than three usable points: those with r2 > r1 > 0.
    """
    r1, r2 = nearest[..., 0], nearest[..., 1]
    usable = (r1 > 0) & (r2 > r1)
    x = torch.where(usable, r2 / r1, math.inf).sort().values.log()
    count = usable.sum(-1, keepdim=True)
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    fitted = rank <= torch.minimum(count - 2, (count * fraction).floor())
    y = -torch.log1p(-rank / count).masked_fill(~fitted, 0)
    x = x.masked_fill(~fitted, 0)
    return (x * y).sum(-1) / x.square().sum(-1)


def gride(nearest: Tensor, fraction: float = 1.0) -> Tensor:
    """Gride: the most likely dimension given mu = r8 / r4; of fewer neighbours r_2k / r_k.

    Source: Denti et al., Scientific Reports 12:20005, 2022, whose log-likelihood has the derivative
    sum(1 / d + (k - 1) x / (1 - mu^-d) - (2k - 1) x), x = log mu. It is convex and rises in 1 / d,
    almost in a line, so that Newton's steps come to its root from anywhere; they begin at that of
    its asymptote. Usable points have r_1 > 0 and r_2k > r_k.
    """
    k = min(GRIDE_NEIGHBOURS, nearest.shape[-1] // 2)
    near, far = nearest[..., k - 1], nearest[..., 2 * k - 1]
    usable = (nearest[..., 0] > 0) & (far > near)
    x = torch.where(usable, far / near, math.e).log()  # (..., m)
    taken = x * usable
    count, total = usable.sum(-1), taken.sum(-1)
    inverse = (3 * k - 1) / (2 * k) * total / count
    for _ in range(NEWTON_STEPS):
        rest = torch.exp(x / -inverse[..., None])  # mu^-d
        terms = taken / (1 - rest)
        value = count * inverse + (k - 1) * terms.sum(-1) - (2 * k - 1) * total
        slope = count + (k - 1) * (rest * terms.square()).sum(-1) / inverse.square()
        inverse = inverse - value / slope
    return (1 / inverse).masked_fill(count < FEWEST_POINTS, math.nan)


def mle(nearest: Tensor, fraction: float = 1.0) -> Tensor:
    """Maximum likelihood: 1 / d is the mean over points and j < k of log(r_k / r_j), k = 20 or all.

    Source: Levina & Bickel, NeurIPS 2004; the mean of the inverse as MacKay & Ghahramani, 2005.
    Usable points have r_k > r_1 > 0.
    """
    usable = (nearest[..., 0] > 0) & (nearest[..., -1] > nearest[..., 0])
    logs = torch.where(usable[..., None], nearest, 1).log()
    inverse = (logs[..., -1:] - logs[..., :-1]).mean(-1)
    count = usable.sum(-1)
    return (count / inverse.sum(-1)).masked_fill(count < FEWEST_POINTS, math.nan)


ESTIMATORS = {"twonn": two_nn, "gride": gride, "mle": mle}
