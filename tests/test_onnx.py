"""ONNX files: the traced pieces by torch alone, and the files by onnxruntime where it is."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from configs import load_config
from data.images import open_image
from data.transforms import build_transform
from engine.tasks import TASKS
from models import onnx
from models.checkpoint import load_trained
from tests.conftest import ROOT
from utils import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")
TEXTS = ["a picture of a red circle", "a square above a ring", "a ring"]


@pytest.fixture(params=["caption", "nlvr", "retrieval"])
def shipped(request, tmp_path):
    """A shipped model, its config, and the flags of its export to `out`."""
    text = Path(f"configs/{request.param}_demo.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("datasets/scenes/tok", "pretrained/tok"))
    config = load_config(tmp_path / "c.yaml", task=request.param)
    model = TASKS[request.param].build_model(config).eval()
    load_trained(model, config["pretrained"])
    flags = ["--config", f"{tmp_path}/c.yaml", "--pruned", config["pretrained"], "--to", "onnx"]
    return model, config, [*flags, "--out", f"{tmp_path}/out"]


only = pytest.mark.parametrize("shipped", ["caption"], indirect=True)


@torch.no_grad()
def test_the_traced_pieces_compute_what_the_model_does(shipped):
    """Of other numbers of images and tokens than the traced ones, some padded.

    1e-5: values of 1 to 20, each a float32 sum of some hundred terms in another order.
    """
    model, config, _ = shipped
    programs = {name: piece.program() for name, piece in onnx.pieces(model, 64).items()}
    assert not any("mkldnn" in str(program.graph) for program in programs.values())  # of CPUs alone
    run = {name: program.module() for name, program in programs.items()}
    image, (ids, mask) = torch.rand(3, 3, 64, 64), model.tokenize(TEXTS)
    assert mask.min() == 0
    if config["task"] == "caption":
        ids = ids.clamp_min(1)  # pads would be seen
        embeds = model.encode_image(image)
        logits = model.text_decoder(ids, encoder_hidden_states=embeds).logits[:, -1]
        found, expected = run["decoder"](ids, *run["vision"](image)), logits.log_softmax(-1)
    elif config["task"] == "nlvr":
        found = run["model"](image, image.flip(0), ids, mask)
        expected = model.logits_from_ids(image, image.flip(0), ids, mask)
    else:
        found = model.logit_scale.exp() * run["vision"](image) @ run["text"](ids).T
        expected = model.logits_from_ids(image, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_onnx
def test_the_files_are_checked_and_the_documented_reader_captions_as_torch_does(
    shipped, tmp_path, capsys, monkeypatch
):
    model, config, flags = shipped
    export.main(export.parse_args(flags))
    shown = re.search(r"torch's within (\S+) of the largest", capsys.readouterr().out)
    assert float(shown.group(1)) < 1e-5
    monkeypatch.setattr(onnx, "MOST_APART", 1e-9)
    name, piece = onnx.pieces(model, 64).popitem()
    with pytest.raises(RuntimeError, match="apart from torch's"):
        onnx.difference(piece, tmp_path / "out" / f"{name}.onnx")
    if config["task"] == "caption":
        page, picture = (ROOT / "docs/onnx.md").read_text(), str(ROOT / "tests/some.jpg")
        reader = re.search(r"(?:^    import .*\n)(?:^(?:    .*)?\n)+", page, re.MULTILINE).group()
        reader = re.sub("^    ", "", reader, flags=re.MULTILINE)
        command = [sys.executable, "-c", reader, str(tmp_path / "out"), picture]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        image = build_transform(64, augment=False)(open_image(picture))[None]
        assert [shown.strip()] == model.generate(image, num_beams=1, max_length=40) != [""]


@only
def test_what_surrounds_the_model_is_written_and_what_export_asks_for(
    shipped, tmp_path, monkeypatch
):
    model, config, flags = shipped
    monkeypatch.setattr(onnx, "pieces", lambda *_: {})  # which want the packages
    assert onnx.write_folder(model, config, tmp_path) == "not checked: pip install onnxruntime"
    written = json.loads((tmp_path / "config.json").read_text())
    lengths = {"end_id": 3, "min_length": 5, "max_length": 40, "image_size": 64}
    assert written.items() >= {"prompt_ids": [77, 5, 47, 40], **lengths}.items()
    words = (tmp_path / "vocab.txt").read_text().split()
    assert [words[i] for i in written["prompt_ids"][1:]] == ["a", "picture", "of"]
    with pytest.raises(UserError, match="--to onnx writes float32"):
        export.main(export.parse_args([*flags, "--dtype", "float16"]))
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript, and onnxruntime"):
        export.main(export.parse_args(flags))
    assert not (tmp_path / "out").exists()
