"""The page, the tables and the figures of runs."""

import base64
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from configs import load_config
from dimension.figures import KINDS, layer_kind
from dimension.profile import IDProfile, LayerID
from engine.checkpoints import save_weights
from models import build_captioner, prunable_layers
from pruners import sparsity_report
from reports import page, report
from reports.figures import plot_sparsity
from reports.runs import read_run
from tests.conftest import ROOT
from tests.runs import write_config
from utils import UserError, write_json

# --- the page, parsed; runs are folders written here, with a tiny captioner's weights


NASTY = "a two <b>red</b> </dd> & \"blue\" 'star' &lt; é \ud83d"
REFERENCES = ["a red star", "Two stars."]
ARGV = ["train_caption.py", "--model_dir", "a&b", "--pruned", "a b"]


class Page:
    """What a reader sees: texts by tag, and cells by the name of a table's line."""

    def __init__(self, content: bytes):
        self.root = ElementTree.fromstring(content)
        tables = [[read(cell) for cell in line] for line in self.root.iter("tr")]
        self.lines = {name: cells for name, *cells in tables}
        self.pictures = [image.get("src") for image in self.root.iter("img")]

    def texts(self, tag: str) -> list[str]:
        return [read(element) for element in self.root.iter(tag)]


def read(element) -> str:
    return "".join(element.itertext())


def change(folder: Path, key: str, value) -> None:
    """Changes a value of the config of a run's evaluation."""
    record = json.loads((folder / "evaluation.json").read_text())
    record["config"][key] = str(value)
    write_json(folder / "evaluation.json", record)


def page_of(*folders: Path) -> Page:
    """The page without what takes seconds to measure."""
    return Page(page.build_page({x.name: read_run(x) for x in folders}, {}, "the command"))


def write_report(*argv) -> None:
    report.main(report.parse_args([str(x) for x in argv]))


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """The runs of a working folder, which is not the tests' own, with paths from there in their
    records: a dense one that an earlier version wrote, and one that was pruned with IDs.
    """
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(scenes, root / "scenes")
    config = load_config(write_config(root / "c.yaml", root / "scenes"))
    model = build_captioner(config)
    config = json.loads(json.dumps(config).replace(f"{root}/", ""))
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    layers = prunable_layers(model)
    write_json(root / "ids.json", {name: 3.0 + n for n, name in enumerate(layers)})
    annotation = json.loads((root / "scenes/annotation/coco_karpathy_test_gt.json").read_text())
    ids = [image["id"] for image in annotation["images"]]

    def write(name: str, cider: float, **argv):
        flags = {"config": "c.yaml", "output_dir": "out", "pruned": f"out/{name}"}
        captions = [{"image_id": i, "caption": f"{name} {i} {NASTY}"} for i in ids]
        files = {
            "sparsity.json": sparsity_report(layers),
            "results/test.json": captions,
            "results/test_scores.json": {"scores": {"CIDEr": cider, "Bleu_4": 0.5}},
            "evaluation.json": {"config": config, "flags": flags, **argv},
        }
        for file, content in files.items():
            write_json(root / "out" / name / file, content)
        weights = root / "out" / name / "pruned.safetensors"
        save_weights(model, weights)
        os.utime(weights, (0, 0))

    write("dense", 5.158)
    for layer in layers.values():
        layer.weight.data[: len(layer.weight) // 2] = 0
    write("a&b", 4.25, argv=ARGV)
    flags = {"config": "c.yaml", "output_dir": "out", "model_dir": "a&b", "id_profile": "ids.json"}
    record = {"config": config, "flags": flags | {"final_threshold": 0.2}, "argv": ARGV[:1]}
    write_json(root / "out/a&b/config.json", record)
    (root / "out/a&b/log.txt").write_text('{"remaining_ratio": 0.9}\n{"remaining_ratio": 0.2}\n')
    references = [{"image_id": i, "references": REFERENCES} for i in ids]
    write_json(root / "out/a&b/results/test_images.json", references)
    return root / "out", model, ids


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The page of both runs, and its file."""
    root, *_ = runs
    out = tmp_path_factory.mktemp("page") / "page.html"
    write_report(root / "dense", root / "a&b", "--out", out)
    return Page(out.read_bytes()), out


def test_the_page_needs_nothing_else_and_has_a_dark_form(whole):
    shown, _ = whole
    assert not {"script", "link", "iframe", "object", "svg"} & {x.tag for x in shown.root.iter()}
    (style,) = shown.texts("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert len(shown.pictures) == 1 + 1 + 6  # sparsity, IDs, test pictures
    for source in shown.pictures:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert min(Image.open(io.BytesIO(data)).size) >= 32


def test_it_begins_with_what_was_found_and_has_every_section(whole, runs):
    shown, _ = whole
    sparsity = json.loads((runs[0] / "a&b/sparsity.json").read_text())
    overall, vision = sparsity["overall"], sparsity["by_modality"]["vision"]
    found = f"At {100 * overall:.3g} % sparsity CIDEr falls from 5.16 to 4.25 (a&b)."
    assert shown.texts("p")[0] == found
    titles = ["Scores", "Where sparsity went, by modality and layer"]
    titles += ["Intrinsic dimension by layer", "Size and speed", "Test pictures", "Commands"]
    assert shown.texts("h2") == titles
    assert shown.lines["sparsity"] == ["0.0%", f"{overall:.1%}"]
    assert shown.lines["vision"] == ["0.0%", f"{vision:.1%}"]
    assert shown.lines["CIDEr"] == ["5.158", "4.250"] and shown.lines["BLEU-4"] == ["0.500"] * 2


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"dense": (0.001, 5), "a": (0.9, 5.2), "b": (0.9, 4)}, "At 90 % sparsity CIDEr goes from"),
        ({"dense": (0, 5), "a": (0.8, 6)}, "80 % sparsity CIDEr rises from 5.00 to 6.00 (a)."),
        ({"dense": (0, 5), "a": (0.8, 4.5), "b": (0.975, 3)}, "to 4.50 (a); at 97.5 % sparsity"),
        ({"dense": (0, 5)}, "Without pruning CIDEr is 5.00."),
        ({"a": (0.5, 4), "b": (0.5, 3)}, "At 50 % sparsity CIDEr is 4.00 (a) and 3.00 (b)."),
    ],
)
def test_what_was_found_at_each_sparsity(tmp_path, values, found):
    for name, (overall, cider) in values.items():
        write_json(tmp_path / name / "sparsity.json", {"overall": overall})
        scores = {"val": {"CIDEr": 1.0}, "test": {"loss": 1.0, "CIDEr": cider}}
        write_json(tmp_path / name / "results/scores.json", scores)
    assert found in page.finding({name: read_run(tmp_path / name) for name in values})


def test_size_and_speed(whole, runs):
    shown, _ = whole
    vision = sum(int(torch.count_nonzero(p)) for p in runs[1].visual_encoder.parameters())
    assert f"(vision {page.with_prefix(vision)}," in shown.lines["nonzeros"][1]
    dense, effective = (shown.lines[f"multiply-adds, {x}"] for x in ("dense", "effective"))
    assert dense[0] == dense[1] == effective[0] != effective[1]
    for cell in shown.lines["ms a sample, sparse"]:
        median, least, most = map(float, re.fullmatch(r"(\S+)\n\((\S+)–(\S+)\)", cell).groups())
        assert 0 < least <= median <= most
    shown = {0: "0", 999.6: "1 k", 12345: "12.3 k", 999_600: "1 M", 65.7e9: "65.7 G"}
    assert {number: page.with_prefix(number) for number in shown} == shown


def test_captions_as_they_were_written_beside_references_with_wrong_words_marked(whole, runs):
    shown, _ = whole
    ids = runs[2]
    assert shown.texts("dt") == ["dense", "a&b", "references"] * 6
    written = NASTY.replace("\ud83d", "?")  # half a character, which no page can hold
    captions = [[f"{name} {i} {written}" for name in ("dense", "a&b")] for i in ids]
    assert shown.texts("dd") == sum([[*pair, *REFERENCES] for pair in captions], [])
    first = next(shown.root.iter("dd"))
    assert [read(mark) for mark in first.iter("mark")] == f"dense {ids[0]} b b dd blue lt é".split()


@pytest.mark.parametrize("key", ["ann_root", "image_root", "references"])
def test_pictures_are_few_and_have_no_captions_of_other_data(runs, tmp_path, monkeypatch, key):
    monkeypatch.setattr(page, "PICTURES", 3)
    root, _, ids = runs
    folder = shutil.copytree(root / "a&b", root / f"other {key}")
    if key == "references":
        images = [{"image_id": i, "references": ["a cat"]} for i in ids]
        write_json(folder / "results/test_images.json", images)
    else:
        change(folder, key, tmp_path)
    shown = page_of(root / "a&b", folder)
    assert shown.texts("dt") == ["a&b", "references"] * 3
    captions = shown.texts("dd")[:: 1 + len(REFERENCES)]
    assert [text.split()[1] for text in captions] == [str(ids[n]) for n in (0, 2, 4)]
    left_out = f"Without runs of another ann_root or image_root: other {key}."
    assert left_out in shown.texts("p")


def test_commands_are_shown_as_they_were_typed_or_said_to_be_unknown(whole):
    shown, out = whole
    *commands, own = map(shlex.split, shown.texts("pre"))
    assert commands == [["python", "train_caption.py"], ["python", *ARGV]]
    assert own[:3] == ["python", "-m", "reports.report"] and own[-2:] == ["--out", str(out)]
    (unknown,) = [text for text in shown.texts("p") if "was recorded" in text]
    assert "of dense" in unknown and "a&b" not in unknown


def test_a_run_that_was_moved_shows_what_lies_in_its_folder_and_names_the_rest(runs, tmp_path):
    root, model, ids = runs
    folder = shutil.copytree(root / "a&b", tmp_path / "elsewhere/renamed")
    change(folder, "tokenizer", root.parent / "scenes/tokenizer")  # a place of its own
    moved = {"renamed": read_run(folder)}
    nonzeros = sum(map(torch.count_nonzero, model.parameters()))
    assert sum(page.measure_costs(moved)["renamed"]["nonzeros"].values()) == nonzeros
    (folder / "pruned.safetensors").unlink()
    found = page.measure_costs(moved)
    assert str(folder) in found["renamed"]
    shown = Page(page.build_page(moved, found, "the command"))
    assert shown.lines["CIDEr"] == ["4.250"] and len(shown.pictures) == 1
    assert shown.texts("dt") == ["renamed", "references"] * len(ids)
    left_out = f"Without renamed: {found['renamed']}."
    for lost in ("ID profile ids.json", "scenes/annotation/coco_karpathy_test.json", left_out):
        assert any(lost in text for text in shown.texts("p"))


def test_a_run_that_was_moved_with_what_it_needs_is_whole(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(runs[0].parent, tmp_path / "moved") / "out/a&b"
    shipped = "pretrained/blip_tiny_caption.safetensors"
    change(moved, "pretrained", shipped)
    run = read_run(moved)
    assert run.config["pretrained"] == str(ROOT / shipped)
    assert (run.weights, Path(run.id_profile)) == (moved, tmp_path / "moved/ids.json")
    assert run.config["tokenizer"] == str(tmp_path / "moved/scenes/tokenizer")
    published = page_of(moved).pictures
    assert len(published) == 1 + 1 + 6
    layers = json.loads((tmp_path / "moved/ids.json").read_text())
    IDProfile({}, {x: LayerID(i, 1.0, [i], 9, 0, 4) for x, i in layers.items()}).write(tmp_path)
    (tmp_path / "profile.json").rename(tmp_path / "moved/ids.json")  # which has error bars
    measured = page_of(moved).pictures
    assert published[0] == measured[0] and published[1] != measured[1]


def test_a_run_that_has_not_ended_and_old_scores_are_told(runs, tmp_path):
    root, *_ = runs
    assert read_run(root / "a&b").remarks == [] == read_run(root / "dense").remarks
    folder = shutil.copytree(root / "a&b", tmp_path / "copy")
    (folder / "results/val.json").touch()  # of a validation, which does not count
    os.utime(folder / "results/val.json", (-50, -50))
    assert read_run(folder).remarks == []
    os.utime(folder / "results/test_scores.json", (-50, -50))
    (folder / "log.txt").write_text('{"remaining_ratio": 0.7}\n')
    ended, older = read_run(folder).remarks
    assert "copy has not ended: 70% of the weights remain, 20% are asked for" in ended
    assert "copy are older than its weights" in older
    assert {ended, older} <= set(page_of(folder).texts("p"))
    (folder / "log.txt").write_text("{")
    with pytest.raises(UserError, match="log.txt is damaged"):
        read_run(folder)


def test_what_a_run_of_a_new_task_lacks_is_left_out(tmp_path):
    layers = {"visual.transformer.resblocks.0.mlp.c_fc": 0.5}
    sparsity = {"overall": 0.5, "by_modality": {"vision": 0.25}, "by_layer": layers, "pruned": 5}
    write_json(tmp_path / "run/sparsity.json", sparsity)
    write_json(tmp_path / "run/results/scores.json", {"val": {"x": 1}, "test": {"F1": 0.5}})
    write_report(tmp_path / "run")
    shown = Page((tmp_path / "report.html").read_bytes())
    assert shown.lines["F1"] == ["0.500"] and len(shown.pictures) == 1
    titles = ["Scores", "Where sparsity went, by modality and layer", "Size and speed", "Commands"]
    assert shown.texts("h2") == titles


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [str(tmp_path / "one/r\udcff"), str(tmp_path / "two/r\udcff")]
    for folder in folders:
        write_json(Path(folder, "sparsity.json"), {"overall": 0, "by_modality": {}, "pruned": 0})
    write_report(*folders, "--out", tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_bytes()).lines[""] == [
        x.replace("\udcff", "?") for x in folders
    ]


def test_mistakes_name_the_folder(tmp_path):
    write_json(tmp_path / "config.json", {"architectures": ["BlipModel"]})  # of Hugging Face
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        write_report(tmp_path)


# --- tables


RECALLS = {"txt_r1": 70.04, "txt_r5": 95.0, "txt_r10": 99.0, "img_r1": 65.0}
CAPTIONING = {"CIDEr": 5.1234, "Bleu_4": 0.5, "ROUGE_L": 0.1}


@pytest.mark.parametrize(
    ("file", "content", "columns", "cells"),
    [
        ("test_scores", {"scores": CAPTIONING}, "CIDEr | BLEU-4", "5.123 | 0.500"),
        ("accuracy", {"dev": 0.875}, "dev accuracy", "87.5%"),
        ("recalls", {"test": RECALLS}, "TR@1 | TR@5 | IR@1", "70.0% | 95.0% | 65.0%"),
    ],
)
def test_runs_of_each_task_are_tabulated(tmp_path, file, content, columns, cells):
    for name, sparsity in (("dense", 0.0), ("PLATON80", 0.8)):
        shares = {"overall": sparsity, "by_modality": {"vision": sparsity / 2, "language": 1.0}}
        write_json(tmp_path / name / "sparsity.json", shares)
        write_json(tmp_path / name / f"results/{file}.json", content)
    runs = [read_run(tmp_path / name) for name in ("dense", "PLATON80")]
    rows = [{"run": run.name, **run.shares, **run.scores} for run in runs]
    table = report.markdown(rows).splitlines()
    assert len({len(line) for line in table}) == 1
    head, _, *rows = [" ".join(line.split()) for line in table]
    assert head == f"| run | sparsity | vision | language | {columns} |"
    assert rows == [
        f"| dense | 0.0% | 0.0% | 100.0% | {cells} |",
        f"| PLATON80 | 80.0% | 40.0% | 100.0% | {cells} |",
    ]


# --- figures, by what their axes hold


def test_every_layer_is_a_marker_of_its_kind_and_every_block_a_mean(caption_tiny_config):
    layers = prunable_layers(build_captioner(caption_tiny_config))
    for count, layer in enumerate(layers.values(), start=1):
        layer.weight.data.view(-1)[:count] = 0
    report = sparsity_report(layers)
    (first,) = plot_sparsity("$one", report, lowest=0.4).axes
    assert first.get_title() == "$one" and not first.title.get_parse_math()
    assert first.get_ylim() == (pytest.approx(0.37), 1.03)
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
    (panel,) = plot_sparsity("ViT", report).axes
    markers, means, _ = panel.get_lines()
    assert markers.get_label() == "other layer" and means.get_label() == "other (60.0%)"
    assert list(markers.get_xdata()) == [0, 3, 3, 10, 10]
    assert list(means.get_xdata()) == [0, 3, 10]
    assert means.get_ydata() == pytest.approx([0.2, 0.5, 0.9])
