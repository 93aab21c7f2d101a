import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruners.threshold import kth_smallest

FLOATS = st.floats(0, width=32) | st.sampled_from([0.0, 1e-45, 1.2e-38, 1.0, 3e38, math.inf])


def in_pieces(scores: torch.Tensor, length: int) -> list[tuple[None, torch.Tensor]]:
    return [(None, piece) for piece in scores.split(length)]


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=300), st.data())
def test_equals_sort_and_counts_ties(values, data):
    k = data.draw(st.integers(1, len(values)))
    length = data.draw(st.integers(1, len(values)))
    scores = np.array(values, dtype=np.float32)
    expected = np.sort(scores)[k - 1]
    found = kth_smallest(in_pieces(torch.from_numpy(scores), length), k)
    assert found == (expected, (scores == expected).sum())


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("where", [0, 7, 10_000, 20_000, slice(0, None, 2)])
def test_a_nan_anywhere_makes_the_result_nan(where, nan):
    scores = torch.rand(20_001)
    scores[where] = nan
    for k in (1, 20_001):
        assert math.isnan(kth_smallest(in_pieces(scores, 4096), k)[0])
