"""Figures of results, by what their axes hold."""

from statistics import fmean

import pytest

from dimension.figures import KINDS, layer_kind
from models import build_captioner, prunable_layers
from pruners import sparsity_report
from reports.figures import plot_sparsity


@pytest.fixture(scope="module")
def report(caption_tiny_config):
    layers = prunable_layers(build_captioner(caption_tiny_config))
    for number, layer in enumerate(layers.values()):
        layer.weight.data.view(-1)[: number + 1] = 0
    return sparsity_report(layers)


def test_every_layer_is_a_marker_of_its_kind_and_every_block_a_mean(report):
    first, second = plot_sparsity({"$one": report, "two": report}, lowest=0.4).axes
    assert [panel.get_title() for panel in (first, second)] == ["$one", "two"]
    assert not first.title.get_parse_math() and first.get_ylim() == (pytest.approx(0.37), 1.03)
    lines = {line.get_label(): line for line in first.get_lines()}
    shares = report["by_layer"]
    number = {name: int(next(x for x in name.split(".") if x.isdigit())) for name in shares}
    for kind, (colour, marker, fill) in KINDS.items():
        line = lines[f"{kind} layer"]
        assert (line.get_color(), line.get_marker(), line.get_fillstyle()) == (colour, marker, fill)
        expected = [(number[name], x) for name, x in shares.items() if layer_kind(name) == kind]
        assert sorted(map(tuple, line.get_xydata())) == sorted(expected)
    vision = lines[f"vision ({report['by_modality']['vision']:.1%})"]
    starts = [f"visual_encoder.blocks.{block}." for block in (0, 1)]
    means = [fmean(x for name, x in shares.items() if name.startswith(start)) for start in starts]
    assert list(vision.get_xdata()) == [0, 1] and vision.get_color() == KINDS["vision"][0]
    assert vision.get_ydata() == pytest.approx(means)
    overall = f"overall ({report['overall']:.1%})"
    assert set(lines[overall].get_ydata()) == {report["overall"]}
    assert sorted(x.get_text() for x in first.get_legend().get_texts()) == sorted(lines)


def test_layers_of_a_foreign_model_count_to_the_modality_that_was_found():
    layers = {"stem": 0.2, "encoder.3.fc": 0.4, "encoder.3.out": 0.6, "encoder.10": 0.8, "head": 1}
    report = {"overall": 0.6, "by_modality": {"other": 0.6}, "by_layer": layers}
    (panel,) = plot_sparsity({"ViT": report}).axes
    markers, means, _ = panel.get_lines()
    assert markers.get_label() == "other layer" and means.get_label() == "other (60.0%)"
    assert list(markers.get_xdata()) == [0, 3, 3, 10, 10]
    assert list(means.get_xdata()) == [0, 3, 10]
    assert means.get_ydata() == pytest.approx([0.2, 0.5, 0.9])
