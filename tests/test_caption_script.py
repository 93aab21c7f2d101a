import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import caption
from data.images import open_image
from data.scenes.words import vocabulary
from data.transforms import build_transform
from engine import captioning
from models import build_captioner
from tests.runs import write_model
from utils import UserError

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
    assert "large yellow circle" in text and "small orange star" in text
    first, second = told.splitlines()
    assert "small embedded model" in first and "loaded" in second
    assert process.returncode == 141


@pytest.fixture
def fast(monkeypatch):
    """A captioner that sees the size of a picture alone; notes what it is asked for."""
    loaded = []
    load = lambda *args: loaded.append(args) or (lambda image: f"{image.size}")  # noqa: E731
    monkeypatch.setattr(captioning, "load_captioner", load)
    return loaded


@pytest.mark.parametrize("as_json", [False, True])
def test_an_unreadable_picture_is_reported_and_the_others_go_on(tmp_path, capsys, fast, as_json):
    """A folder gives its pictures in order."""
    folder, broken, missing = (tmp_path / x for x in ("folder", "broken.png", "missing.jpg"))
    folder.mkdir()
    broken.write_bytes(b"\x89PNG nothing else")
    for name in ("b.jpg", "a.JPG", "note.txt"):
        shutil.copy(PICTURE, folder / name)
    with pytest.raises(UserError, match="1 of 1 pictures could not be read"):
        run(missing)
    assert fast == [] and capsys.readouterr()
    with pytest.raises(UserError, match="2 of 4 pictures could not be read"):
        run(missing, broken, folder, *["--json"] * as_json)
    out, err = capsys.readouterr()
    good, size = [str(folder / "a.JPG"), str(folder / "b.jpg")], str(Image.open(PICTURE).size)
    if as_json:
        first, second, *rows = map(json.loads, out.splitlines())
        assert "error" in first and "error" in second
        assert rows == [{"image": name, "caption": size} for name in good]
    else:
        assert out.splitlines() == [f"{name}: {size}" for name in good]
        assert f"{missing}: there is no such file" in err
        assert f"cannot read image {broken}: " in err


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation_is_respected(tmp_path, suffix):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(tmp_path / f"turned.{suffix}", exif=exif)
    image = open_image(tmp_path / f"turned.{suffix}", on_white=True)
    assert image.size == (20, 40)
    top, bottom = image.getpixel((10, 5)), image.getpixel((10, 35))
    assert top[2] > 200 > 50 > top[0]
    assert bottom[0] > 200 > 50 > bottom[2]


def test_another_model_dense_and_sparse(caption_tiny_config, tmp_path, monkeypatch, capsys):
    lengths = {"num_beams": 2, "max_length": 9}
    config = {**caption_tiny_config, "coco_gt_root": "x", **lengths}
    model, flags = write_model(build_captioner, config, tmp_path)
    pixels = build_transform(32, augment=False)(open_image(PICTURE, on_white=True))
    (expected,) = model.generate(pixels[None], **lengths)
    monkeypatch.setattr(captioning, "sparsify_", lambda model: "all are sparse")
    monkeypatch.setattr(captioning, "computes_bf16", lambda device: False)  # which rounds
    for sparse in ([], ["--sparse"]):
        run(PICTURE, *flags, *sparse)
        out, err = capsys.readouterr()
        assert out == f"{PICTURE}: {expected}\n"
        assert "embedded" not in err and "loaded" in err
        assert ("all are sparse" in err) == bool(sparse)
    with pytest.raises(UserError, match=r"model\.yaml names no pretrained weights: give --pruned"):
        run(PICTURE, *flags[:2])
