import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners import kernels, threshold
from pruners.kernels import VECTOR
from pruners.score import Magnitude
from pruners.threshold import kth_smallest, radix_select, select_between

N, SAMPLE, PIECE = 100_001, 1 << 14, 4096
TINY, SUBNORMAL, BIG = 1.2e-38, 1e-45, 3e38


def score_of(*tensors: torch.Tensor) -> Magnitude:
    """The tensors' elements as scores."""
    return Magnitude({f"layer{i}.weight": x for i, x in enumerate(tensors)}, None, 10, 0.85, 0.95)


@pytest.fixture
def small(monkeypatch):
    """A sample and pieces so small that N scores need many pieces and a bracket."""
    monkeypatch.setattr(threshold, "SAMPLE", SAMPLE)
    monkeypatch.setattr(kernels, "PIECE_ON_CPU", PIECE)


def uniform() -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(0))


ADVERSARIES = {
    "long tail": lambda: uniform() ** 9,
    "all equal": lambda: torch.full((N,), 0.7),
    "mostly zero": lambda: torch.where(uniform() < 0.9, 0.0, uniform()),
    "two values": lambda: (uniform() < 0.5).float(),
    "subnormals": lambda: uniform() * TINY,
    "infinities": lambda: torch.where(uniform() < 0.3, math.inf, uniform()),
    "over all magnitudes": lambda: torch.exp((uniform() - 0.5) * 170),
    # Every score of the sample is 1, all others are larger: the bracket misses.
    "sample lies": lambda: 1 + (torch.arange(N) % (N // SAMPLE | 1)).float() * uniform(),
}


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_equals_kthvalue_and_counts_ties(kind, small, kernel_form):
    values = ADVERSARIES[kind]()
    score = score_of(values[:1], values[1:4], values[4:70_000].view(-1, 12), values[70_000:])
    for k in (1, N // 1000, int(0.3 * N), int(0.8 * N), N):
        expected = values.kthvalue(k).values.item()
        assert kth_smallest(score, N, k) == (expected, int((values == expected).sum())), k


def test_a_single_score(kernel_form):
    assert kth_smallest(score_of(torch.tensor([-3.0])), 1, 1) == (3.0, 1)


@pytest.mark.usefixtures("small")
def test_one_pass_suffices_where_the_sample_tells(monkeypatch):
    monkeypatch.setattr(threshold, "radix_select", count_full := Counting())
    values = ADVERSARIES["long tail"]()
    found, _ = kth_smallest(score_of(values), N, N // 2)
    assert found == values.kthvalue(N // 2).values
    assert count_full.largest < 2 * SAMPLE < N  # it saw the sample, and what lay inside


class Counting:
    """radix_select that remembers the most scores that it was given."""

    largest = 0

    def __call__(self, pieces, k):
        self.largest = max(self.largest, sum(len(piece) for piece in pieces()))
        return radix_select(pieces, k)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_nan_anywhere_makes_the_result_nan(nan, small, kernel_form):
    for where in (0, 7, N // 2, N - 1, slice(0, None, 2)):
        values = uniform()
        values[where] = nan
        for k in (1, N // 2, N):
            assert math.isnan(kth_smallest(score_of(values), N, k)[0]), (where, k)


@pytest.mark.parametrize("piece", [7, VECTOR, 101])
def test_selects_inside_a_bracket(piece, kernel_form, monkeypatch):
    """Pieces shorter than a vector, whole vectors, and some elements beyond them."""
    monkeypatch.setattr(kernels, "PIECE_ON_CPU", piece)
    score = score_of(torch.randperm(5003).float())
    assert select_between(score, 5003, 3000, 2950.0, 3050.0) == (2999.0, 1)


def test_a_bracket_that_misses_or_holds_too_much_finds_nothing(kernel_form):
    score = score_of((torch.randperm(10_000) + 0.5) / 10_000)  # the 5000th is just below 0.5
    for lower, upper in [(0.6, 0.61), (0.1, 0.11), (0.5, 0.5), (0.45, 0.55), (-1.0, math.inf)]:
        assert select_between(score, 10_000, 5000, lower, upper) is None, (lower, upper)
    assert select_between(score, 10_000, 5000, 0.49, 0.51) is not None


floats = st.floats(0, width=32) | st.sampled_from([0.0, SUBNORMAL, TINY, 1.0, BIG, math.inf])


@settings(max_examples=50, deadline=None)
@given(st.lists(floats, min_size=1, max_size=300), st.data())
def test_radix_select_equals_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    piece = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    found = radix_select(lambda: tensor.split(piece), k)
    expected = np.sort(tensor.numpy())[k - 1]
    assert found == (expected, (tensor.numpy() == expected).sum())


@settings(max_examples=50, deadline=None)
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
    many = torch.tensor(values)[picked] * torch.rand(n, generator=generator).clamp(min=0.5)
    k = data.draw(st.integers(1, n))
    cut = data.draw(st.integers(1, n - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE_ON_CPU", data.draw(st.integers(100, 5000)))
        patch.setattr(threshold, "SAMPLE", 512)
        patch.setattr(threshold, "MOST_INSIDE", 2)  # brackets of so small a sample are wide
        found, _ = kth_smallest(score_of(many[:cut], many[cut:]), n, k)
    assert found == np.sort(many.numpy())[k - 1]
