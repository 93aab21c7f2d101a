import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import score, threshold
from pruners.kernels import GROUP
from pruners.score import Magnitude
from pruners.threshold import kth_smallest, radix_select, select_inside

TINY, DENORMAL, BIG = 1.2e-38, 1e-45, 3e38


def score_of(numbers: torch.Tensor, piece: int, monkeypatch) -> Magnitude:
    """The numbers as scores, in pieces of at most that length."""
    monkeypatch.setattr(score, "BLOCK", {"cpu": piece})
    return Magnitude({"layer.weight": numbers})


def distributions(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, generator=generator)
    return {
        "uniform": uniform,
        "products": uniform * torch.rand(n, generator=generator) ** 8,
        "all equal": torch.full((n,), 0.7),
        "all zero": torch.zeros(n),
        "mostly zero": torch.where(uniform < 0.9, 0.0, uniform),
        "two values": (uniform < 0.5).float(),
        "denormals": uniform * TINY,
        "infinities": torch.where(uniform < 0.3, math.inf, uniform),
        "ascending": torch.arange(n).float(),
        "over all magnitudes": torch.exp((uniform - 0.5) * 170),
        # Every number of the sample is small, all others are large: the bracket misses.
        "sample lies": 1 + (torch.arange(n) % (n // threshold.SAMPLE | 1)).float() * uniform,
    }


N = 400_001


@pytest.fixture
def small_sample(monkeypatch):
    monkeypatch.setattr(threshold, "SAMPLE", 1 << 15)


@pytest.mark.parametrize("kind", distributions(8))
@pytest.mark.parametrize("quantile", [0.0, 1e-3, 0.3, 0.8, 0.97, 1.0])
def test_bracketed_selection_equals_kthvalue(
    kind, quantile, small_sample, kernel_form, monkeypatch
):
    numbers = distributions(N)[kind]
    k = max(1, int(N * quantile))
    expected = numbers.kthvalue(k).values.item()
    assert kth_smallest(score_of(numbers, 8192, monkeypatch), N, k) == expected


def test_one_pass_suffices_where_the_sample_tells(small_sample, monkeypatch):
    monkeypatch.setattr(threshold, "radix_select", count_full := Counting(N))
    numbers = distributions(N)["products"]
    found = kth_smallest(score_of(numbers, 8192, monkeypatch), N, 200_000)
    assert found == numbers.kthvalue(200_000).values
    assert count_full.largest < N // 10


class Counting:
    """radix_select that remembers the most numbers that it was given."""

    def __init__(self, n):
        self.largest = 0

    def __call__(self, blocks, k):
        self.largest = max(self.largest, sum(len(block) for block in blocks()))
        return radix_select(blocks, k)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("where", [0, 7, 200_001, N - 1, slice(0, None, 2)])
@pytest.mark.usefixtures("small_sample", "kernel_form")
def test_not_a_number_makes_the_result_so(nan, where, monkeypatch):
    numbers = torch.rand(N)
    numbers[where] = nan
    assert math.isnan(kth_smallest(score_of(numbers, 8192, monkeypatch), N, 1000))


@pytest.mark.parametrize("piece", [1, 7, GROUP, 101, 4096])
def test_selects_inside_a_bracket(piece, kernel_form, monkeypatch):
    """Pieces shorter than a group, whole groups, and some beyond them."""
    numbers = score_of(torch.randperm(10_007).float(), piece, monkeypatch)
    assert select_inside(numbers, 10_007, 3000, 2900.0, 3100.0) == 2999


@pytest.mark.parametrize(
    "lower, upper", [(0.6, 0.61), (0.1, 0.11), (0.45, 0.55), (0.5, 0.5), (-1.0, math.inf)]
)
def test_bracket_that_misses_or_holds_too_much_finds_nothing(
    lower, upper, kernel_form, monkeypatch
):
    numbers = score_of(torch.rand(10_000), 99, monkeypatch)
    assert select_inside(numbers, 10_000, 5000, lower, upper) is None


floats = st.floats(0, width=32) | st.sampled_from([0.0, DENORMAL, TINY, 1.0, BIG, math.inf])


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=300), st.data())
def test_radix_select_equals_sort(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    block = data.draw(st.integers(1, len(numbers)))
    tensor = torch.tensor(numbers, dtype=torch.float32)
    found = radix_select(lambda: tensor.split(block), k)
    assert found == np.sort(tensor.numpy())[k - 1]


@settings(deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=40),
    st.integers(2000, 30_000),
    st.integers(0, 2**32),
    st.data(),
)
def test_kth_smallest_equals_sort(values, n, seed, data):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(values), generator=generator) ** 4 + 1e-3
    picked = torch.multinomial(weights, n, replacement=True, generator=generator)
    numbers = torch.tensor(values)[picked] * torch.rand(n, generator=generator).clamp(min=0.5)
    k = data.draw(st.integers(1, n))
    block = data.draw(st.integers(100, 5000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "SAMPLE", 512)
        patch.setattr(threshold, "MOST_INSIDE", 2)  # brackets of so small a sample are wide
        found = kth_smallest(score_of(numbers, block, patch), n, k)
    assert found == np.sort(numbers.numpy())[k - 1]
