import json
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from models import build_captioner, compressed, load_checkpoint, prunable_layers, weight_files
from models.checkpoint import resample_position_embedding
from models.weight_files import fetch, open_weights
from tests.conftest import read_golden
from utils import UserError


@pytest.fixture
def weights():
    return read_golden("caption_tiny", "weights.")


@pytest.fixture
def model(caption_tiny_config):
    return build_captioner(caption_tiny_config)


POSITION_IDS = "text_decoder.bert.embeddings.position_ids"


def assert_holds(model, weights):
    state = model.state_dict()
    assert set(state) == set(weights) - {POSITION_IDS}
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


def hugging_face_name(name: str) -> str:
    for ours, theirs in [
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.norm.", "vision_model.post_layernorm."),
        ("visual_encoder.blocks", "vision_model.encoder.layers"),
        ("attn.qkv", "self_attn.qkv"),
        ("attn.proj", "self_attn.projection"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
    ]:
        name = name.replace(ours, theirs)
    return name


def official(weights, folder):
    torch.save({"model": weights, "config": {"vit": "tiny"}, "epoch": 4}, folder / "model.pth")
    return folder / "model.pth"


def papers_pruned(weights, folder):
    state = {f"module.{name}": value for name, value in weights.items()}
    content = {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 4, "loss": 0.5}
    torch.save(content, folder / "pruned")
    return folder / "pruned"


def hugging_face(weights, folder):
    renamed = {hugging_face_name(name): value for name, value in weights.items()}
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    kept = {n: v for n, v in renamed.items() if n.removeprefix("text_decoder.") not in tied}
    write_shards(kept, folder)
    return folder


def write_shards(weights, folder):
    """Two shards and their index, as transformers writes them."""
    names, weight_map = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: weights[n].contiguous() for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def ours(weights, folder):
    save_file(weights, folder / "pruned.safetensors")
    save_file({"noise": torch.ones(1)}, folder / "other.safetensors")
    return folder


def ours_compressed(weights, folder):
    compressed.write(folder / "small.safetensors", weights.items())
    return folder / "small.safetensors"


FORMATS = [official, papers_pruned, hugging_face, ours, ours_compressed]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_loads(model, weights, tmp_path, write):
    report = load_checkpoint(model, str(write(weights, tmp_path)))
    assert_holds(model, weights)
    assert report.ignored == [POSITION_IDS]
    assert report.resampled == report.initialised == []


@pytest.mark.parametrize("wrapper", [lambda w: w, lambda w: {"model": w}])
def test_bare_and_wrapped_weights(model, weights, tmp_path, wrapper):
    torch.save(wrapper(weights), tmp_path / "weights.pt")
    load_checkpoint(model, tmp_path / "weights.pt")
    assert_holds(model, weights)


def test_official_key_list_is_consumed(official_keys, golden_tokenizer, tmp_path):
    shapes = official_keys("blip_caption_base")
    weights = {n: torch.rand(s) for n, s in shapes.items() if n != POSITION_IDS}
    for target, source in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        weights[f"text_decoder.{target}"] = weights[f"text_decoder.{source}"]  # tied
    weights[POSITION_IDS] = torch.arange(512)[None]
    torch.save({"model": weights}, tmp_path / "base.pth")
    config = {
        "vit": "base",
        "image_size": 384,
        "med_config": "configs/med_config.json",
        "tokenizer": golden_tokenizer,
    }
    base = build_captioner(config)
    report = load_checkpoint(base, tmp_path / "base.pth")
    assert report.ignored == [POSITION_IDS]
    assert sorted(report.loaded) == sorted(set(shapes) - {POSITION_IDS})
    assert_holds(base, weights)
    layers = prunable_layers(base)
    assert len(layers) == 168
    assert sum(m.weight.numel() + m.bias.numel() for m in layers.values()) == 198_383_616


def test_position_embedding_of_another_grid(caption_tiny_config, weights, tmp_path):
    save_file(weights, tmp_path / "m.safetensors")
    larger = build_captioner(caption_tiny_config | {"image_size": 64})
    report = load_checkpoint(larger, tmp_path / "m.safetensors")
    assert report.resampled == ["visual_encoder.pos_embed"]
    old, new = weights["visual_encoder.pos_embed"], larger.visual_encoder.pos_embed
    assert new.shape == (1, 65, 48)
    torch.testing.assert_close(new[:, 0], old[:, 0])
    grid = old[0, 1:].T.reshape(1, 48, 4, 4)
    expected = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[0, 1:].T.reshape(1, 48, 8, 8), expected)


def test_resampling_keeps_a_constant():
    constant = torch.full((1, 17, 3), 2.5)
    resampled = resample_position_embedding(constant, torch.zeros(1, 37, 3))
    torch.testing.assert_close(resampled, torch.full((1, 37, 3), 2.5))


def test_unset_parameters_are_an_error(model, weights, tmp_path):
    weights.pop("visual_encoder.norm.weight")
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"1 of .* unset.*visual_encoder\.norm\.weight"):
        load_checkpoint(model, tmp_path / "m.safetensors")


def test_other_shapes_are_an_error(model, weights, tmp_path):
    weights["visual_encoder.norm.weight"] = torch.ones(7)
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"visual_encoder\.norm\.weight has shape \(7,\)"):
        load_checkpoint(model, tmp_path / "m.safetensors")


class Planted:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_pickled_code_runs(tmp_path):
    torch.save({"model": {}, "payload": Planted(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth.*pickled code"):
        open_weights(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Planted(str(tmp_path / "ran"))))
    with pytest.raises(ValueError, match=r"raw\.pth"):
        open_weights(tmp_path / "raw.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_unreadable_files_are_named(tmp_path, suffix, content):
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="broken"):
        open_weights(tmp_path / f"broken{suffix}")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        fetch(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="no .*safetensors in the folder"):
        open_weights(tmp_path)


# --- which files of a folder --------------------------------------------------------------------


def test_the_index_rules(model, weights, tmp_path):
    hugging_face(weights, tmp_path)
    old = {name: torch.zeros_like(value) for name, value in weights.items()}
    save_file(old, tmp_path / "model.safetensors")
    save_file(old | {"stranger": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        report = load_checkpoint(model, path)
        assert_holds(model, weights)
        assert report.ignored == [POSITION_IDS]


def test_each_tensor_comes_from_the_file_that_the_index_says(model, weights, tmp_path):
    write_shards(weights, tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(open_weights(first)))
    in_second = {name: torch.full_like(weights[name], 7.0)}
    save_file(contents(second) | in_second, second)
    load_checkpoint(model, tmp_path)
    assert_holds(model, weights)


def without_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def without_a_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_an_old_file(folder):
    without_index(folder)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")


def with_shards_of_another_model(folder):
    without_index(folder)
    save_file({"a": torch.ones(1)}, folder / "other-00001-of-00001.safetensors")


def contents(file):
    tensors = {name: torch.empty(entry.shape) for name, entry in open_weights(file).items()}
    for name, entry in open_weights(file).items():
        entry.read(tensors[name])
    return tensors


def with_a_tensor_twice(folder):
    without_index(folder)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file(contents(first), second)


def with_two_whole_models(folder):
    for file in list(folder.iterdir()):
        file.unlink()
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"a": torch.ones(1)}, folder / name)


def with_an_index_that_is_wrong(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["a"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))


def with_an_index_that_is_none(folder):
    (folder / "model.safetensors.index.json").write_text('{"weights": []}')


def with_pickles_only(folder):
    for file in list(folder.iterdir()):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def with_another_format_only(folder):
    for file in list(folder.iterdir()):
        file.unlink()
    torch.save({}, folder / "model_base.pth")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_shard, r"model-00002-of-00002\.safetensors is missing, though .* names it"),
        (
            lambda folder: (without_index(folder), without_a_shard(folder)),
            r"model-00002-of-00002\.safetensors is missing, one of 2 shards",
        ),
        (with_an_old_file, "shards and other files of weights.*add the index"),
        (with_shards_of_another_model, "shards and other files of weights.*add the index"),
        (with_a_tensor_twice, r"both model-00001-of-00002\.safetensors and model-00002.*a tensor"),
        (with_two_whole_models, r"model\.fp16\.safetensors, model\.safetensors.*the file itself"),
        (with_an_index_that_is_wrong, r"model-00001-of-00002\.safetensors has no tensor a,"),
        (with_an_index_that_is_none, r"index\.json is no index of safetensors"),
        (with_pickles_only, r"pytorch_model\.bin, but .* only safetensors.*save_pretrained"),
        (with_another_format_only, r"give one of its files itself: model_base\.pth"),
    ],
)
def test_folders_that_do_not_say_what_belongs_together(weights, tmp_path, spoil, message):
    hugging_face(weights, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_shards_that_are_complete_need_no_index(model, weights, tmp_path):
    hugging_face(weights, tmp_path)
    without_index(tmp_path)
    load_checkpoint(model, tmp_path)
    assert_holds(model, weights)


# --- names and values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_prefixes_of_wrappers_fall_off_and_are_reported(model, weights, tmp_path, prefix):
    state = {prefix + name: value for name, value in weights.items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "wrapped.ckpt")
    report = load_checkpoint(model, tmp_path / "wrapped.ckpt")
    assert_holds(model, weights)
    assert report.prefixes == [prefix]
    assert f"; prefix '{prefix}' removed" in str(report)


def test_weights_of_two_models_in_a_file_are_an_error(model, weights, tmp_path):
    averages = {f"module.{name}": torch.zeros_like(value) for name, value in weights.items()}
    torch.save(weights | averages, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"both\.pth holds text_decoder\.\S+ twice"):
        load_checkpoint(model, tmp_path / "both.pth")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("write", FORMATS)
def test_weights_that_are_not_finite_are_named(model, weights, tmp_path, write, value):
    weights["visual_encoder.blocks.1.mlp.fc1.weight"][3, 5] = value
    path = write(weights, tmp_path)
    message = rf"{re.escape(str(path))}: visual_encoder\.blocks\.1\.mlp\.fc1\.weight holds"
    with pytest.raises(UserError, match=message):
        load_checkpoint(model, path)


def test_large_finite_weights_load(model, weights, tmp_path):
    weights["visual_encoder.norm.weight"].fill_(torch.finfo(torch.float32).max)
    load_checkpoint(model, official(weights, tmp_path))
    assert_holds(model, weights)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(model, weights, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights.pop("text_decoder.cls.predictions.transform.dense.bias")
    with pytest.raises(UserError, match="unset"):
        load_checkpoint(model, official(weights, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_the_old_torch_format_loads(model, weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "old.pth")
    assert_holds(model, weights)


def test_half_precision_is_read_into_float32(model, weights, tmp_path):
    save_file({n: v.half() for n, v in weights.items()}, tmp_path / "half.safetensors")
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert_holds(model, {n: v.half().float() for n, v in weights.items()})
    assert model.visual_encoder.norm.weight.dtype == torch.float32


# --- addresses ----------------------------------------------------------------------------------

OFFICIAL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/base.pth"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_addresses_are_downloaded_once(monkeypatch, hub, model, weights):
    fetched = []

    def download(url, path):
        fetched.append(url)
        path.parent.mkdir(parents=True)
        torch.save({"model": weights}, path)

    monkeypatch.setattr(weight_files, "download", download)
    # the processes of a run fetch one after the other; nothing here waits for another
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("a barrier"))
    for _ in range(2):
        load_checkpoint(model, OFFICIAL)
        assert_holds(model, weights)
    assert fetched == [OFFICIAL]
    assert (hub / "base.pth").exists()  # where BLIP's own code looks for it


def test_files_of_one_name_from_two_addresses_are_two_files(monkeypatch, hub):
    def download(url, path):
        path.parent.mkdir(parents=True)
        path.write_text(url)

    monkeypatch.setattr(weight_files, "download", download)
    urls = [f"https://{host}.invalid/resolve/main/model.safetensors?x=1" for host in "ab"]
    assert [fetch(url).read_text() for url in urls] == urls


def test_failed_downloads_say_where_to_put_the_file(monkeypatch, hub):
    def download(url, path):
        raise OSError("no route to host")

    monkeypatch.setattr(weight_files, "download", download)
    with pytest.raises(UserError, match=r"hub/checkpoints/base\.pth.*--pretrained"):
        fetch(OFFICIAL)
