"""Distances, TwoNN and block analysis against goldens, exact arithmetic and known manifolds.

Bounds follow from the roundings that a result may have suffered, in any order of summation, so they
hold on every processor. A sum of k products of either sign is off by at most k roundings of the sum
of their absolute values.
"""

import math

import numpy as np
import pytest
import torch

from dimension.twonn import (
    BLOCK_COUNTS,
    CENTRING_POINTS,
    CLOSE,
    PRODUCT_FEATURES,
    block_analysis,
    estimate_id,
    pairwise_distances,
    squared_distances,
)
from tests.conftest import GOLDEN

CLOUDS = ["gauss5in20", "swiss", "sphere9", "highdim", "duplicates", "grid"]
WIDE = 10_000  # features: products in float32, in several chunks
ROUNDING32, ROUNDING64 = 2.0**-24, 2.0**-53  # at most, relative to the result of an operation


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "twonn.npz").items()}


def direct_distances(points):
    """Off by at most (D / 2 + 2) `ROUNDING64`: a difference, a square, D sums; a root halves it."""
    exact = points.double()
    return torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")


def relative_error(found, expected):
    apart = expected > 0
    return ((found - expected).abs()[apart] / expected[apart]).max().item()


def product_error(points, rounding=ROUNDING32):
    """How far a distance by products may be off, relative to itself.

    A centred point x is rounded by `rounding` |x|, which moves the distance by as much. The sums
    behind |x|^2, |y|^2 and 2xy of k features in one product are off by at most k roundings of
    |x|^2 + |y|^2 + 2 sum |x_i y_i|, at most 2 (|x|^2 + |y|^2); for the distance, divide by 2 d.
    Pairs for which that would be much are not left to products.
    """
    features = min(points.shape[1], PRODUCT_FEATURES)
    exact = points.double()
    centred = exact - exact[:: max(1, len(points) // CENTRING_POINTS)].mean(0)
    norms = centred.square().sum(1)
    ratio = (norms[:, None] + norms) / direct_distances(points).square().fill_diagonal_(math.inf)
    worst = ratio[ratio * CLOSE <= 1].max().item()
    return rounding * (features * worst + math.sqrt(2 * worst))


def rounding_of_levels(distances, permutations, fraction, error):
    """How far a level's mean and standard deviation (20,) may be off.

    An `error` of distances, relative to them, moves an x = log(r2 / r1) by at most 2 errors, also
    after sorting: then sum(xy) moves by 2 errors * sum(y), sum(xx) by 4 errors * sum(x). An x below
    2 errors may become a tie, which is dropped: then every y moves by log(m / (m - 1)). In both
    analyses the sums over m points, of terms of one sign, have some 20 roundings a term and m more.
    A standard deviation moves by no more than the values move.
    """
    bounds = torch.zeros(len(BLOCK_COUNTS), dtype=torch.float64)
    for level, count in enumerate(BLOCK_COUNTS):
        size = len(distances) // count
        for block in permutations[level, : count * size].view(count, size):
            nearest = distances[block][:, block].topk(3, largest=False).values  # itself first
            r1, r2 = nearest[:, 1:].unbind(1)
            x = (r2 / r1)[(r1 > 0) & (r2 > r1)].log().sort().values
            m = len(x)
            x = x[: min(m - 2, int(m * fraction))]
            y = -torch.log1p(-torch.arange(1, len(x) + 1, dtype=torch.float64) / m)
            slope = x @ y / (x @ x)
            ties = (x <= 2 * error).sum() * math.log(m / (m - 1))
            moved = 2 * error * y.sum() + ties * x.sum() + 4 * error * slope * x.sum()
            moved = moved / (x @ x) + 4 * (m + 20) * ROUNDING64 * slope
            bounds[level] = max(bounds[level], moved)
    return bounds


@pytest.mark.parametrize("fraction", [1.0, 0.9])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_golden(golden, cloud, fraction):
    points, permutations = golden[f"{cloud}.points"], golden[f"{cloud}.permutations"]
    distances = pairwise_distances(points)
    error = product_error(points, ROUNDING64) + (points.shape[1] / 2 + 2) * ROUNDING64  # golden's
    bounds = rounding_of_levels(distances, permutations, fraction, error)
    expected = golden[f"{cloud}.id_fraction_{fraction}"].item()
    assert estimate_id(distances, fraction) == pytest.approx(expected, abs=bounds[0].item(), rel=0)
    found = block_analysis(distances, fraction, permutations)
    mean = golden[f"{cloud}.block_mean_fraction_{fraction}"]
    std = golden[f"{cloud}.block_std_fraction_{fraction}"]
    assert ((found.mean - mean).abs() <= bounds).all()
    assert ((found.std - std).abs() <= bounds).all()
    assert found.id == pytest.approx(mean.mean().item(), abs=bounds.mean().item(), rel=0)
    assert found.error == found.std[-1].item()


@pytest.mark.parametrize(("n", "width"), [(48, 700), (208, WIDE), (48, 2**17), (8, WIDE)])
def test_exact_where_products_are(n, width):
    """Integers about an integer centre: no sum up to 45^2 * 8192 < 2^24 is rounded in any order.

    It would be if points were not centred, or summed in float32 over more features than that.
    """
    assert 45**2 * PRODUCT_FEATURES < 2**24
    half = torch.randint(-45, 46, (n // 2, width)).float()
    centre = torch.randint(-300, 301, (width,))
    points = torch.cat([half, -half]) + centre  # so is the mean of those that centre the product
    assert torch.equal(points[:: max(1, n // CENTRING_POINTS)].mean(0), centre.float())
    products = points.double() @ points.double().T  # below 2^53
    norms = products.diagonal()
    assert torch.equal(squared_distances(points), norms[:, None] + norms - 2 * products)


@pytest.mark.parametrize(("n", "width"), [(50, 3), (410, 700), (210, WIDE), (50, 2**17), (8, WIDE)])
def test_distances_far_from_the_origin(n, width):
    points = torch.randn(n, width) + 100 * torch.randn(width)
    found = pairwise_distances(points)
    assert found.dtype == torch.float64
    assert relative_error(found, direct_distances(points)) <= product_error(points)
    assert torch.equal(found, found.T) and not found.diagonal().any()


def test_clusters_much_smaller_than_their_distances():
    cluster = torch.arange(60) % 4  # none has all of the points whose mean is the centre
    points = (100 * torch.randn(4, WIDE))[cluster] + 0.01 * torch.randn(60, WIDE)
    found, expected = pairwise_distances(points), direct_distances(points)
    within = cluster[:, None] == cluster  # differences, as in `direct_distances`
    assert relative_error(found[within], expected[within]) <= (WIDE + 4) * ROUNDING64
    assert relative_error(found, expected) <= product_error(points)


def test_duplicates_are_exact_zeros():
    points = torch.randn(40, WIDE) + 30
    points[[7, 21, 39]] = points[3].clone()
    points[11] = points[10].clone()
    points[13] = points[12] * (1 + 2**-22)  # nearly
    found, expected = pairwise_distances(points), direct_distances(points)
    assert torch.equal(found == 0, expected == 0)
    assert (found == 0).sum() == 40 + 4 * 3 + 2
    squared = squared_distances(points)
    assert torch.equal(squared[7], squared[3])  # copied
    close = expected[12, 13].item()  # both are sums of squares of differences in float64
    assert found[12, 13] == pytest.approx(close, rel=(WIDE + 4) * ROUNDING64, abs=0)


def test_one_point_has_dimension_zero():
    found = block_analysis(pairwise_distances(torch.full((80, WIDE), 0.1)))
    assert (found.id, found.error, found.points, found.duplicates) == (0, 0, 0, 80)


@pytest.mark.parametrize(("n", "width"), [(2, 2), (80, 2), (300, WIDE)])
def test_two_points_repeated_have_no_dimension(n, width):
    """Also where a point's whole list of neighbours repeats it."""
    found = block_analysis(pairwise_distances(torch.eye(2, width)[torch.arange(n) % 2]))
    assert math.isnan(found.id) and math.isnan(found.error)
    assert (found.points, found.duplicates) == (0, n if n > 2 else 0)


def test_ties_are_dropped():
    lattice = torch.cartesian_prod(*[torch.arange(5.0)] * 3)  # every r1 equals its r2
    distances = pairwise_distances(lattice)
    assert math.isnan(estimate_id(distances))
    found = block_analysis(distances)
    assert (found.points, found.duplicates) == (0, 0)


@pytest.mark.parametrize(
    ("value", "width"), [(math.nan, 10), (math.inf, 10), (math.nan, WIDE), (1e30, WIDE)]
)
def test_values_that_are_not_finite_or_too_large(value, width):
    points = torch.randn(9, width)
    points[4, 5] = value
    with pytest.raises(ValueError, match="NaN, infinite, or too large"):
        pairwise_distances(points)


def test_full_float32_whatever_the_setting(monkeypatch):
    used, mm = [], torch.mm

    def spy(*args, **options):
        used.append(torch.get_float32_matmul_precision())
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        pairwise_distances(torch.randn(9, WIDE))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(used) == {"highest"}


# The slope for m independent ratios scatters by 1.1 / sqrt(m) of the dimension. Two points that are
# each other's nearest share r1, so n points count as n / 2 at least; four standard deviations.
SCATTER = 4 * 1.1 / math.sqrt(1500 / 2)


@pytest.mark.parametrize(("dimension", "width"), [(1, 300), (2, 300), (4, WIDE)])
def test_torus(dimension, width):
    """Without an edge, where neighbours would be missing and estimates too low."""
    angles = 2 * math.pi * torch.rand(1500, dimension)
    points = torch.cat([angles.cos(), angles.sin()], 1) @ torch.randn(2 * dimension, width)
    assert estimate_id(pairwise_distances(points)) == pytest.approx(dimension, rel=SCATTER)


def test_estimate_by_hand():
    """Points 0, 1, 3, 7, 15 of a line: ratios 3, 2, 3/2, 3/2 (7: 4 and 6), 3/2 (15: 8 and 12).

    The few terms, all positive, have some 25 roundings on either side.
    """
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
    distances, bound = pairwise_distances(points), 50 * ROUNDING64
    x = np.log([1.5, 1.5, 1.5])  # of five, the last two are dropped
    y = -np.log([4 / 5, 3 / 5, 2 / 5])
    expected = (x * y).sum() / (x * x).sum()
    assert estimate_id(distances) == pytest.approx(expected, rel=bound)
    kept = 2  # floor(5 * 0.5)
    expected = (x * y)[:kept].sum() / (x * x)[:kept].sum()
    assert estimate_id(distances, 0.5) == pytest.approx(expected, rel=bound)


def test_permutations_from_the_generator():
    distances = pairwise_distances(torch.randn(100, 8))

    def analyse(seed):
        return block_analysis(distances, generator=torch.Generator().manual_seed(seed)).mean

    assert torch.equal(analyse(1), analyse(1))
    assert analyse(1)[0] == analyse(2)[0]  # one block: the same sorted ratios, summed in this order
    assert not torch.equal(analyse(1), analyse(2))


@pytest.mark.parametrize(
    ("n", "fewest", "levels"), [(24, 3, 8), (60, 3, 20), (399, 20, 19), (400, 20, 20), (12, 20, 1)]
)
def test_few_points(n, fewest, levels):
    """Levels with smaller blocks are undefined and left out; all points together never are."""
    found = block_analysis(pairwise_distances(torch.randn(n, 8)), fewest=fewest)
    assert found.mean.isnan().tolist() == [False] * levels + [True] * (20 - levels)
    mean = found.mean[:levels].mean().item()
    assert found.id == pytest.approx(mean, rel=2 * 20 * ROUNDING64)  # sums of at most 20 terms
    if levels > 1:
        assert found.error == found.std[levels - 1].item()
    else:
        assert math.isnan(found.error)  # one block does not differ from itself
