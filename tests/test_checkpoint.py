import pickle

import pytest
import torch
from safetensors.torch import save_file

from models import build_captioner, load_checkpoint, prunable_layers
from models.checkpoint import read_weights, resample_position_embedding
from tests.conftest import read_golden


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
    names = sorted(kept)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: kept[n].contiguous() for n in part}, folder / f"model-{i}.safetensors")
    return folder


def ours(weights, folder):
    save_file(weights, folder / "pruned.safetensors")
    save_file({"noise": torch.ones(1)}, folder / "other.safetensors")
    return folder


@pytest.mark.parametrize("write", [official, papers_pruned, hugging_face, ours])
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
        read_weights(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Planted(str(tmp_path / "ran"))))
    with pytest.raises(ValueError, match=r"raw\.pth"):
        read_weights(tmp_path / "raw.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_unreadable_files_are_named(tmp_path, suffix, content):
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="broken"):
        read_weights(tmp_path / f"broken{suffix}")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="safetensors"):
        read_weights(tmp_path)


def test_addresses_are_downloaded_once(monkeypatch, weights, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    fetched = []

    def download(url, target, progress):
        fetched.append(url)
        torch.save({"model": weights}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        read = read_weights("https://host.invalid/models/model_base.pth")
        assert set(read) == set(weights)
    assert fetched == ["https://host.invalid/models/model_base.pth"]
    assert (tmp_path / "hub/checkpoints/model_base.pth").exists()


def test_failed_downloads_say_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, target, progress):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=r"hub/checkpoints/m\.pth.*--pretrained"):
        read_weights("https://host.invalid/m.pth")
