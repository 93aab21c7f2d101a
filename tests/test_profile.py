import json

import pytest
import torch

from dimension.figures import layer_kind, plot_comparison, plot_depth, plot_scale
from dimension.profile import (
    IDProfile,
    LayerID,
    PartialProfile,
    load_distances,
    load_profile,
    measure_layer,
    model_hash,
    save_distances,
)
from dimension.twonn import draw_permutations, pairwise_distances

NAMES = [
    "visual_encoder.blocks.0.attn.qkv",
    "text_decoder.bert.encoder.layer.0.attention.self.query",
    "text_decoder.bert.encoder.layer.0.crossattention.self.key",
]


@pytest.fixture
def profile():
    layers = {
        name: LayerID(10.5 + i, 1.25, [9.0, None], points=98, duplicates=2, features=64 * (i + 1))
        for i, name in enumerate(NAMES)
    }
    return IDProfile({"nsamples": 100, "seed": 3}, layers)


def test_files(profile, tmp_path):
    profile.write(tmp_path / "new")
    assert IDProfile.read(tmp_path / "new") == profile
    assert IDProfile.read(tmp_path / "new" / "profile.json") == profile
    text = {path.name: path.read_text() for path in (tmp_path / "new").glob("*.txt")}
    assert text == {
        "ID.txt": "".join(f"{name}\n" for name in NAMES),
        "result_id.txt": "10.5\n11.5\n12.5\n",
        "result_bar.txt": "1.25\n1.25\n1.25\n",
        "dim.txt": "64\n128\n192\n",
    }


def test_load_profile(profile, tmp_path):
    profile.write(tmp_path)
    expected = dict(zip(NAMES, [10.5, 11.5, 12.5], strict=True))
    assert load_profile(tmp_path) == load_profile(tmp_path / "profile.json") == expected
    (tmp_path / "flat.json").write_text(json.dumps(expected))
    assert load_profile(tmp_path / "flat.json") == expected


@pytest.mark.parametrize(("name", "count", "first"), [("coco", 168, 39.25), ("nlvr", 222, 40.07)])
def test_published_profiles(name, count, first):
    layers = load_profile(f"configs/id/blip_{name}.json")
    assert len(layers) == count
    assert layers[NAMES[0]] == pytest.approx(first, abs=0.01)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"a": "b"}', '{"layers": {"a": {}}}'])
def test_no_profile(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        load_profile(path)
    with pytest.raises(ValueError, match="absent.json"):
        load_profile(tmp_path / "absent.json")


def test_measure_layer():
    points = torch.randn(70, 5)
    points[3] = points[4].clone()
    permutations = draw_permutations(70)
    layer = measure_layer("a", 5, pairwise_distances(points), 1.0, permutations)
    assert (layer.points, layer.duplicates, layer.features) == (68, 2, 5)
    assert layer.id == pytest.approx(sum(layer.block_means) / 20)
    with pytest.raises(ValueError, match="layer some.name: 0 of 2 samples .* take more samples"):
        measure_layer("some.name", 5, pairwise_distances(points[:2]), 1.0, permutations[:, :2])


def test_distances_are_kept(tmp_path):
    distances = pairwise_distances(torch.randn(9, 100))
    save_distances(tmp_path, "a.b", distances)
    assert torch.equal(load_distances(tmp_path, "a.b"), distances)
    with pytest.raises(ValueError, match="--save_distances .*c.pt"):
        load_distances(tmp_path, "c")


def test_partial_profiles_of_two_processes(profile, tmp_path):
    settings = profile.settings
    first, second = (PartialProfile(tmp_path, settings, rank) for rank in (0, 1))
    first.add(NAMES[0], profile.layers[NAMES[0]])
    second.add(NAMES[1], profile.layers[NAMES[1]])
    found = PartialProfile(tmp_path, settings)
    assert found.found == {name: profile.layers[name] for name in NAMES[:2]}
    found.add(NAMES[2], profile.layers[NAMES[2]])
    assert PartialProfile(tmp_path, settings).found == profile.layers
    assert PartialProfile(tmp_path, settings | {"seed": 4}).found == {}
    found.clear()
    assert PartialProfile(tmp_path, settings).found == {}


def test_model_hash():
    model = torch.nn.Linear(3, 2)
    before = model_hash(model)
    assert before == model_hash(model)
    model.bias.data[1] += 1e-6
    assert model_hash(model) != before


def test_figures(profile, tmp_path):
    assert [layer_kind(name) for name in NAMES] == [
        "vision",
        "language",
        "cross-attention key, value",
    ]
    plot_depth(profile, tmp_path / "depth.png")
    plot_scale(profile, tmp_path / "scale.png")
    plot_comparison({"a": load_profile("configs/id/blip_coco.json")}, tmp_path / "compare.png")
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(sizes) == {"depth.png", "scale.png", "compare.png"}
    assert min(sizes.values()) > 5000
