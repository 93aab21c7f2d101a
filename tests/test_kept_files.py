"""Files that are kept between runs: damaged ones do not end a run."""

import numba
import torch

from sparse import product
from sparse.matrix import compress


def product_of_a_new_process(monkeypatch, place) -> torch.Tensor:
    """Difference of a sparse product from the dense one, with Numba's cache at `place`."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(place))
    product.compiled.cache_clear()
    weight, x = torch.eye(8, 256) * 3, torch.randn(4, 256)
    m = compress(weight)
    y = product.multiply(x, 256, m.starts, m.offsets, m.values, None)
    product.compiled.cache_clear()
    return y - x @ weight.T


def test_a_damaged_or_unwritable_cache_of_kernels_is_passed_over(monkeypatch, tmp_path):
    """The products add one term each, so they are exact."""
    assert not product_of_a_new_process(monkeypatch, tmp_path / "kept").any()
    kept = list((tmp_path / "kept").rglob("*.nb*"))
    assert {file.suffix for file in kept} == {".nbi", ".nbc"}
    for file in kept:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    assert not product_of_a_new_process(monkeypatch, tmp_path / "kept").any()
    (tmp_path / "file").touch()
    assert not product_of_a_new_process(monkeypatch, tmp_path / "file/below").any()
