import json

import pytest
import torch

from dimension.figures import KINDS, layer_kind, plot_comparison, plot_depth, plot_scale
from dimension.profile import (
    Estimation,
    IDProfile,
    LayerID,
    block_permutations,
    load_profile,
    make_remarks,
    measure_layer,
)
from dimension.twonn import block_analysis, pairwise_distances
from engine.profile import summary

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
    """Also those of before there were remarks, and a plain mapping."""
    folder, expected = tmp_path / "new", dict(zip(NAMES, [10.5, 11.5, 12.5], strict=True))
    profile.write(folder)
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {
        "ID.txt": "".join(f"{name}\n" for name in NAMES),
        "result_id.txt": "10.5\n11.5\n12.5\n",
        "result_bar.txt": "1.25\n1.25\n1.25\n",
        "dim.txt": "64\n128\n192\n",
    }
    content = json.loads((folder / "profile.json").read_text())
    assert content.pop("remarks") == []
    (tmp_path / "old.json").write_text(json.dumps(content))
    for path in (folder, folder / "profile.json", tmp_path / "old.json"):
        assert IDProfile.read(path) == profile
        assert load_profile(path) == expected
    (tmp_path / "flat.json").write_text(json.dumps(expected))
    assert load_profile(tmp_path / "flat.json") == expected


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"a": "b"}', '{"layers": {"a": {}}}', ""])
def test_no_profile(content, tmp_path):
    if content:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        load_profile(tmp_path / "x.json")


@pytest.mark.parametrize(("samples", "levels"), [(70, 3), (400, 20)])
def test_measure_layer(samples, levels):
    """Levels of blocks of 20 points or more count: of 70 points, three."""
    points = torch.randn(samples, 5)
    points[3:5] = 100.0  # duplicates, and nobody's neighbours: they would be a tie
    distances = pairwise_distances(points)
    layer = measure_layer("a", 5, distances, 1.0, block_permutations(samples, 0))
    assert (layer.points, layer.duplicates, layer.features) == (samples - 2, 2, 5)
    every = block_analysis(distances, permutations=block_permutations(samples, 0))  # all levels
    assert layer.block_means == every.mean[:levels].tolist() + [None] * (20 - levels)
    assert layer.id == every.mean[:levels].mean().item()
    assert layer.error == every.std[levels - 1].item()
    with pytest.raises(ValueError, match="layer some.name: 0 of 2 samples .* take more samples"):
        Estimation().measure("some.name", 5, pairwise_distances(points[:2]))


def test_a_long_remark_is_cut_on_the_screen(profile):
    profile.remarks = ["few layers", "a " * 300]
    shown = summary(profile).splitlines()
    assert shown[-2] == "remark: few layers"
    assert len(shown[-1]) <= 408 and shown[-1].endswith(" a ... (whole in profile.json)")


def test_remarks():
    def remarks(samples, *duplicates, bad=0, errors=(1.0, 1.0, 1.0)):
        found = zip("abc", duplicates, errors, strict=False)
        layers = {name: LayerID(10.0, x, [10.0], 400 - n, n, 64) for name, n, x in found}
        return make_remarks(samples, layers, bad=bad)

    assert remarks(400, 40, 0) == []
    assert len(remarks(399, 40, 0)) == 2  # too few for 20 levels, and more than a tenth
    assert remarks(400, 40, 0, bad=3)[0].startswith("3 samples were passed over")
    (remark,) = remarks(400, 41, 0, 60)
    assert remark.startswith("in 2 of 3 layers many samples")
    assert "most in c: 15%" in remark
    (remark,) = remarks(400, 0, 0, 0, errors=(4.9, 5.1, None))
    assert "most in b: 51%" in remark and "more samples" in remark


# --- figures


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_depth_figure_has_all_ids_and_error_bars(profile):
    assert [layer_kind(name) for name in NAMES] == list(KINDS)
    profile.layers[NAMES[1]].error = None
    figure = plot_depth(profile)
    (axes,) = figure.axes
    assert legend(figure) == list(KINDS)
    points, bars = [], []
    for container in axes.containers:  # one of each kind
        line, _, (segments,) = container
        points += list(zip(*line.get_data(), strict=True))
        bars += [[tuple(end) for end in bar] for bar in segments.get_segments()]
    assert sorted(points) == [(0, 10.5), (1, 11.5), (2, 12.5)]
    drawn = [bar for bar in bars if bar and bar[0][1] == bar[0][1]]  # a missing one: no ends, NaN
    assert sorted(drawn) == [[(x, y - 1.25), (x, y + 1.25)] for x, y in ((0, 10.5), (2, 12.5))]


def test_scale_figure_has_a_line_of_means_a_layer(profile):
    profile.layers[NAMES[0]].block_means = [9.0, 8.0, 7.0]
    figure = plot_scale(profile)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("points in a block", "log")
    assert list(axes.get_xticks()) == [100, 50, 20, 10, 5] and not axes.get_xticks(minor=True).size
    assert legend(figure) == list(KINDS)
    first, *others = axes.lines
    assert list(zip(*first.get_data(), strict=True)) == [(100, 9.0), (50, 8.0), (33, 7.0)]
    for line in others:
        assert list(line.get_xdata()) == [100, 50]
        assert list(line.get_ydata()) == pytest.approx([9.0, float("nan")], nan_ok=True)


def test_comparison_figure_has_every_profile_over_relative_depth():
    first = dict(zip(NAMES, [1.0, 2.0, 3.0], strict=True))
    second = {NAMES[0]: 4.0, NAMES[2]: 5.0}
    figure = plot_comparison({"one": first, "two": second})
    (axes,) = figure.axes
    assert legend(figure) == ["one", "two", *KINDS]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(zip(*drawn["one"].get_data(), strict=True)) == [(0, 1.0), (0.5, 2.0), (1, 3.0)]
    assert list(zip(*drawn["two"].get_data(), strict=True)) == [(0, 4.0), (1, 5.0)]
    marked = [y for line in axes.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert sorted(marked) == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("label", ["_old", "_", "ID/$a$_$b$", "ID/a\udcff"])
def test_the_legend_names_every_profile(label):
    """Of a path that begins with an underscore, holds a formula of matplotlib's, or odd bytes."""
    figure = plot_comparison({label: {NAMES[0]: 1.0}, "new": {NAMES[0]: 2.0}})
    shown, other, *_ = legend(figure)
    printed = label.replace("\udcff", "?")
    assert shown.removeprefix("./").replace(r"\$", "$") == printed and other == "new"
    assert shown.count("$") == shown.count(r"\$")
