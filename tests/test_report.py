"""The page of a report, parsed; runs are folders written here, with a tiny captioner's weights."""

import base64
import io
import json
import os
import shlex
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ComputeID
import train_caption
from configs import load_config
from data.caption_dataset import build_caption_datasets
from models import build_captioner, prunable_layers
from models.checkpoint import stored_tensors
from pruners import sparsity_report
from reports import page, report
from reports.runs import RunFolder, read_run
from tests.runs import make_scenes, write_config
from utils import UserError, write_json

NASTY = "a <b>red</b> </dd> & \"blue\" 'star' &lt; é \ud83d"


class Page(HTMLParser):
    """What a reader sees: texts by tag, cells by line of a table, and images' sources."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.lines, self.images, self.tags, self.open = {}, [], [], set(), []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        if tag in ("img", "meta"):
            return
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.lines.append([])
        if tag in ("th", "td"):
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts[self.open[-1]][-1] += text
            if self.open[-1] in ("th", "td"):
                self.lines[-1][-1] += text

    def line(self, name) -> list[str]:
        (found,) = (cells[1:] for cells in self.lines if cells[0] == name)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense run that was evaluated alone, and one that was pruned with IDs and evaluated."""
    root = tmp_path_factory.mktemp("report")
    config_file = write_config(root / "c.yaml", make_scenes(root / "scenes"))
    torch.manual_seed(0)
    config = load_config(config_file)
    model = build_captioner(config)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    layers = prunable_layers(model)
    write_json(root / "ids.json", {name: 3.0 + n for n, name in enumerate(layers)})
    records = json.loads((root / "scenes/annotation/coco_karpathy_test.json").read_text())
    annotation = json.loads((root / "scenes/annotation/coco_karpathy_test_gt.json").read_text())
    ids = [image["id"] for image in annotation["images"]]
    assert len(records) == len(ids) == 6
    for name in ("dense", "a&b"):
        folder = root / name
        flags = ["--config", config_file, "--output_dir", str(root), "--model_dir", name]
        if name == "a&b":
            for layer in layers.values():
                layer.weight.data[: len(layer.weight) // 2] = 0
            args = train_caption.parse_args(
                [*flags, "--id_profile", str(root / "ids.json"), "--seed", "0", "--compile"]
            )
            write_json(folder / "config.json", {"config": config, "flags": vars(args)})
            end = {"remaining_ratio": args.final_threshold}
            (folder / "log.txt").write_text(f'{{"remaining_ratio": 0.9}}\n{json.dumps(end)}\n')
        folder.mkdir(exist_ok=True)
        tensors = {n: t.clone() for n, t in stored_tensors(model)}
        save_file(tensors, folder / "pruned.safetensors")
        args = train_caption.parse_args([*flags, "--evaluate", "--pruned", str(folder)])
        write_json(folder / "evaluation.json", {"config": config, "flags": vars(args)})
        write_json(folder / "sparsity.json", sparsity_report(layers))
        captions = [{"image_id": i, "caption": f"{name} {i} {NASTY}"} for i in ids]
        write_json(folder / "results/test.json", captions)
        scores = {"CIDEr": 1.25, "Bleu_4": 0.5, "METEOR": 0.3}
        write_json(folder / "results/test_scores.json", {"scores": scores})
    return root, model, ids


@pytest.fixture(scope="module")
def read(runs):
    """The page, and what the command printed."""
    root, *_ = runs
    report.main(report.parse_args([str(root / "dense"), str(root / "a&b")]))
    return Page((root / "report.html").read_text())


def test_the_page_needs_nothing_else(read):
    assert not read.tags & {"script", "link", "iframe", "object", "svg"}
    assert "url(" not in read.texts["style"][0] and "@import" not in read.texts["style"][0]
    for source in read.images:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) >= 32


def test_scores_and_sparsity(read, runs):
    root, *_ = runs
    sparsity = json.loads((root / "a&b/sparsity.json").read_text())
    heads = [cells for cells in read.lines if cells[0] == ""]
    assert heads == [["", "dense", "a&b"]] * 2
    assert read.line("sparsity") == ["0.0%", f"{sparsity['overall']:.1%}"]
    assert read.line("vision") == ["0.0%", f"{sparsity['by_modality']['vision']:.1%}"]
    assert read.line("CIDEr") == ["1.250", "1.250"]
    assert read.line("BLEU-4") == ["0.500", "0.500"]


def test_a_run_that_has_not_ended_and_old_scores_are_told(runs, tmp_path):
    root, *_ = runs
    assert read_run(root / "a&b").remarks == [] == read_run(root / "dense").remarks
    shutil.copytree(root / "a&b", tmp_path / "copy")
    (tmp_path / "copy/log.txt").write_text('{"remaining_ratio": 0.7}\n')
    os.utime(tmp_path / "copy/pruned.safetensors", (time.time() + 60,) * 2)
    ended, older = read_run(tmp_path / "copy").remarks
    assert "copy has not ended: 70% of the weights remain, 20% are asked for" in ended
    assert "copy are older than its weights" in older
    report.main(report.parse_args([str(tmp_path / "copy"), "--out", str(tmp_path / "page.html")]))
    sentences = Page((tmp_path / "page.html").read_text()).texts["p"]
    assert f"T{ended[1:]}." in sentences and f"T{older[1:]}." in sentences
    (tmp_path / "copy/log.txt").write_text("{")
    with pytest.raises(UserError, match="log.txt is damaged"):
        read_run(tmp_path / "copy")


@pytest.mark.parametrize(
    ("newer", "older", "told"),
    [
        (["val.json", "val_scores.json"], [], True),  # of the validations of a second training
        (["test.json"], [], True),  # an evaluation that was stopped before the scores
        (["test.json", "test_scores.json"], ["val.json"], False),
    ],
)
def test_scores_are_old_whatever_else_is_newer_than_the_weights(runs, tmp_path, newer, older, told):
    root, *_ = runs
    folder = shutil.copytree(root / "a&b", tmp_path / "copy")
    weights = time.time() + 60
    os.utime(folder / "pruned.safetensors", (weights,) * 2)
    for names, when in ((newer, weights + 60), (older, weights - 60)):
        for name in names:
            (folder / "results" / name).touch()
            os.utime(folder / "results" / name, (when,) * 2)
    old = [remark for remark in read_run(folder).remarks if "older than its weights" in remark]
    assert len(old) == told


def test_size_and_speed(read, runs):
    _, model, _ = runs  # as it was pruned
    counts = {"parameters": torch.Tensor.numel, "nonzeros": torch.Tensor.count_nonzero}
    for what, count in counts.items():
        vision = sum(int(count(p)) for p in model.visual_encoder.parameters())
        whole = sum(int(count(p)) for p in model.parameters())
        assert read.line(f"{what}, vision")[1] == page.with_prefix(vision)
        assert read.line(f"{what}, language")[1] == page.with_prefix(whole - vision)
    elements = sum(p.numel() for p in model.parameters())
    assert read.line("bytes, dense float32") == [page.with_prefix(4 * elements)] * 2
    dense, effective = (read.line(f"multiply-adds, {x}, vision") for x in ("dense", "effective"))
    assert dense[0] == dense[1] == effective[0] != effective[1]
    assert all(float(ms) > 0 for ms in read.line("ms an image, sparse"))


def test_numbers_with_prefixes():
    numbers = [0, 7, 999, 1000, 12345, 1_130_000, 65.7e9, 1.2e12]
    shown = ["0", "7", "999", "1 k", "12.3 k", "1.13 M", "65.7 G", "1.2 T"]
    assert [page.with_prefix(number) for number in numbers] == shown
    below = [999.4, 999_400, 999_499_999, 999.4e9]
    assert [page.with_prefix(number) for number in below] == ["999", "999 k", "999 M", "999 G"]
    rounded_up = [999.6, 999_600, 999_999_999, 999.6e9]
    assert [page.with_prefix(number) for number in rounded_up] == ["1 k", "1 M", "1 G", "1 T"]


def test_every_picture_has_both_captions_as_they_were_written(read, runs):
    _, _, ids = runs
    assert read.texts["dt"] == ["dense", "a&b"] * 6
    written = NASTY.replace("\ud83d", "?")  # half a character, which no page can hold
    expected = [f"{name} {image} {written}" for image in ids for name in ("dense", "a&b")]
    assert read.texts["dd"] == expected


def test_eight_pictures_at_most_spread_over_the_split(runs, monkeypatch):
    root, _, ids = runs
    monkeypatch.setattr(page, "PICTURES", 3)
    html = page.build_page([report.read_run(root / "dense")], [None], "c").decode()
    shown = Page(html).texts["dd"]
    assert [text.split()[1] for text in shown] == [str(ids[n]) for n in (0, 2, 4)]


@pytest.mark.parametrize("root_key", ["ann_root", "image_root"])
def test_pictures_have_no_captions_of_other_data(runs, tmp_path, root_key):
    root, _, ids = runs
    folder = shutil.copytree(root / "dense", tmp_path / "other")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    roots = evaluation["config"]
    same = {key: os.path.relpath(roots[key]) for key in ("ann_root", "image_root")}

    def captioned_and_remarks(changes):
        write_json(folder / "evaluation.json", evaluation | {"config": roots | changes})
        found = [read_run(root / "dense"), read_run(folder), read_run(root / "a&b")]
        shown = Page(page.build_page(found, [None] * 3, "c").decode())
        return shown.texts["dt"], [text for text in shown.texts["p"] if "Without runs" in text]

    assert captioned_and_remarks(same) == (["dense", "other", "a&b"] * len(ids), [])
    other = {root_key: str(tmp_path)}
    left_out = "Without runs of another ann_root or image_root: other."
    assert captioned_and_remarks(other) == (["dense", "a&b"] * len(ids), [left_out])


def test_commands_give_the_flags_that_the_runs_had(read, runs):
    root, *_ = runs
    commands = [shlex.split(text) for text in read.texts["pre"]]
    assert [words[:2] for words in commands[:-1]] == [["python", "train_caption.py"]] * 3
    files = ["dense/evaluation.json", "a&b/config.json", "a&b/evaluation.json"]
    for words, file in zip(commands, files, strict=False):
        flags = json.loads((root / file).read_text())["flags"]
        assert vars(train_caption.parse_args(words[2:])) == flags
    assert commands[-1] == f"python -m reports.report {root}/dense {root}/a&b".split()


def test_the_command_of_a_profile_gives_the_flags_that_it_was_measured_with(tmp_path):
    data = make_scenes(tmp_path / "scenes")
    weights = str(tmp_path / "the weights.pt")
    config_file = write_config(tmp_path / "a config.yaml", data)
    file_with_weights = write_config(tmp_path / "another.yaml", data, pretrained=weights)
    torch.manual_seed(0)
    torch.save({"model": build_captioner(load_config(config_file)).state_dict()}, weights)

    def measured(*flags):
        flags = [*flags, "--Path", str(tmp_path / "the IDs")]
        ComputeID.main(asked := ComputeID.parse_args(flags))
        return asked

    def told(*flags):
        flags = [*flags, "--id_profile", str(tmp_path / "the IDs/profile.json")]
        args = train_caption.parse_args(flags)
        config = load_config(args.config, {"pretrained": args.pretrained})
        trained = {"config": config, "flags": vars(args)}
        run = RunFolder(tmp_path, None, {}, trained, None, {})
        return shlex.split(page.profile_command(run))

    asked = measured("--config", file_with_weights, "-n", "20")
    words = told("--config", file_with_weights)
    assert words[:2] == ["python", "ComputeID.py"] and len(words) == 10
    assert vars(ComputeID.parse_args(words[2:])) == vars(asked) | {"batch_size": 2}

    shared = ["--config", config_file, "--pretrained", weights]
    others = "--seed 7 --fraction 0.9 --keep_padding --save_distances --batch_size 5"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(7))
    dataset = build_caption_datasets(load_config(config_file))[0]
    (first,) = dataset.image_paths(int(order[0]))
    Path(first).write_bytes(b"")
    asked = measured(*shared, "-n", "20", *others.split(), "--skip_bad_images")
    words = told(*shared)
    assert words[:2] == ["python", "ComputeID.py"]
    assert ComputeID.parse_args(words[2:]) == asked

    measured("-s", "--seed", "8")  # of two commands, one alone gives other IDs
    assert told(*shared) == []


def test_figures_are_of_what_was_pruned_and_of_the_ids_that_weighted_it(read):
    titles = ["Scores", "Where sparsity went, by modality and layer"]
    titles += ["Intrinsic dimension by layer", "Size and speed", "Test pictures", "Commands"]
    assert read.texts["h2"] == titles
    assert len(read.images) == 1 + 1 + 6


def test_the_printed_table_has_size_and_speed(runs, capsys, tmp_path):
    root, *_ = runs
    out = tmp_path / "page.html"
    report.main(report.parse_args([str(root / "a&b"), "--out", str(out)]))
    lines = capsys.readouterr().out.splitlines()
    head, row = ([cell.strip() for cell in lines[n].split("|")[1:-1]] for n in (0, 2))
    assert head == ["run", "sparsity", "vision", "language", "CIDEr", "BLEU-4", "nonzeros"] + [
        "bytes",
        "compressed",
        "multiply-adds",
        "ms",
        "ms sparse",
    ]
    assert row[0] == "a&b" and row[4:6] == ["1.250", "0.500"]
    assert Page(out.read_text()).texts["pre"][-1].endswith(f"--out {out}")


@pytest.mark.parametrize(
    ("file", "content", "line", "cell"),
    [
        ("accuracy.json", {"dev": 0.875, "test": 0.9}, "dev accuracy", "87.5%"),
        (
            "recalls.json",
            {"test": dict(txt_r1=12.5, txt_r5=20.0, img_r1=10.0, img_r5=18.0, r_mean=30.0)},
            "TR@1",
            "12.5%",
        ),
    ],
)
def test_what_a_run_of_another_task_lacks_is_left_out(tmp_path, file, content, line, cell):
    sparsity = {"overall": 0.5, "by_modality": {"vision": 0.25, "language": 1.0}, "pruned": 5}
    sparsity["by_layer"] = {"visual.transformer.resblocks.0.mlp.c_fc": 0.5}
    write_json(tmp_path / "run/sparsity.json", sparsity)
    write_json(tmp_path / "run/results" / file, content)
    report.main(report.parse_args([str(tmp_path / "run")]))
    read = Page((tmp_path / "report.html").read_text())
    assert read.line(line) == [cell]
    titles = ["Scores", "Where sparsity went, by modality and layer", "Commands"]
    assert read.texts["h2"] == titles and len(read.images) == 1


def test_runs_of_one_name_are_told_apart(tmp_path):
    sparsity = {"overall": 0.0, "by_modality": {}, "pruned": 0, "by_layer": {}}
    for folder in ("one/run", "two/run"):
        write_json(tmp_path / folder / "sparsity.json", sparsity)
    folders = [str(tmp_path / "one/run"), str(tmp_path / "two/run")]
    report.main(report.parse_args([*folders, "--out", str(tmp_path / "page.html")]))
    assert Page((tmp_path / "page.html").read_text()).lines[0] == ["", *folders]


def test_mistakes_name_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        report.main(report.parse_args([str(tmp_path)]))
    (tmp_path / "sparsity.json").write_text("{")
    with pytest.raises(UserError, match="sparsity.json is damaged"):
        report.main(report.parse_args([str(tmp_path)]))
    assert not (tmp_path.parent / "report.html").exists()
