import math

import numpy as np
import pytest
import torch

from dimension import twonn
from dimension.twonn import block_analysis, estimate_id, pairwise_distances
from tests.conftest import GOLDEN

CLOUDS = ["gauss5in20", "swiss", "sphere9", "highdim", "duplicates", "grid"]
WIDE = 10_000  # features: products in float32, in several chunks


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "twonn.npz").items()}


def direct_distances(points):
    exact = points.double()
    return torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")


def relative_error(found, expected):
    apart = expected > 0
    return ((found - expected).abs()[apart] / expected[apart]).max().item()


@pytest.mark.parametrize("fraction", [1.0, 0.9])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_golden(golden, cloud, fraction):
    distances = pairwise_distances(golden[f"{cloud}.points"])
    expected = golden[f"{cloud}.id_fraction_{fraction}"].item()
    assert estimate_id(distances, fraction) == pytest.approx(expected, rel=1e-6)
    found = block_analysis(distances, fraction, golden[f"{cloud}.permutations"])
    mean = golden[f"{cloud}.block_mean_fraction_{fraction}"]
    std = golden[f"{cloud}.block_std_fraction_{fraction}"]
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.std, std, rtol=1e-6, atol=0)
    assert found.id == pytest.approx(mean.mean().item(), rel=1e-6)
    assert found.error == pytest.approx(std[-1].item(), rel=1e-6)


@pytest.mark.parametrize("cloud", ["gauss5in20", "swiss", "sphere9", "highdim"])
def test_float32_products_suffice(golden, cloud):
    """The golden clouds in many dimensions."""
    points = golden[f"{cloud}.points"]
    points = points @ torch.randn(points.shape[1], WIDE) + torch.randn(WIDE)
    permutations = golden[f"{cloud}.permutations"]
    found = block_analysis(pairwise_distances(points), permutations=permutations)
    exact = points.double() - points.double().mean(0)
    distances = torch.cdist(exact, exact)  # a product, but in float64
    expected = block_analysis(distances, permutations=permutations)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=0)
    # the blocks of a level may differ by little; their spread keeps the digits of the mean
    assert ((found.std - expected.std).abs() / expected.mean).max() < 2e-6


@pytest.mark.parametrize(("n", "width"), [(50, 3), (50, 700), (210, WIDE), (50, 2**17), (8, WIDE)])
def test_distances_far_from_the_origin(n, width):
    points = torch.randn(n, width) + 100 * torch.randn(width)
    expected = direct_distances(points)
    found = pairwise_distances(points)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert relative_error(found, expected) < 2e-7


def test_clusters_much_smaller_than_their_distances():
    centres = 100 * torch.randn(3, WIDE)
    points = centres[torch.arange(60) % 3] + 0.01 * torch.randn(60, WIDE)
    assert relative_error(pairwise_distances(points), direct_distances(points)) < 2e-7


def test_duplicates_are_exact_zeros():
    points = torch.randn(40, WIDE) + 30
    points[[7, 21, 39]] = points[3].clone()
    points[11] = points[10].clone()
    points[13] = points[12] * (1 + 2**-22)  # nearly
    found, expected = pairwise_distances(points), direct_distances(points)
    assert torch.equal(found == 0, expected == 0)
    assert (found == 0).sum() == 40 + 4 * 3 + 2
    assert torch.equal(found[7], found[3])
    assert found[12, 13] == pytest.approx(expected[12, 13].item(), rel=1e-12)


def test_two_points_repeated():
    points = torch.randn(2, WIDE)[torch.arange(300) % 2]
    found = pairwise_distances(points)
    apart = torch.arange(300)[:, None] % 2 != torch.arange(300) % 2
    assert torch.equal(found > 0, apart)
    assert found.unique().numel() == 2


def test_one_point_has_dimension_zero():
    found = block_analysis(pairwise_distances(torch.full((80, WIDE), 0.1)))
    assert (found.id, found.error, found.points, found.duplicates) == (0, 0, 0, 80)


@pytest.mark.parametrize("n", [80, 300])
def test_two_points_repeated_have_no_dimension(n):
    """Also where a point's whole list of neighbours repeats it."""
    found = block_analysis(pairwise_distances(torch.eye(2)[torch.arange(n) % 2]))
    assert math.isnan(found.id)
    assert (found.points, found.duplicates) == (0, n)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("width", [10, WIDE])
def test_numbers_that_are_none(value, width):
    points = torch.randn(9, width)
    points[4, 5] = value
    if (value, width) == (1e30, 10):  # float64 can square it
        assert pairwise_distances(points).isfinite().all()
        return
    with pytest.raises(ValueError, match="NaN, infinite, or too large"):
        pairwise_distances(points)


def test_full_float32_whatever_the_setting(monkeypatch):
    used = []
    mm = torch.mm

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


@pytest.mark.parametrize(("dimension", "tolerance"), [(1, 0.1), (2, 0.1), (5, 0.1), (10, 0.15)])
def test_flat_manifold(dimension, tolerance):
    points = torch.rand(1500, dimension) @ torch.randn(dimension, 300)
    assert estimate_id(pairwise_distances(points)) == pytest.approx(dimension, rel=tolerance)


def test_sphere_in_many_dimensions():
    points = torch.randn(1500, 4)
    points = points / points.norm(dim=1, keepdim=True) @ torch.randn(4, WIDE)
    assert estimate_id(pairwise_distances(points)) == pytest.approx(3, rel=0.1)


def test_estimate_by_hand():
    """Points 0, 1, 3, 7, 15 of a line: ratios 3, 2, 3/2, 3/2 (7: 4 and 6), 3/2 (15: 8 and 12)."""
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
    x = np.log([1.5, 1.5, 1.5])  # of five, the last two are dropped
    y = -np.log([4 / 5, 3 / 5, 2 / 5])
    expected = (x * y).sum() / (x * x).sum()
    assert estimate_id(pairwise_distances(points)) == pytest.approx(expected, rel=1e-12)
    kept = 2  # floor(5 * 0.5)
    expected = (x * y)[:kept].sum() / (x * x)[:kept].sum()
    assert estimate_id(pairwise_distances(points), 0.5) == pytest.approx(expected, rel=1e-12)


def test_ties_are_dropped():
    lattice = torch.cartesian_prod(*[torch.arange(5.0)] * 3)  # every r1 equals its r2
    distances = pairwise_distances(lattice)
    assert math.isnan(estimate_id(distances))
    found = block_analysis(distances)
    assert found.points == 0
    assert found.duplicates == 0


@pytest.mark.parametrize("neighbours", [3, 128])
def test_blocks_equal_full_sorts(monkeypatch, neighbours):
    """With few neighbours on the list, most points have to look at their whole block."""
    monkeypatch.setattr(twonn, "NEIGHBOURS", neighbours)
    distances = pairwise_distances(torch.randn(300, 8))
    permutations = twonn.draw_permutations(300)
    found = block_analysis(distances, permutations=permutations)
    for b in range(1, 21):
        size = 300 // b
        slopes = []
        for block in permutations[b - 1, : b * size].view(b, size):
            nearest = distances[block][:, block].sort().values
            mu = (nearest[:, 2] / nearest[:, 1]).sort().values
            x, y = mu.log(), -torch.log1p(-torch.arange(1, size + 1) / size)
            slopes.append((x[:-2] @ y[:-2].double()) / (x[:-2] @ x[:-2]))
        slopes = torch.stack(slopes)
        assert found.mean[b - 1] == pytest.approx(slopes.mean().item(), rel=1e-6)
        assert found.std[b - 1] == pytest.approx(slopes.std(correction=0).item(), abs=1e-5)


def test_permutations_from_the_generator():
    distances = pairwise_distances(torch.randn(100, 8))

    def analyse(seed):
        return block_analysis(distances, generator=torch.Generator().manual_seed(seed)).mean

    assert torch.equal(analyse(1), analyse(1))
    assert analyse(1)[0] == analyse(2)[0]
    assert not torch.equal(analyse(1), analyse(2))


@pytest.mark.parametrize(("n", "levels"), [(24, 8), (59, 19), (60, 20)])
def test_few_points(n, levels):
    """A block needs three points: levels with smaller ones are undefined and left out."""
    found = block_analysis(pairwise_distances(torch.randn(n, 8)))
    assert found.mean.isnan().tolist() == [False] * levels + [True] * (20 - levels)
    assert found.id == pytest.approx(found.mean[:levels].mean().item())
    assert found.error == found.std[levels - 1].item()


def test_two_points_have_no_dimension():
    found = block_analysis(pairwise_distances(torch.randn(2, 8)))
    assert math.isnan(found.id)
    assert math.isnan(found.error)
    assert found.points == 0
