"""Configs: what the shipped ones hold, and what is wrong with others."""

from pathlib import Path

import pytest

from configs import REQUIRED, SCHEMAS, load_config

CONFIGS = sorted(path for path in Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path):
    config = load_config(path)
    assert set(config) == {"task", *SCHEMAS[config["task"]]}
    assert REQUIRED not in config.values()


def test_configs_hold_the_papers_values():
    config = load_config("configs/caption_coco.yaml", task="caption")
    assert config["init_lr"] == 1e-5 and isinstance(config["init_lr"], float)
    assert (config["image_size"], config["batch_size"], config["max_epoch"]) == (384, 20, 5)
    assert (config["num_beams"], config["max_length"], config["min_length"]) == (3, 20, 5)
    assert config["prompt"] == "a picture of "


def test_overrides_replace_and_none_does_not():
    config = load_config("configs/caption_coco.yaml", {"batch_size": 3, "init_lr": None})
    assert (config["batch_size"], config["init_lr"]) == (3, 1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text + "\nbatchsize: 3\n", "unknown keys .*batchsize"),
        (lambda text: text.replace("image_root:", "#"), "missing keys .*image_root"),
        (lambda text: text.replace("image_size: 384", "image_size: big"), "image_size is 'big'"),
        (lambda text: text.replace("augment: true", "augment: 1"), "augment is 1"),
        (lambda text: "- a list", "mapping"),
        (lambda text: "a: [", "cannot read"),
        (lambda text: "a: !!python/object/apply:os.getcwd []", "cannot read"),
    ],
)
def test_bad_configs_are_named(tmp_path, edit, message):
    path = tmp_path / "bad.yaml"
    path.write_text(edit(Path("configs/caption_coco.yaml").read_text()))
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert "bad.yaml" in str(error.value)
