import json

import pytest
import torch
from matplotlib.image import imread

from dimension.figures import (
    KINDS,
    layer_kind,
    plot_comparison,
    plot_depth,
    plot_scale,
    save_figure,
)
from dimension.profile import (
    IDProfile,
    LayerID,
    PartialProfile,
    load_distances,
    load_profile,
    make_remarks,
    measure_layer,
    save_distances,
)
from dimension.twonn import block_analysis, draw_permutations, pairwise_distances

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
    assert layers[NAMES[0]] == pytest.approx(first, abs=0.005)  # two decimals


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"a": "b"}', '{"layers": {"a": {}}}'])
def test_no_profile(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        load_profile(path)
    with pytest.raises(ValueError, match="absent.json"):
        load_profile(tmp_path / "absent.json")


def test_measure_layer():
    """Levels of blocks of 20 points or more count: of 70 points, three."""
    points = torch.randn(70, 5)
    points[3:5] = 100.0  # duplicates, and nobody's neighbours: they would be a tie
    permutations = draw_permutations(70)
    distances = pairwise_distances(points)
    layer = measure_layer("a", 5, distances, 1.0, permutations)
    assert (layer.points, layer.duplicates, layer.features) == (68, 2, 5)
    every = block_analysis(distances, permutations=permutations)  # the original's rule
    assert layer.block_means == every.mean[:3].tolist() + [None] * 17  # the same sums
    assert layer.id == every.mean[:3].mean().item()
    assert layer.error == every.std[2].item()
    with pytest.raises(ValueError, match="layer some.name: 0 of 2 samples .* take more samples"):
        measure_layer("some.name", 5, pairwise_distances(points[:2]), 1.0, permutations[:, :2])


def test_the_originals_numbers_with_its_samples():
    distances = pairwise_distances(torch.randn(400, 5))
    permutations = draw_permutations(400)
    layer = measure_layer("a", 5, distances, 1.0, permutations)
    every = block_analysis(distances, permutations=permutations)
    assert (layer.id, layer.error) == (every.id, every.error)


def layer_with(duplicates):
    return LayerID(10.0, 1.0, [10.0], 400 - duplicates, duplicates, 64)


def test_remarks():
    few = {"a": layer_with(40), "b": layer_with(0)}
    assert make_remarks(400, few) == []
    assert len(make_remarks(399, few)) == 2  # too few for 20 levels, and more than a tenth
    assert make_remarks(400, few, bad=3)[0].startswith("3 samples were passed over")
    many = {"a": layer_with(41), "b": layer_with(0), "c": layer_with(60)}
    (remark,) = make_remarks(400, many)
    assert remark.startswith("in 2 of 3 layers many samples")
    assert "most in c: 15%" in remark


def test_profiles_of_the_present_version_load(profile, tmp_path):
    """Those of before there were remarks."""
    profile.write(tmp_path)
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content.pop("remarks") == []
    (tmp_path / "profile.json").write_text(json.dumps(content))
    assert IDProfile.read(tmp_path) == profile


def test_distances_are_kept(tmp_path):
    distances = pairwise_distances(torch.randn(9, 100))
    save_distances(tmp_path, "a.b", distances)  # the upper half; the lower one is its mirror image
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


def test_kinds_of_layers():
    assert [layer_kind(name) for name in NAMES] == list(KINDS)


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_depth_figure_has_all_ids_and_error_bars(profile):
    profile.layers[NAMES[1]].error = None
    profile.layers["visual_encoder.blocks.0.attn.proj"] = LayerID(20.0, 2.0, [], 98, 2, 64)
    figure = plot_depth(profile)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "intrinsic dimension")
    assert legend(figure) == list(KINDS)
    points, bars = [], []
    for container in axes.containers:  # one of each kind
        line, _, (segments,) = container
        points += list(zip(*line.get_data(), strict=True))
        bars += [[tuple(end) for end in bar] for bar in segments.get_segments()]
    assert sorted(points) == [(0, 10.5), (1, 11.5), (2, 12.5), (3, 20.0)]
    drawn = [bar for bar in bars if bar and bar[0][1] == bar[0][1]]  # a missing one: no ends, NaN
    assert sorted(drawn) == [
        [(0, 10.5 - 1.25), (0, 10.5 + 1.25)],
        [(2, 12.5 - 1.25), (2, 12.5 + 1.25)],
        [(3, 18.0), (3, 22.0)],
    ]


def test_scale_figure_has_a_line_of_means_a_layer(profile):
    profile.layers[NAMES[0]].block_means = [9.0, 8.0, 7.0]
    figure = plot_scale(profile)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("points in a block", "log")
    assert legend(figure) == list(KINDS)
    assert [list(line.get_xdata()) for line in axes.lines] == [[100, 50, 33], [100, 50], [100, 50]]
    assert list(axes.lines[0].get_ydata()) == [9.0, 8.0, 7.0]
    for line in axes.lines[1:]:
        mean, missing = line.get_ydata()
        assert mean == 9.0
        assert missing != missing


def test_comparison_figure_has_every_profile_over_relative_depth():
    first = dict(zip(NAMES, [1.0, 2.0, 3.0], strict=True))
    second = {NAMES[0]: 4.0, NAMES[2]: 5.0}
    figure = plot_comparison({"one": first, "two": second})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "relative depth"
    assert legend(figure) == ["one", "two", *KINDS]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(zip(*drawn["one"].get_data(), strict=True)) == [(0, 1.0), (0.5, 2.0), (1, 3.0)]
    assert list(zip(*drawn["two"].get_data(), strict=True)) == [(0, 4.0), (1, 5.0)]
    marked = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    points = sorted(y for line in marked for y in line.get_ydata())
    assert points == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("label", ["_old", "_", "ID/$a$_$b$"])
def test_the_legend_names_every_profile(label, tmp_path):
    """Of a path that begins with an underscore, or holds what matplotlib takes for a formula."""
    figure = plot_comparison({label: {NAMES[0]: 1.0}, "new": {NAMES[0]: 2.0}})
    shown, other, *_ = legend(figure)
    assert shown.removeprefix("./").replace(r"\$", "$") == label and other == "new"
    assert shown.count("$") == shown.count(r"\$")
    save_figure(figure, tmp_path / "compare.png")
    height, width, _ = imread(tmp_path / "compare.png").shape
    assert (width, height) == (9 * 150, 4 * 150)
