"""Checkpoints of every format, and the errors for files that are none."""

import copy
import json
import pickle
from argparse import Namespace
from inspect import isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from models import build_captioner, build_clip, build_nlvr, load_checkpoint, prunable_layers
from models.checkpoint import hugging_face_name
from models.compressed import write as write_compressed
from models.layers import modality
from models.weight_files import INDEX, fetch, open_weights
from tests.conftest import read_golden
from tests.test_clip import CONFIG
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


def hugging_face(weights, folder):
    """Two shards and their index; of tied weights only one."""
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    kept = {n: v for n, v in weights.items() if n.removeprefix("text_decoder.") not in tied}
    kept = {hugging_face_name(name): value.contiguous() for name, value in kept.items()}
    folder.mkdir()
    save_torch_state_dict(kept, folder, max_shard_size=sum(v.nbytes for v in kept.values()) - 1)


def a_run(weights, folder):
    folder.mkdir()
    save_file(weights, folder / "pruned.safetensors")
    save_file({"noise": torch.ones(1)}, folder / "other.safetensors")


def prefixed(prefix, key):
    """A writer as DataParallel and Lightning name weights."""
    return lambda weights, path: torch.save(
        {key: {f"{prefix}{name}": value for name, value in weights.items()}, "epoch": 4}, path
    )


def compressed(weights, path):
    write_compressed(path, weights.items())


FORMATS = {
    "": [official, hugging_face, a_run, save_file, compressed],
    "module.": [prefixed("module.", "model_state_dict")],  # the paper's
    "_orig_mod.module.model.": [prefixed("_orig_mod.module.model.", "state_dict")],
}
FORMATS[""] += [lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False)]


@pytest.mark.parametrize(("prefix", "write"), [(x, y) for x in FORMATS for y in FORMATS[x]])
def test_every_format_loads(model, weights, tmp_path, prefix, write):
    """Files are known by their content: this name has no suffix."""
    write(weights, tmp_path / "weights")
    report = load_checkpoint(model, str(tmp_path / "weights"))
    assert_holds(model, weights)
    assert report.ignored == [POSITION_IDS]
    assert report.resampled == report.initialised == []
    assert (f"; prefix '{prefix}' removed" in str(report)) == bool(prefix)
    unique = {parameter.data_ptr() for parameter in model.parameters()}
    assert len({model.get_parameter(name).data_ptr() for name in report.loaded}) == len(unique)


@pytest.mark.parametrize("part", [1, 1000, 1 << 25])
def test_files_that_are_mapped_in_parts(monkeypatch, tmp_path, part):
    """Tensors that lie across the borders of parts, empty ones, scalars, and all types."""
    monkeypatch.setattr("models.weight_files._PART", part)
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
    golden_dir, golden_tokenizer, build, config, keys, profile, vision, numbers
):
    with torch.device("meta"):
        model = build({"tokenizer": golden_tokenizer if config is BLIP else None} | config)
    shapes = {name: list(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    expected = json.loads((golden_dir / f"{keys}.json").read_text())
    assert shapes == {n: s for n, s in expected.items() if not n.endswith("position_ids")}
    prunable = prunable_layers(model)
    assert list(prunable) == list(json.loads(Path(f"configs/id/{profile}.json").read_text()))
    assert sum(modality(name) == "vision" for name in prunable) == vision
    assert sum(m.weight.numel() + m.bias.numel() for m in prunable.values()) == numbers


@pytest.mark.parametrize(
    ("build", "config", "name"),
    [
        (build_captioner, "caption_tiny_config", "visual_encoder.pos_embed"),
        (build_clip, None, "visual.positional_embedding"),
    ],
)
def test_position_embedding_of_another_grid(request, tmp_path, build, config, name):
    config = request.getfixturevalue(config) if config else CONFIG
    small, large = build(config), build(config | {"image_size": 64})
    save_file(dict(small.named_parameters()), tmp_path / "m.safetensors")
    report = load_checkpoint(large, tmp_path / "m.safetensors")
    assert f"1 resampled ({name})" in str(report)
    old, new = (x.get_parameter(name).detach().flatten(0, -2) for x in (small, large))
    assert torch.equal(new[0], old[0])
    grid = old[1:].T.reshape(1, -1, 4, 4)
    expected = nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[1:].T.reshape(expected.shape), expected)


def test_half_precision_is_read_into_float32(model, weights, tmp_path):
    weights[NORM].fill_(torch.finfo(torch.bfloat16).max)  # finite, unlike their sum in float32
    save_file({n: v.bfloat16() for n, v in weights.items()}, tmp_path / "half.safetensors")
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert_holds(model, {n: v.bfloat16().float() for n, v in weights.items()})


@pytest.mark.parametrize(
    ("write", "value"), [(official, "inf"), (official, "nan"), (compressed, "-inf")]
)
def test_weights_that_are_not_finite_are_named(model, weights, tmp_path, write, value):
    weights[NORM][3] = float(value)
    write(weights, tmp_path / "m")
    with pytest.raises(UserError, match=f"{tmp_path}/m: {NORM} holds values that are not finite"):
        load_checkpoint(model, tmp_path / "m")


def test_the_index_says_which_file_holds_a_tensor(model, weights, tmp_path):
    folder = tmp_path / "hf"
    hugging_face(weights, folder)
    save_file({name: value * 0 for name, value in weights.items()}, folder / "model.safetensors")
    first, second = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(open_weights(first)))
    save_file(load_file(second) | {name: torch.full((7,), 7.0)}, second)
    for path in (folder, folder / INDEX):
        load_checkpoint(model, path)
        assert_holds(model, weights)


class Planted:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return (open, ("planted", "w"))


def without_a_tensor(weights, path):
    del weights["text_decoder.cls.predictions.transform.dense.bias"]
    official(weights, path)


def twice(weights, path):
    official(weights | {f"module.{name}": value for name, value in weights.items()}, path)


def norm(change):
    return lambda weights, path: official(weights | {NORM: change(weights[NORM])}, path)


def cut_short(save):
    def write(weights, path):
        save({"a": torch.ones(99)}, path)
        path.write_bytes(path.read_bytes()[:-99])

    return write


def shards(file, content=""):
    """A folder of Hugging Face's in which a file is lost, or has other content."""

    def write(weights, path):
        hugging_face(weights, path)
        (path / file).unlink()
        if content:
            (path / file).write_text(content)

    return write


def folder_of(*names):
    def write(weights, path):
        path.mkdir()
        for name in names:
            (save_file if name.startswith("m.") else torch.save)({}, path / name)

    return write


OTHER = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
MISTAKES = [
    # weights that do not fit
    (without_a_tensor, r"leaves 1 of .* unset.*transform\.dense\.bias.*`med_config` fit it"),
    (twice, r"holds text_decoder\.\S+ twice"),
    (norm(lambda w: w[:7]), rf"{NORM} has shape \(7,\), the model's is \(48,\); does the"),
    (norm(lambda w: w.to(torch.int8)), f"{NORM} is torch.int8, .*, but weights must be"),
    (norm(lambda w: w.to(torch.float8_e4m3fn)), f"{NORM} is torch.float8_e4m3fn,"),
    (norm(lambda w: w.to_sparse()), f"{NORM} is torch.float32, torch.sparse_coo,"),
    (norm(lambda w: w.to("meta")), f"{NORM} is of device meta,"),
    # files that hold none
    (b"", "it is empty"),
    (b"not a checkpoint at all", "neither safetensors nor"),
    (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
    (pickle.dumps(Planted(), 2), "it holds io.open beside tensors"),
    (cut_short(save_file), "its end is missing"),
    (cut_short(torch.save), "its end is missing"),
    ({"model": {}, "payload": Planted()}, "open beside tensors .*pickled code is never run"),
    ({"model": {}, "n": np.float64(1)}, "multiarray.scalar beside tensors"),
    ({"args": Namespace(lr=1)}, "argparse.Namespace beside tensors"),
    (nn.Linear(1, 1), "Linear beside tensors.*content.state_dict()"),
    (lambda _, path: torch.jit.script(nn.Linear(1, 1)).save(str(path)), "TorchScript"),
    (folder_of("other.safetensors"), r"rename it to \.pth"),
    ([torch.ones(1)], "holds no weights: expected a mapping"),
    ({"ema": {"a": torch.ones(1)}}, "no mapping of names to tensors, but has ema:"),
    ({0: torch.ones(1)}, "no mapping of names to tensors, but has 0:"),
    ({}, "no mapping of names to tensors, but has nothing:"),
    # folders that do not say what belongs together
    (shards(SHARDS[1]), r"model-00002\S+ is missing, though .* names it"),
    (shards(INDEX), r"several files .* \(model-00001\S+, model-00002\S+ and no .*index\.json"),
    (shards(INDEX, OTHER), r"model-00001-of-00002\.safetensors has no tensor a,"),
    (shards(INDEX, "{}"), "json is no index of safetensors"),
    (folder_of("m.safetensors", "m.fp16.safetensors"), "several files.*the file itself"),
    (folder_of("pytorch_model.bin"), r"_model\.bin, but .* only safetensors.*save_pretrained"),
    (folder_of("model_base.pth"), r"give one of its files itself: model_base\.pth"),
    (folder_of(), r"no \*\.safetensors in the folder \S+$"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[x[1] for x in MISTAKES])
def test_mistakes_name_the_file_and_leave_the_model_as_it_was(
    model, weights, tmp_path, content, message
):
    path, before = tmp_path / "weights", copy.deepcopy(model.state_dict())
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isfunction(content):
        content(weights, path)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(model, path)
    assert str(path) in str(raised.value)
    assert_holds(model, before)
    assert not Path("planted").exists()


OFFICIAL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/base.pth"


def test_addresses_are_downloaded_once_or_named(monkeypatch, tmp_path):
    def download(url, path):
        path.parent.mkdir(parents=True)  # a second download would find its folder
        path.write_text(url)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("models.weight_files.download", download)
    # two files of one name
    urls = [f"https://{host}.invalid/resolve/main/model.safetensors?x=1" for host in "ab"]
    for url in (OFFICIAL, *urls) * 2:
        assert fetch(url).read_text() == url
    (tmp_path / "hub/checkpoints/base.pth").unlink()  # where BLIP's own code looks for it
    for source, message in [
        (OFFICIAL, r"download .*hub/checkpoints/base\.pth \(set TORCH_HOME.*--pretrained"),
        ("nowhere.pth", "no checkpoint nowhere.pth"),
        ("Salesforce/blip-base", "blip-base: give a file.*https://huggingface.co/NAME/"),
    ]:
        with pytest.raises(UserError, match=message):
            fetch(source)
