"""Distances, TwoNN and block analysis against goldens, exact arithmetic and an example by hand.

Bounds follow from the roundings that a result may have suffered, in any order of summation, so they
hold on every processor. A sum of k products of either sign is off by at most k roundings of the sum
of their absolute values.
"""

import math

import numpy as np
import pytest
import torch

from dimension.twonn import (
    CENTRING_POINTS,
    PRODUCT_FEATURES,
    block_analysis,
    estimate_id,
    full_float32,
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


@pytest.mark.parametrize("fraction", [1.0, 0.9])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_golden(golden, cloud, fraction):
    """Distances in float64, of up to 400 features, are off by 2e-13 of themselves at most.

    Most logarithms of their ratios are above 1e-3, so the slopes through them are off by 1e-9.
    """
    distances, close = pairwise_distances(golden[f"{cloud}.points"]), {"rtol": 1e-9, "atol": 0}
    found = block_analysis(distances, fraction, golden[f"{cloud}.permutations"])
    mean = golden[f"{cloud}.block_mean_fraction_{fraction}"]
    torch.testing.assert_close(found.mean, mean, **close)
    # a deviation moves by no more than its values do
    moved = {"rtol": 0, "atol": 1e-9 * mean.max().item()}
    torch.testing.assert_close(found.std, golden[f"{cloud}.block_std_fraction_{fraction}"], **moved)
    assert found.id == pytest.approx(mean.mean().item(), rel=1e-9)
    assert found.error == found.std[-1].item()
    expected = golden[f"{cloud}.id_fraction_{fraction}"].item()
    assert estimate_id(distances, fraction) == pytest.approx(expected, rel=1e-9)


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


@pytest.mark.parametrize("width", [3, 700, WIDE])
def test_distances_far_from_the_origin_and_between_duplicates(width):
    """Norms |x|^2 + |y|^2 of these points, once centred, are below twice their squared distance.

    Sums of k products are then off by 2 k roundings of that at most, and distances by half of it;
    centring moves each end of a distance by a rounding of its norm.
    """
    points = torch.randn(410, width) + 100 * torch.randn(width)
    points[[7, 21, 39]] = points[3].clone()
    points[11] = points[10].clone()
    points[13] = points[12] * (1 + 2**-22)  # nearly
    found, expected = pairwise_distances(points), direct_distances(points)
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    assert torch.equal(found == 0, expected == 0)
    assert (found == 0).sum() == 410 + 4 * 3 + 2
    rounding = ROUNDING32 if width > PRODUCT_FEATURES else ROUNDING64
    bound = 2 * min(width, PRODUCT_FEATURES) * rounding + 2 * ROUNDING32
    torch.testing.assert_close(found, expected, rtol=bound, atol=0)
    squared = squared_distances(points)
    assert torch.equal(squared[7], squared[3])  # copied
    close = expected[12, 13].item()  # both are sums of squares of differences in float64
    assert found[12, 13] == pytest.approx(close, rel=(width + 4) * ROUNDING64, abs=0)


@pytest.mark.parametrize(
    ("points", "dimension", "duplicates"),
    [
        (torch.full((80, WIDE), 0.1), 0, 80),  # one point
        (torch.eye(2), math.nan, 0),
        (torch.eye(2)[torch.arange(80) % 2], math.nan, 80),
        (torch.eye(2, WIDE)[torch.arange(300) % 2], math.nan, 300),  # all neighbours are it, too
    ],
)
def test_points_without_a_ratio_of_distances(points, dimension, duplicates):
    found = block_analysis(pairwise_distances(points))
    figures = pytest.approx((dimension, dimension, 0, duplicates), abs=0, nan_ok=True)
    assert (found.id, found.error, found.points, found.duplicates) == figures


def test_ties_are_dropped():
    lattice = torch.cartesian_prod(*[torch.arange(5.0)] * 3)  # every r1 equals its r2
    found = block_analysis(pairwise_distances(lattice))
    assert math.isnan(found.mean[0]) and (found.points, found.duplicates) == (0, 0)


@pytest.mark.parametrize(
    ("value", "width"), [(math.nan, 10), (math.inf, 10), (math.nan, WIDE), (1e30, WIDE)]
)
def test_values_that_are_not_finite_or_too_large(value, width):
    points = torch.randn(9, width)
    points[4, 5] = value
    with pytest.raises(ValueError, match="NaN, infinite, or too large"):
        pairwise_distances(points)


def test_full_float32_whatever_the_setting():
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


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
