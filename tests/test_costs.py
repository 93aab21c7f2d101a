"""Costs counted by hand."""

import pytest
import torch

from engine.tasks import TASKS
from models import build_captioner, build_clip
from reports import costs
from tests.runs import TINY_CLIP

BASE = {"vit": "base", "image_size": 384, "med_config": "configs/med_config.json"}
SMALL_CLIP = {**TINY_CLIP, "patch_size": 8, "context_length": 12, "vocab_size": 40}


def saved(model, task: str) -> dict[str, int]:
    """Products that zeros save."""
    counts = costs.multiply_adds(model, costs.example(model, task, 32))
    assert not any(module._forward_hooks for module in model.modules())  # none is left
    return {kind: counts["dense"][kind] - counts["effective"][kind] for kind in counts["dense"]}


@pytest.mark.parametrize(
    ("task", "adds", "parameters"), [("caption", 65.7e9, 224.0e6), ("nlvr", 132.5e9, 259.5e6)]
)
def test_base_models_count_as_upop_published(golden_tokenizer, task, adds, parameters):
    with torch.device("meta"):
        model = TASKS[task].build_model(BASE | {"tokenizer": golden_tokenizer}).eval()
    counts = costs.multiply_adds(model, costs.example(model, task, 384, "meta"))
    assert sum(counts["dense"].values()) == pytest.approx(adds, rel=0.001)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.001)


@torch.no_grad()
def test_a_small_clip_by_hand_and_zeros_of_its_attention_save_their_products():
    model = build_clip({"clip": SMALL_CLIP, "image_size": 32, "queue_size": 8}).eval()
    for parameter in model.parameters():
        parameter[parameter == 0] = 1.0
    block = model.visual.transformer.resblocks[1]
    block.attn.in_proj_weight[:5] = 0
    block.attn.out_proj.weight[0] = 0
    model.transformer.resblocks[0].mlp.c_fc.weight[:, 2] = 0
    dense = costs.multiply_adds(model, costs.example(model, "retrieval", 32))["dense"]
    image, text = (12 * tokens * 32**2 + 2 * tokens**2 * 32 for tokens in (17, 12))  # of a block
    assert dense["vision"] == 16 * (3 * 8 * 8) * 32 + 2 * image + 32 * 16
    assert dense["language"] == 2 * text + 32 * 16 + 16  # the last is the similarity
    assert saved(model, "retrieval") == {"vision": 17 * 32 * (5 + 1), "language": 12 * 4 * 32}


@pytest.fixture
def tiny(caption_tiny_config):
    """A captioner without zeros: the library starts the embedding of [PAD], a tied row, at zero."""
    model = build_captioner(caption_tiny_config).eval()
    model.text_decoder.bert.embeddings.word_embeddings.weight.data[0] = 1.0
    return model


@torch.no_grad()
def test_zeros_of_a_captioner_save_their_products(tiny):
    """16 patches of 8 x 8 x 3, 17 tokens, width 48; 15 tokens, width 32."""
    assert saved(tiny, "caption") == {"vision": 0, "language": 0}
    tiny.visual_encoder.blocks[0].mlp.fc1.weight[:, :5] = 0
    tiny.visual_encoder.patch_embed.proj.weight[0] = 0
    attention = tiny.text_decoder.bert.encoder.layer[1].crossattention.self
    attention.key.weight[3] = 0
    attention.query.weight[3] = 0
    attention.query.bias.zero_()  # an addition, no product
    language = 17 * 48 + 15 * 32
    assert saved(tiny, "caption") == {"vision": 17 * 5 * 192 + 16 * 192, "language": language}


@torch.no_grad()
def test_sizes(tiny):
    for parameter in tiny.parameters():
        parameter.fill_(1.0)
    tiny.visual_encoder.blocks[0].mlp.fc1.weight[:150] = 0  # of 192 x 48
    found = costs.sizes(tiny)
    parameters = sum(p.numel() for p in tiny.parameters())  # tied ones once
    vision = sum(p.numel() for p in tiny.visual_encoder.parameters())
    language = parameters - vision
    assert found["parameters"] == {"vision": vision, "language": language}
    assert found["nonzeros"] == {"vision": vision - 150 * 48, "language": language}
    for dtype, size in (("float32", 4), ("float16", 2)):
        dense, compressed = (found["bytes"][f"{form} {dtype}"] for form in ("dense", "compressed"))
        assert dense == size * parameters
        saved = 150 * 48 * size - 192 * 48 / 8
        assert saved - 250 <= dense - compressed <= saved  # less the header's entries


def test_times_are_those_of_calls_and_their_spread(tiny, monkeypatch):
    clock = iter([0.0, 0.004, 1.0, 1.5, 2.0, 2.003])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(costs, "REPEATS", 3)
    calls = []
    monkeypatch.setattr(tiny, "generate", lambda *args, **lengths: calls.append(lengths))
    config = {"task": "caption", "num_beams": 2, "max_length": 8, "min_length": 5}
    found = costs.measured(tiny, config, costs.example(tiny, "caption", 32))
    assert found["milliseconds"] == pytest.approx(4)
    assert found["spread"] == pytest.approx([3, 500])
    # of one length, whatever a model says of random pixels; the first call is not timed
    assert calls == [{"num_beams": 2, "max_length": 8, "min_length": 8}] * 4
