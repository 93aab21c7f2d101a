"""Configs: what the shipped ones hold, and what is wrong with others."""

from pathlib import Path

import pytest

from configs import REQUIRED, SCHEMAS, load_config
from utils import UserError

CONFIGS = sorted(path for path in Path("configs").glob("*.yaml"))
COCO = "configs/caption_coco.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path):
    config = load_config(path)
    assert set(config) == {"task", *SCHEMAS[config["task"]]}
    assert REQUIRED not in config.values()


def test_configs_hold_the_papers_values_and_overrides_replace_them():
    config = load_config(COCO, {"max_epoch": 7, "batch_size": None})
    assert config["init_lr"] == 1e-5 and isinstance(config["init_lr"], float)
    assert (config["image_size"], config["num_beams"], config["max_epoch"]) == (384, 3, 7)
    assert config["batch_size"] == config["eval_batch_size"] == 20
    config = load_config("configs/nlvr.yaml")  # which has the original's names
    assert (config["batch_size"], config["eval_batch_size"]) == (10, 64)


def test_places_are_read_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = load_config(COCO, {"image_root": "~/coco", "ann_root": "$DATA/annotation"})
    assert (config["image_root"], config["ann_root"]) == ("/home/me/coco", "/data/annotation")


def test_relative_places_are_sought_beside_the_config_first(tmp_path, monkeypatch):
    config, here = Path(COCO).resolve(), tmp_path / "here"
    own = tmp_path / "project/configs/own.yaml"
    for folder in (own.parent, here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert load_config(config)["id_profile"] == str(config.parent / "id/blip_coco.json")
    text = config.read_text().replace("med_config: configs/med_config.json\n", "")
    text = text.replace("ann_root: annotation", "ann_root: nowhere")
    own.write_text(text.replace("image_root: datasets/coco", "image_root: pictures"))
    assert load_config(own)["ann_root"] == "nowhere"
    for place in (here, own.parent.parent, own.parent):  # the nearer goes first
        (place / "pictures").mkdir()
        expected = "pictures" if place == here else str(place / "pictures")
        assert load_config(own)["image_root"] == expected
    assert load_config(own)["med_config"] == str(config.parent / "med_config.json")  # the default
    given = {"image_root": "pictures"}  # a flag's value, which is of the working folder
    assert load_config(own, given)["image_root"] == "pictures"
    (own.parent / "clip").mkdir()
    own.write_text((config.parent / "retrieval_flickr_clip.yaml").read_text())
    assert load_config(own)["tokenizer"] == "clip"  # a name, whatever lies beside


@pytest.mark.parametrize(
    ("encoding", "line_end"), [("utf-8", "\r\n"), ("utf-8-sig", "\n"), ("utf-16", "\r\n")]
)
def test_configs_as_other_systems_write_them(encoding, line_end, tmp_path):
    text = Path(COCO).read_text().replace("\n", line_end)
    (tmp_path / "c.yaml").write_bytes(text.encode(encoding))
    assert load_config(tmp_path / "c.yaml") == load_config(COCO)


BAD = [  # what is replaced ("" adds a line), by what, and the sentence
    ("", "batchsize: 3", "unknown keys .*batchsize"),
    ("", "batch_size_train: 3", "batch_size_train and batch_size mean the same"),
    ("", "batch_size: 7", 'duplicate key "batch_size" .*line 30, column 1'),
    ("", f"max_tokens: 1{'0' * 400}", "max_position_embeddings 512"),
    ("", "max_tokens: 1", "max_tokens is 1, but must be a whole number of at least 2"),
    ("", "max_tokens: 1000", "max_tokens is 1000, but .*_embeddings 512"),
    ("image_root:", "#", "missing keys .*image_root"),
    ("image_size: 384", "image_size: big", "image_size is 'big'"),
    ("augment: true", "augment: 1", "augment is 1"),
    ("ion: total", "ion: Total", "'Total', but must be one of total"),
    ("vit: base", "vit: huge", "'huge', but must be one of tiny, base"),
    ("num_beams: 3", "num_beams: true", "num_beams is True, but"),
    ("num_beams: 3", "num_beams: 0", "whole number from 1 to"),
    ("num_beams: 3", "num_beams: 20000", "vocab_size 30524"),
    ("init_lr: 1e-5", "init_lr: .nan", "a number from 0 to 10"),
    ("max_length: 20", "max_length: 513", "max_position_embeddings 512"),
    ("max_length: 20", "max_length: 4", "5 is above max_length 4"),
    (None, "- a list", "mapping"),
    (None, "a: [", "cannot read"),
    (None, "a: !!python/object/apply:os.getcwd []", "cannot read"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_configs_are_named(tmp_path, old, new, message):
    path, text = tmp_path / "bad.yaml", Path(COCO).read_text()
    path.write_text(text.replace(old, new) if old else new if old is None else f"{text}{new}\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert "bad.yaml" in str(error.value)


def test_values_at_the_ends_of_their_ranges():
    ends = {"min_length": 20, "init_lr": 10, "max_tokens": 512, "num_beams": 15262}
    config = load_config(COCO, ends)
    assert {key: config[key] for key in ends} == ends
    assert isinstance(config["init_lr"], float)  # whole numbers are numbers
