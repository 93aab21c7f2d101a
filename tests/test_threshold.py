import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners.threshold import kth_smallest

N, PIECE = 20_001, 4096
TINY, SUBNORMAL, BIG = 1.2e-38, 1e-45, 3e38


def in_pieces(scores: torch.Tensor, length: int = PIECE) -> list[tuple[None, torch.Tensor]]:
    return [(None, piece) for piece in scores.split(length)]


def uniform() -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(0))


ADVERSARIES = {
    "all equal": lambda: torch.full((N,), 0.7),
    "mostly zero": lambda: torch.where(uniform() < 0.9, 0.0, uniform()),
    "subnormals": lambda: uniform() * TINY,
    "infinities": lambda: torch.where(uniform() < 0.3, math.inf, uniform()),
    "over all magnitudes": lambda: torch.exp((uniform() - 0.5) * 170),
    "equal upper bits": lambda: 1 + uniform() / 256,
}


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_equals_kthvalue_and_counts_ties(kind):
    scores = ADVERSARIES[kind]()
    for k in (1, N // 1000, int(0.3 * N), int(0.8 * N), N):
        expected = scores.kthvalue(k).values.item()
        assert kth_smallest(in_pieces(scores), k) == (expected, int((scores == expected).sum())), k


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_nan_anywhere_makes_the_result_nan(nan):
    for where in (0, 7, N // 2, N - 1, slice(0, None, 2)):
        scores = uniform()
        scores[where] = nan
        for k in (1, N):
            assert math.isnan(kth_smallest(in_pieces(scores), k)[0]), (where, k)


floats = st.floats(0, width=32) | st.sampled_from([0.0, SUBNORMAL, TINY, 1.0, BIG, math.inf])


@settings(max_examples=50, deadline=None)
@given(st.lists(floats, min_size=1, max_size=300), st.data())
def test_equals_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    length = data.draw(st.integers(1, len(values)))
    scores = np.array(values, dtype=np.float32)
    expected = np.sort(scores)[k - 1]
    found = kth_smallest(in_pieces(torch.from_numpy(scores), length), k)
    assert found == (expected, (scores == expected).sum())
