"""Checkpoints of every format, and the errors for files that are none."""

import json
import pickle
import re
from argparse import Namespace
from inspect import isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import (
    build_captioner,
    build_clip,
    build_nlvr,
    compressed,
    load_checkpoint,
    modality,
    prunable_layers,
    weight_files,
)
from models.checkpoint import hugging_face_name, load_trained
from models.weight_files import INDEX, fetch, open_weights
from tests.conftest import read_golden
from utils import UserError


@pytest.fixture
def weights():
    return read_golden("caption_tiny", "weights.")


@pytest.fixture
def model(caption_tiny_config):
    return build_captioner(caption_tiny_config)


POSITION_IDS = "text_decoder.bert.embeddings.position_ids"
NORM = "visual_encoder.norm.weight"


def assert_holds(model, weights):
    state = model.state_dict()
    assert set(state) == set(weights) - {POSITION_IDS}
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


def official(weights, path):
    torch.save({"model": weights, "config": {"vit": "tiny"}, "epoch": 4}, path)


def papers_pruned(weights, path):
    state = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 4}, path)


def lightnings(weights, path):
    state = {f"_orig_mod.module.model.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": state, "epoch": 1}, path)


def old_torch(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def hugging_face(weights, folder):
    """Two shards and their index, as transformers writes them; of tied weights only one."""
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    kept = {n: v for n, v in weights.items() if n.removeprefix("text_decoder.") not in tied}
    kept = {hugging_face_name(name): value.contiguous() for name, value in kept.items()}
    names, weight_map = sorted(kept), {}
    folder.mkdir()
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: kept[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def a_run(weights, folder):
    folder.mkdir()
    save_file(weights, folder / "pruned.safetensors")
    save_file({"noise": torch.ones(1)}, folder / "other.safetensors")


def ours_compressed(weights, path):
    compressed.write(path, weights.items())


FORMATS = [official, papers_pruned, lightnings, old_torch, hugging_face, a_run]
PREFIXES = {papers_pruned: ["module."], lightnings: ["_orig_mod.module.model."]}


@pytest.mark.parametrize("write", [*FORMATS, save_file, ours_compressed])
def test_every_format_loads(model, weights, tmp_path, write):
    """Files are known by their content: this name has no suffix."""
    write(weights, tmp_path / "weights")
    report = load_checkpoint(model, str(tmp_path / "weights"))
    assert_holds(model, weights)
    assert report.ignored == [POSITION_IDS]
    assert report.resampled == report.initialised == []
    assert report.prefixes == PREFIXES.get(write, [])
    assert all(f"; prefix '{prefix}' removed" in str(report) for prefix in report.prefixes)
    unique = {parameter.data_ptr() for parameter in model.parameters()}
    assert len({model.get_parameter(name).data_ptr() for name in report.loaded}) == len(unique)


@pytest.mark.parametrize("part", [1, 1000, 1 << 25])
def test_files_that_are_mapped_in_parts(monkeypatch, tmp_path, part):
    """Tensors that lie across the borders of parts, empty ones, scalars, and all types."""
    monkeypatch.setattr(weight_files, "_PART", part)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    written = {f"{d}": torch.randint(0, 9, (3, 5000 + i)).to(d) for i, d in enumerate(dtypes)}
    written |= {"none": torch.ones(0, 4), "scalar": torch.tensor(2.5)}
    save_file(written, tmp_path / "m.safetensors")
    read = open_weights(tmp_path / "m.safetensors")
    assert set(read) == set(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


BLIP = {"vit": "base", "image_size": 384, "med_config": "configs/med_config.json"}
CLIP = {"clip": "large", "image_size": 336}


@pytest.mark.parametrize(
    ("build", "config", "keys", "profile", "vision", "numbers"),
    [
        (build_captioner, BLIP, "blip_caption_base", "blip_coco", 48, 198_383_616),
        (build_nlvr, BLIP, "blip_nlvr_base", "blip_nlvr", 48, 233_814_528),
        (build_clip, CLIP, "clip_large", "clip_flickr", 72, 290_396_160),
    ],
)
def test_official_names_shapes_and_layers(
    official_keys, golden_tokenizer, build, config, keys, profile, vision, numbers
):
    with torch.device("meta"):
        model = build({"tokenizer": golden_tokenizer if config is BLIP else None} | config)
    shapes = {name: list(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    expected = official_keys(keys)
    assert shapes == {n: s for n, s in expected.items() if not n.endswith("position_ids")}
    prunable = prunable_layers(model)
    assert list(prunable) == list(json.loads(Path(f"configs/id/{profile}.json").read_text()))
    assert sum(modality(name) == "vision" for name in prunable) == vision
    assert sum(m.weight.numel() + m.bias.numel() for m in prunable.values()) == numbers


def test_position_embedding_of_another_grid(caption_tiny_config, weights, tmp_path):
    save_file(weights, tmp_path / "m.safetensors")
    larger = build_captioner(caption_tiny_config | {"image_size": 64})
    report = load_checkpoint(larger, tmp_path / "m.safetensors")
    assert "1 resampled (visual_encoder.pos_embed)" in str(report)
    old, new = weights["visual_encoder.pos_embed"], larger.visual_encoder.pos_embed
    assert new.shape == (1, 65, 48)
    torch.testing.assert_close(new[:, 0], old[:, 0])
    grid = old[0, 1:].T.reshape(1, 48, 4, 4)
    expected = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[0, 1:].T.reshape(1, 48, 8, 8), expected)


def test_half_precision_is_read_into_float32(model, weights, tmp_path):
    weights[NORM].fill_(torch.finfo(torch.bfloat16).max)  # finite, unlike their sum in float32
    save_file({n: v.bfloat16() for n, v in weights.items()}, tmp_path / "half.safetensors")
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert_holds(model, {n: v.bfloat16().float() for n, v in weights.items()})


def without_a_tensor(weights):
    del weights["text_decoder.cls.predictions.transform.dense.bias"]


def twice(weights):
    weights |= {f"module.{name}": torch.zeros_like(value) for name, value in weights.items()}


def norm(change):
    return lambda weights: weights.update({NORM: change(weights[NORM])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, r"leaves 1 of .* unset.*transform\.dense\.bias.*`med_config` fit it"),
        (twice, r"holds text_decoder\.\S+ twice"),
        (norm(lambda w: w[:7]), rf"{NORM} has shape \(7,\), the model's is \(48,\); does the"),
        (norm(lambda w: w.to(torch.int8)), f"{NORM} is torch.int8, .*, but weights must be"),
        (norm(lambda w: w.to(torch.float8_e4m3fn)), f"{NORM} is torch.float8_e4m3fn,"),
        (norm(lambda w: w.to_sparse()), f"{NORM} is torch.float32, torch.sparse_coo,"),
        (norm(lambda w: w.to("meta")), f"{NORM} is of device meta,"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(
    model, weights, tmp_path, change, message
):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(weights)
    path = tmp_path / "model.pth"
    official(weights, path)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}:? {message}"):
        load_checkpoint(model, path)
    assert_holds(model, before)


@pytest.mark.parametrize(
    ("write", "value"), [(official, "inf"), (official, "nan"), (ours_compressed, "-inf")]
)
def test_weights_that_are_not_finite_are_named(model, weights, tmp_path, write, value):
    weights[NORM][3] = float(value)
    write(weights, tmp_path / "m")
    with pytest.raises(UserError, match=f"{tmp_path}/m: {NORM} holds values that are not finite"):
        load_checkpoint(model, tmp_path / "m")


def test_a_start_for_training_is_no_trained_model(model, weights, tmp_path):
    del weights[NORM]
    model.adapt_weights = lambda weights: (weights, {NORM})
    official(weights, tmp_path / "m")
    assert load_checkpoint(model, tmp_path / "m").initialised == [NORM]
    with pytest.raises(UserError, match=f"is a start for training, .* it lacks {NORM}"):
        load_trained(model, tmp_path / "m")


class Planted:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_pickled_code_runs(tmp_path):
    planted = Planted(str(tmp_path / "ran"))
    torch.save({"model": {}, "payload": planted}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth.*pickled code"):
        open_weights(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(planted, 2))
    with pytest.raises(UserError, match=r"raw\.pth"):
        open_weights(tmp_path / "raw.pth")
    assert not (tmp_path / "ran").exists()


def cut_short(save):
    def write(path):
        save({"a": torch.ones(99)}, path)
        path.write_bytes(path.read_bytes()[:-99])

    return write


def compiled(path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"not a checkpoint at all", "neither safetensors nor"),
        (b"{}", "neither safetensors nor"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "it is a page"),
        (b"\x1f\x8b\x08 compressed", "it is an archive"),
        (cut_short(save_file), "its end is missing"),
        (cut_short(torch.save), "its end is missing"),
        ({"model": {}, "n": np.float64(1)}, "multiarray.scalar beside tensors"),
        ({"args": Namespace(lr=1)}, "argparse.Namespace beside tensors"),
        (torch.nn.Linear(1, 1), "Linear beside tensors.*content.state_dict()"),
        (compiled, "TorchScript"),
        ([torch.ones(1)], "holds no weights: expected a mapping"),
        ({"ema": {"a": torch.ones(1)}}, "no mapping of names to tensors, but has ema:"),
        ({0: torch.ones(1)}, "no mapping of names to tensors, but has 0:"),
        ({}, "no mapping of names to tensors, but has nothing:"),
    ],
)
def test_files_that_hold_no_weights_are_named_by_what_they_are(tmp_path, content, message):
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isfunction(content):
        content(path)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"a\.pth:? .*({message})"):
        open_weights(path)


def test_what_torch_wrote_is_known_under_the_other_name(tmp_path):
    torch.save({}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: .*rename it to \.pth"):
        open_weights(tmp_path / "a.safetensors")


def test_the_index_says_which_file_holds_a_tensor(model, weights, tmp_path):
    folder = tmp_path / "hf"
    hugging_face(weights, folder)
    old = {name: torch.zeros_like(value) for name, value in weights.items()}
    save_file(old, folder / "model.safetensors")
    first, second = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(open_weights(first)))
    save_file(load_file(second) | {name: torch.full((7,), 7.0)}, second)
    for path in (folder, folder / INDEX):
        report = load_checkpoint(model, path)
        assert_holds(model, weights)
        assert report.ignored == [POSITION_IDS]


def keep(*names):
    """Only files of these names stay; those that are not there are made."""

    def apply(folder):
        for file in folder.iterdir():
            file.unlink()
        for name in names:
            (torch.save if name.endswith((".bin", ".pth")) else save_file)({}, folder / name)

    return apply


def drop(name):
    return lambda folder: (folder / name).unlink()


def index(**weight_map):
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop(SECOND), r"model-00002\S+ is missing, though .* names it"),
        (drop(INDEX), r"several files .* \(model-00001\S+, model-00002\S+ and no .*index\.json"),
        (index(a=FIRST), r"model-00001-of-00002\.safetensors has no tensor a,"),
        (lambda folder: (folder / INDEX).write_text('{"weights": []}'), "json is no index of safe"),
        (keep("model.safetensors", "model.fp16.safetensors"), "several files.*the file itself"),
        (keep("pytorch_model.bin"), r"_model\.bin, but .* only safetensors.*save_pretrained"),
        (keep("model_base.pth"), r"give one of its files itself: model_base\.pth"),
        (keep(), r"no \*\.safetensors in the folder \S+$"),
    ],
)
def test_folders_that_do_not_say_what_belongs_together(weights, tmp_path, spoil, message):
    hugging_face(weights, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "hf")


OFFICIAL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/base.pth"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_addresses_are_downloaded_once(monkeypatch, hub):
    fetched = []

    def download(url, path):
        fetched.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(url)

    monkeypatch.setattr(weight_files, "download", download)
    # two files of one name
    urls = [f"https://{host}.invalid/resolve/main/model.safetensors?x=1" for host in "ab"]
    for _ in range(2):
        for url in (OFFICIAL, *urls):
            assert fetch(url).read_text() == url
    assert fetched == [OFFICIAL, *urls]
    assert (hub / "base.pth").exists()  # where BLIP's own code looks for it


def test_what_cannot_be_fetched_is_named(monkeypatch, hub):
    def download(url, path):
        raise UserError("cannot write base.pth")

    monkeypatch.setattr(weight_files, "download", download)
    message = r"\(cannot write base.pth\).*hub/checkpoints/base\.pth \(set TORCH_HOME.*--pretrained"
    with pytest.raises(UserError, match=message):
        fetch(OFFICIAL)
    with pytest.raises(UserError, match="no checkpoint .*nowhere.pth"):
        fetch("nowhere.pth")
    with pytest.raises(UserError, match="blip-base: give a file.*https://huggingface.co/NAME/"):
        fetch("Salesforce/blip-base")
