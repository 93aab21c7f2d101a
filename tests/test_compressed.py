"""The compressed file: its layout, its bits, and what is wrong with damaged ones."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import compressed
from models.weight_files import Packed, open_weights
from utils import UserError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_unpacking_gives_the_same_bits(shape, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator).to(dtype)
    dense[torch.rand(shape, generator=generator) >= density] = 0
    bitmask, values = compressed.pack(dense)
    assert bitmask.shape == (math.ceil(dense.numel() / 8),)
    assert len(values) == dense.count_nonzero()
    assert same_bits(compressed.unpack(dense.shape, bitmask, values), dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_gives_back_what_was_written_in_bitmask_values_and_rest(path, dtype):
    """What bits would not make smaller is the rest."""
    sparse = torch.randn(600, 700).to(dtype)
    sparse[torch.rand(600, 700) < 0.8] = 0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    sparse[0, :4] = torch.tensor([-0.0, smallest, float("inf"), float("nan")], dtype=dtype)
    rest = {"dense": torch.randn(60, 70).to(dtype), "scalar": torch.tensor(0.5).to(dtype)}
    tensors = {"sparse": sparse, "transposed": sparse.T, **rest}
    compressed.write(path, tensors.items())
    entries = open_weights(path)
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        assert isinstance(entries[name], Packed) == (name not in rest)
        found = entries[name] if name in rest else entries[name].dense()
        assert same_bits(found, tensor.contiguous())
    packed = (int(sparse.count_nonzero()) + 1) * dtype.itemsize + sparse.numel() / 8
    least = 2 * packed + 4201 * dtype.itemsize
    assert least <= path.stat().st_size <= 1.02 * least


def beyond_the_end(bitmask):
    """The first bit moved to the padding after the last element."""
    bitmask = bitmask.clone()
    bitmask[0] &= 0xFD
    bitmask[-1] |= 0x80
    return bitmask


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("format_version", "2", "version '2', this program reads '1'"),
        ("shapes", "[", "damaged"),
        ("shapes", '{"w": 3}', "damaged"),
        ("shapes", '{"w": [61, 71]}', "parts of w do not fit"),
        ("w.bitmask", None, "damaged.*w.bitmask"),
        ("w.bitmask", lambda x: x[:-1], "parts of w do not fit"),
        ("w.values", lambda x: x[:-1], "w: .* values do not fit the bitmask"),
        ("w.bitmask", beyond_the_end, "w: the bitmask has bits beyond the last of 4260 elements"),
        ("w.bitmask", lambda x: x | 1, "w: .* values do not fit the bitmask"),
    ],
)
def test_damaged_files_are_named(path, part, change, message):
    sparse = torch.zeros(60, 71)
    sparse[::2, 1::3] = 1
    compressed.write(path, {"w": sparse}.items())
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if part in metadata:
        metadata[part] = change
    elif change is None:
        del tensors[part]
    else:
        tensors[part] = change(tensors[part])
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{message}"):
        open_weights(path)["w"].dense()


def test_a_target_that_fits_is_written_and_keeps_nothing():
    sparse = torch.randn(60, 71).relu()
    target = torch.ones(60, 71)
    found = compressed.unpack((60, 71), *compressed.pack(sparse), target)
    assert found.data_ptr() == target.data_ptr() and same_bits(target, sparse)
    for other in (torch.ones(71, 60).T, torch.ones(60, 71).double()):
        assert same_bits(compressed.unpack((60, 71), *compressed.pack(sparse), other), sparse)
        assert (other == 1).all()
