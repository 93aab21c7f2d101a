"""Figures of results, by what their axes hold."""

import pytest

from dimension.figures import KINDS
from models import build_captioner, prunable_layers
from pruners import sparsity_report
from reports.figures import plot_sparsity


@pytest.fixture
def report(caption_tiny_config):
    layers = prunable_layers(build_captioner(caption_tiny_config))
    for number, layer in enumerate(layers.values()):
        layer.weight.data.view(-1)[: number + 1] = 0
    return sparsity_report(layers)


def test_every_layer_is_a_point_and_every_block_a_mean(report):
    panel, other = plot_sparsity({"one": report, "two": report}).axes
    assert (panel.get_title(), other.get_title()) == ("one", "two")
    lines = panel.get_lines()
    points = [line for line in lines if len(line.get_xdata()) == 1]
    found = sorted((int(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points)
    shares = report["by_layer"].items()
    number = {name: int(next(x for x in name.split(".") if x.isdigit())) for name, _ in shares}
    assert found == sorted((number[name], share) for name, share in shares)
    (vision,) = [line for line in lines if line.get_label().startswith("vision")]
    blocks = [[s for n, s in shares if n.startswith(f"visual_encoder.blocks.{b}.")] for b in (0, 1)]
    assert list(vision.get_xdata()) == [0, 1]
    assert vision.get_ydata() == pytest.approx([sum(block) / len(block) for block in blocks])


def test_all_shares_are_within_the_axes_and_modalities_have_their_colours(report):
    (panel,) = plot_sparsity({"one": report}).axes
    low, high = panel.get_ylim()
    assert low <= 0 and high >= 1
    assert panel.get_ylabel() == "share of zeros"
    assert panel.get_xlabel() == "transformer block"
    for kind in ("vision", "language"):
        (line,) = [line for line in panel.get_lines() if line.get_label().startswith(kind)]
        assert line.get_color() == KINDS[kind][0]


def test_labels_tell_the_shares(report):
    (panel,) = plot_sparsity({"one": report}).axes
    texts = [text.get_text() for text in panel.get_legend().get_texts()]
    assert texts == [
        *(f"{kind} ({share:.1%})" for kind, share in report["by_modality"].items()),
        f"overall ({report['overall']:.1%})",
    ]
    overall = next(line for line in panel.get_lines() if line.get_label().startswith("overall"))
    assert set(overall.get_ydata()) == {report["overall"]}
