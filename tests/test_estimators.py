"""Gride and maximum likelihood: known manifolds, recorded values of other programs, profiles."""

import math

import numpy as np
import pytest
import torch

import dimension.twonn as twonn
from dimension import measure
from dimension.figures import draw_profile
from dimension.profile import Estimation, block_permutations
from dimension.twonn import ESTIMATORS, block_analysis, estimate_id, pairwise_distances
from utils import UserError


def sphere(d, n, seed):
    x = np.random.RandomState(seed).normal(size=(n, d + 1))
    return np.pad(x / np.linalg.norm(x, axis=1, keepdims=True), ((0, 0), (0, 19 - d)))


def linear(d, n, seed):
    """A cube of d dimensions, mapped into 20."""
    random = np.random.RandomState(seed)
    return random.uniform(size=(n, d)) @ random.normal(size=(d, 20))


def swiss_roll(d, n, seed):
    """Two dimensions in three, and d - 3 that are empty."""
    random = np.random.RandomState(seed)
    t = 1.5 * np.pi * (1 + 2 * random.uniform(size=n))
    x = np.stack([t * np.cos(t), 21 * random.uniform(size=n), t * np.sin(t)], 1)
    return np.pad(x, ((0, 0), (0, d - 3)))


def distances(points):
    return pairwise_distances(torch.from_numpy(points))


# Of DADApy 0.3.4, `return_id_scaling_gride` at n1 = 1, 2, 4, with N points in its likelihood, which
# has N - 1; and of scikit-dimension 0.5.0, `MLE().fit(points, n_neighbors=20)`
RECORDED = {
    (sphere, 5, 0): (4.434142964657, 4.668997178566, 4.797518552392, 4.781698747935),
    (sphere, 10, 1): (9.345007146798, 9.162567606574, 8.350624933157, 8.449464997818),
    (linear, 8, 2): (6.465852550920, 5.923143291056, 5.871750606110, 5.823838389726),
    (swiss_roll, 5, 3): (2.102934175007, 1.838326316995, 1.966302418426, 1.930110550424),
}


@pytest.mark.parametrize("cloud", RECORDED, ids=lambda cloud: f"{cloud[0].__name__}-{cloud[1]}")
def test_equals_other_programs(cloud, monkeypatch):
    """To 1e-9, where DADApy's search stops."""
    make, d, seed = cloud
    found, *expected = distances(make(d, 500, seed)), *RECORDED[cloud]
    assert estimate_id(found, estimator="mle") == pytest.approx(expected.pop(), rel=1e-10)
    for k, value in zip((1, 2, 4), expected, strict=True):
        monkeypatch.setattr(twonn, "GRIDE_NEIGHBOURS", k)
        assert estimate_id(found, estimator="gride") == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("estimator", ["gride", "mle"])
def test_blocks_and_duplicates(estimator):
    """Each block by itself; a point whose nearest neighbour is a duplicate is left out."""
    x = np.random.RandomState(0).normal(size=(130, 6))
    x[7] = x[3]
    found, permutations = distances(x), block_permutations(130, 0)
    analysis = block_analysis(
        found, permutations=permutations, fewest=twonn.ENOUGH_POINTS, estimator=estimator
    )
    for level in range(6):
        size = 130 // (level + 1)
        blocks = permutations[level, : size * (level + 1)].view(-1, size)
        values = [estimate_id(found[block][:, block], estimator=estimator) for block in blocks]
        assert analysis.mean[level] == pytest.approx(np.mean(values))
        assert analysis.std[level] == pytest.approx(np.std(values))
    assert analysis.mean[6:].isnan().all()
    assert (analysis.points, analysis.duplicates) == (128, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_points(estimator, n):
    value = estimate_id(distances(np.random.RandomState(0).normal(size=(n, 3))), 1.0, estimator)
    assert math.isnan(value) if n == 2 else value > 0
    repeated = pairwise_distances(torch.eye(2)[torch.arange(9) % 2])
    assert math.isnan(estimate_id(repeated, 1.0, estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_profile_names_its_estimator_and_holds_all(estimator, tmp_path):
    """The ID is the chosen one's; the figure has a line of each."""
    batches, layers = torch.randn(60, 4, 16).split(8), [torch.nn.Linear(16, 16) for _ in range(2)]
    profile = measure(torch.nn.Sequential(*layers), batches, estimator=estimator)
    assert profile.settings["estimator"] == estimator
    for layer in profile.layers.values():
        assert list(layer.estimates) == ["twonn", "gride", "mle"]
        assert layer.estimates[estimator] == layer.id
    assert len(set(profile.layers["0"].estimates.values())) == 3
    assert "estimators.png" in draw_profile(profile, tmp_path, [])
    profile.layers["1"].estimates.clear()  # of a profile of before
    assert "estimators.png" not in draw_profile(profile, tmp_path, [])


def test_estimations_out_of_range():
    for wrong, message in (
        ({"estimator": "pca"}, "'pca' is none of twonn, gride, mle"),
        ({"estimator": "mle", "fraction": 0.9}, "mle takes all points"),
    ):
        with pytest.raises(UserError, match=message):
            Estimation(**wrong)
