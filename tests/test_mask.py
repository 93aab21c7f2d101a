import pytest
import torch

from pruners.mask import mask_, mask_checksums
from pruners.score import PIECE_ON_CPU as PIECE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zeroes_what_is_strictly_below_and_what_has_no_score(dtype):
    inf = torch.inf
    p = torch.tensor([1.0, -2.0, 3.0, -4.0, -5.0, inf, inf, -inf, torch.nan], dtype=dtype)
    scores = torch.tensor([1.0, 4.0, 6.0, 0.0, torch.nan, inf, 3.0, 0.0, 1.0])
    mask_([(p[:2], scores[:2]), (p[2:], scores[2:])], 4.0)
    assert p.tolist() == [0.0, -2.0, 3.0, 0.0, 0.0, inf, 0.0, 0.0, 0.0]
    # a negative zero is no zero to a file that stores what is not all bits 0
    assert p.signbit().tolist() == [False, True] + [False] * 7


@pytest.mark.parametrize("dimension", [1.0, 1 / 3])
def test_a_score_equal_to_the_threshold_stays(dimension):
    """A threshold is a float32 that came through Python's double precision, as was the ID."""
    scores = torch.rand(1000) * dimension
    below = int((scores < scores[700]).sum())
    p = torch.ones(1000)
    mask_([(p, scores)], scores[700].item())
    assert p[700] == 1 and int((p == 0).sum()) == below > 0


def test_checksum_sees_count_position_and_piece_of_zeros():
    tensor = torch.ones(2 * PIECE)
    every = slice(None)
    patterns = [[], [5], [6], [5 + PIECE], [5, 6], [5 + PIECE, 6], slice(7, None), slice(7), every]
    checksums = []
    for pattern in patterns:
        zeroed = tensor.clone()
        zeroed[pattern] = 0
        unchanged, changed = mask_checksums([tensor, zeroed]).tolist()
        assert unchanged == 0
        checksums.append(changed)
    assert len(set(checksums)) == len(patterns)
    most, few, all_zero = checksums[-3:]
    assert most + few == all_zero  # whole numbers, added up without rounding
