"""ONNX files: the traced pieces by torch alone, and the files by onnxruntime where it is."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import export
from configs import load_config
from data.transforms import build_transform
from models import build_captioner, build_clip, build_nlvr, onnx
from models.checkpoint import load_trained
from tests.conftest import ROOT
from utils import UserError

TASKS = {
    "caption": "blip_tiny_caption",
    "nlvr": "blip_tiny_nlvr",
    "retrieval": "clip_tiny_retrieval",
}
BUILD = {"caption": build_captioner, "nlvr": build_nlvr, "retrieval": build_clip}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")


def shipped(task: str, folder: Path):
    """A shipped model, and the flags of its export."""
    text = Path(f"configs/{task}_demo.yaml").read_text()
    config = folder / f"{task}.yaml"
    config.write_text(re.sub("^tokenizer:.*", "tokenizer: pretrained/tokenizer", text, flags=re.M))
    weights = f"pretrained/{TASKS[task]}.safetensors"
    model = BUILD[task](load_config(config, task=task)).eval()
    load_trained(model, weights)
    flags = ["--config", str(config), "--pruned", weights, "--to", "onnx"]
    return model, [*flags, "--out", str(folder / "out")]


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Three drawn scenes."""
    from tests.runs import make_scenes

    data = make_scenes(tmp_path / "scenes", train=6, held_out=3)
    return sorted((data / "images/test").iterdir())


def pixels(pictures: list[Path]) -> torch.Tensor:
    transform = build_transform(64, augment=False)
    return torch.stack([transform(Image.open(picture).convert("RGB")) for picture in pictures])


def greedy(vision, decoder, image: torch.Tensor, model) -> list[str]:
    """Captions by the two pieces, functions of tensors; prompt and lengths as in the demo."""
    keys, values = vision(image)
    prompt = model.tokenize(["a picture of "])[0][:, :4]
    ids, end = prompt.expand(len(image), -1), model.tokenizer.sep_token_id
    while ids.shape[1] < 40:
        scores = decoder(ids, keys, values)
        scores[:, end] -= torch.inf if ids.shape[1] < 5 else 0
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], dim=1)
    texts = [row[4:].tolist() for row in ids]
    texts = [row[: row.index(end)] if end in row else row for row in texts]
    return [model.tokenizer.decode(row) for row in texts]


def test_the_traced_pieces_of_the_captioner_caption_as_it_does(tmp_path, pictures):
    """With other numbers of images and tokens than the traced ones."""
    model, _ = shipped("caption", tmp_path)
    pieces = onnx.pieces(model, 64)
    programs = [pieces[name].program() for name in ("vision", "decoder")]
    assert not any("mkldnn" in str(program.graph) for program in programs)  # which ONNX lacks
    vision, decoder = (program.module() for program in programs)
    for some in (pictures, pictures[:1]):
        image = pixels(some)
        with torch.no_grad():
            found = greedy(vision, decoder, image, model)
        assert found == model.generate(image, num_beams=1, max_length=40) and all(found)


def test_the_traced_towers_of_clip_and_the_classifier_are_the_models(tmp_path):
    """1e-5: outputs of about 1 to 10, each a float32 sum of some hundred terms in another order."""
    image, texts = torch.rand(3, 3, 64, 64), ["a red circle", "a square above a ring", "a ring"]
    clip, _ = shipped("retrieval", tmp_path)
    towers = {name: piece.program().module() for name, piece in onnx.pieces(clip, 64).items()}
    ids, _ = clip.tokenize(texts)
    with torch.no_grad():
        cosines = towers["vision"](image) @ towers["text"](ids).T
        expected = clip.logits_from_ids(image, ids)
    torch.testing.assert_close(clip.logit_scale.exp() * cosines, expected, atol=1e-5, rtol=1e-5)

    nlvr, _ = shipped("nlvr", tmp_path)
    text = nlvr.tokenize(texts)
    assert text[1].min() == 0  # padded
    with torch.no_grad():
        logits = onnx.pieces(nlvr, 64)["model"].program().module()(image, image.flip(0), *text)
        expected = nlvr.logits_from_ids(image, image.flip(0), *text)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@needs_onnx
def test_the_documented_reader_captions_as_torch_does(tmp_path, pictures):
    model, flags = shipped("caption", tmp_path)
    export.main(export.parse_args(flags))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "decoder.onnx",
        "vision.onnx",
        "vocab.txt",
    ]
    page = (ROOT / "docs/onnx.md").read_text()
    reader = re.search(r"(?:^    import .*\n)(?:^(?:    .*)?\n)+", page, re.MULTILINE).group()
    (tmp_path / "reader.py").write_text(re.sub("^    ", "", reader, flags=re.MULTILINE))
    expected = model.generate(pixels(pictures), num_beams=1, max_length=40)
    for picture, caption in zip(pictures, expected, strict=True):
        command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "out"), str(picture)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == caption != ""


@needs_onnx
@pytest.mark.parametrize("task", ["nlvr", "retrieval"])
def test_files_of_the_other_tasks_are_checked(tmp_path, capsys, monkeypatch, task):
    model, flags = shipped(task, tmp_path)
    export.main(export.parse_args(flags))
    shown = re.search(r"torch's within (\S+) of the largest", capsys.readouterr().out)
    assert float(shown.group(1)) < 1e-5
    monkeypatch.setattr(onnx, "MOST_APART", 1e-9)
    name, piece = onnx.pieces(model, 64).popitem()
    with pytest.raises(RuntimeError, match="apart from torch's"):
        onnx.difference(piece, tmp_path / "out" / f"{name}.onnx")


def test_what_surrounds_the_model_is_written(tmp_path, monkeypatch):
    """Without the packages, whose part is left out."""
    monkeypatch.setattr(onnx, "pieces", lambda *_: {})
    model, flags = shipped("caption", tmp_path)
    said = onnx.write_folder(model, load_config(flags[1], task="caption"), tmp_path)
    assert said == "not checked: pip install onnxruntime"
    config = json.loads((tmp_path / "config.json").read_text())
    lengths = {"end_id": 3, "min_length": 5, "max_length": 40, "image_size": 64}
    assert config.items() >= {"prompt_ids": [77, 5, 47, 40], **lengths}.items()
    words = (tmp_path / "vocab.txt").read_text().split()
    assert [words[i] for i in config["prompt_ids"][1:]] == ["a", "picture", "of"]


def test_what_export_asks_for(tmp_path, monkeypatch):
    _, flags = shipped("caption", tmp_path)
    with pytest.raises(UserError, match="--to onnx writes float32"):
        export.main(export.parse_args([*flags, "--dtype", "float16"]))
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript, and onnxruntime"):
        export.main(export.parse_args(flags))
    assert not (tmp_path / "out").exists()
