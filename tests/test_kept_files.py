"""Files that are kept between runs: damaged ones do not end a run, links stay links."""

import json

import numba
import torch

from dimension.profile import IDProfile, LayerID
from sparse import product
from sparse.matrix import compress
from utils import write_json


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


def test_a_file_behind_a_link_is_written_where_it_lies(tmp_path):
    """A profile, whose folder holds links; a link to nothing yet; and one of a folder."""
    store, folder = tmp_path / "store", tmp_path / "ID"
    for place in (store, folder):
        place.mkdir()
    (store / "p.json").write_text("old")
    (folder / "profile.json").symlink_to("../store/p.json")
    (folder / "ID.txt").symlink_to(store / "new/ID.txt")
    layer = LayerID(2.5, None, [], points=9, duplicates=0, features=3)
    IDProfile({}, {"a": layer}).write(folder)
    assert json.loads((store / "p.json").read_text())["layers"]["a"]["id"] == 2.5
    assert (store / "new/ID.txt").read_text() == "a\n"
    assert (folder / "profile.json").is_symlink() and (folder / "ID.txt").is_symlink()
    (tmp_path / "link").symlink_to(store)
    write_json(tmp_path / "link/x.json", 1)
    assert (store / "x.json").read_text() == "1\n"
