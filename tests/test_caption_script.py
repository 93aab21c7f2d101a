import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caption
from data.scenes.words import vocabulary
from data.transforms import build_transform
from engine import captioning
from models import build_captioner
from tests.conftest import read_golden
from utils import UserError, launch

PICTURE = Path(__file__).parent / "some.jpg"


def run(*argv):
    caption.main(caption.parse_args([str(arg) for arg in argv]))


def test_the_shipped_vocabulary_is_the_scenes():
    lines = (caption.ROOT / "pretrained" / "tokenizer" / "vocab.txt").read_text().splitlines()
    assert lines == vocabulary()


def test_the_embedded_model_captions_from_any_folder_until_its_reader_leaves(tmp_path):
    script = [sys.executable, caption.ROOT / "caption.py", PICTURE, PICTURE, PICTURE]
    with subprocess.Popen(
        script, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        name, text = process.stdout.readline().strip().split(": ")
        process.stdout.close()
        told = process.stderr.read()
    assert name == str(PICTURE)
    # what the picture shows; how it is put may turn on the last bit
    assert "large yellow circle" in text
    assert "small orange star" in text
    first, second = told.splitlines()
    assert "small embedded model" in first and "loaded" in second
    assert process.returncode == 141


def test_another_broken_pipe_is_no_reader_that_left(monkeypatch, tmp_path):
    def main(args):
        raise BrokenPipeError

    with open(tmp_path / "out", "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            launch(main, None)


def test_json_lines(capsys):
    run(PICTURE, PICTURE, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(PICTURE)] * 2
    assert "circle" in rows[0]["caption"]


def test_folders_give_their_pictures_in_order(tmp_path, capsys):
    for name in ("b.jpg", "a.JPG", "note.txt"):
        shutil.copy(PICTURE, tmp_path / name)
    run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / n) for n in ("a.JPG", "b.jpg")
    ]


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no pictures in the folder {tmp_path}"):
        run(tmp_path)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_unreadable_picture_is_reported_and_the_others_go_on(tmp_path, capsys, as_json):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing else")
    places = [tmp_path / "missing.jpg", PICTURE, tmp_path / "broken.png", PICTURE]
    with pytest.raises(UserError, match="2 of 4 pictures could not be read"):
        run(*places, *(["--json"] if as_json else []))
    out, err = capsys.readouterr()
    if as_json:
        rows = [json.loads(line) for line in out.splitlines()]
        assert [("caption" in row, "error" in row) for row in rows] == [(0, 1), (1, 0)] * 2
    else:
        assert [line.split(": ")[0] for line in out.splitlines()] == [str(PICTURE)] * 2
        assert f"{tmp_path / 'missing.jpg'}: cannot be read" in err
        assert f"{tmp_path / 'broken.png'}: cannot be read" in err


def test_pictures_of_many_kinds_are_opened(tmp_path):
    picture = Image.open(PICTURE)
    for name, mode in [("a.png", "RGBA"), ("b.gif", "P"), ("c.bmp", "L"), ("d.tif", "CMYK")]:
        picture.convert(mode).save(tmp_path / name)
        image = caption.open_upright(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", picture.size)


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    Image.fromarray(np.full((4, 6), 128 * 256 + 7, np.uint16)).save(tmp_path / "grey.png")
    assert caption.open_upright(tmp_path / "grey.png").getpixel((2, 2)) == (128, 128, 128)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_respected(tmp_path, suffix):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(tmp_path / f"turned.{suffix}", exif=exif)
    image = caption.open_upright(tmp_path / f"turned.{suffix}")
    assert image.size == (20, 40)
    top, bottom = image.getpixel((10, 5)), image.getpixel((10, 35))
    assert top[2] > 200 > 50 > top[0]
    assert bottom[0] > 200 > 50 > bottom[2]


def test_missing_pictures_are_reported_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(captioning, "load_captioner", None)  # called, it raises TypeError
    with pytest.raises(UserError, match="1 of 1 pictures could not be read"):
        run("missing.jpg")
    assert "missing.jpg: cannot be read: there is no such file" in capsys.readouterr().err
    with pytest.raises(TypeError):
        run("missing.jpg", PICTURE)
    assert "missing.jpg: cannot be read" in capsys.readouterr().err


@pytest.fixture
def tiny(caption_tiny_config, tmp_path):
    """A config file at the goldens' sizes, and the captioner with the goldens' weights."""
    config = caption_tiny_config | {
        "image_root": "x",
        "ann_root": "x",
        "coco_gt_root": "x",
        "batch_size": 1,
        "init_lr": 0.1,
        "max_epoch": 1,
        "num_beams": 2,
        "max_length": 9,
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    model = build_captioner(config).eval()
    model.load_state_dict(read_golden("caption_tiny", "weights."), strict=False)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    return tmp_path, model


def test_another_model(tiny, capsys):
    folder, model = tiny
    run(PICTURE, "--config", folder / "tiny.yaml", "--pruned", folder / "tiny.pth")
    out, err = capsys.readouterr()
    assert "embedded" not in err
    assert "loaded" in err
    pixels = build_transform(32, augment=False)(caption.open_upright(PICTURE))
    (expected,) = model.generate(pixels[None], 2, 9, 5)
    assert out == f"{PICTURE}: {expected}\n"


def test_sparse_layers_are_asked_for(tiny, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(captioning, "sparsify_", lambda model: made.append(model) or "all")
    folder, _ = tiny
    run(PICTURE, "--config", folder / "tiny.yaml", "--pruned", folder / "tiny.pth", "--sparse")
    assert len(made) == 1
    assert "all" in capsys.readouterr().err.splitlines()


def test_config_and_weights_go_together(tiny):
    folder, _ = tiny
    with pytest.raises(UserError, match="--pruned goes with --config"):
        run(PICTURE, "--pruned", folder / "tiny.pth")
    with pytest.raises(UserError, match=r"tiny\.yaml names no pretrained weights: give --pruned"):
        run(PICTURE, "--config", folder / "tiny.yaml")
