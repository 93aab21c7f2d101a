"""Costs counted by hand."""

from dataclasses import replace

import pytest
import torch

from engine.tasks import TASKS
from models import build_captioner, build_clip
from reports import costs

BASE = {"vit": "base", "image_size": 384, "med_config": "configs/med_config.json"}
SIZES = "embed_dim patch_size vision_width vision_layers vision_heads context_length vocab_size"
SIZES += " text_width text_heads text_layers"
SMALL_CLIP = dict(zip(SIZES.split(), (16, 8, 32, 2, 2, 12, 40, 32, 2, 2), strict=True))


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
def test_a_small_captioner_by_hand_and_zeros_save_their_products(tiny):
    """16 patches of 8 x 8 x 3, 17 tokens, width 48, two blocks; 15 tokens, width 32, 3 layers."""
    counts = costs.multiply_adds(tiny, costs.example(tiny, "caption", 32))
    block = 17 * 48 * 48 * (3 + 1 + 4 + 4)  # qkv, proj, fc1, fc2
    attention = 2 * 17 * 17 * 48  # scores and sums
    assert counts["dense"]["vision"] == 16 * 192 * 48 + 2 * (block + attention)
    tokens, images, width = 15, 17, 32
    layer = tokens * width * width * (4 + 2) + 2 * images * 48 * width + tokens * 2 * width * 64
    products = 2 * tokens * tokens * width + 2 * tokens * images * width
    head = tokens * width * (width + 160)
    assert counts["dense"]["language"] == 3 * (layer + products) + head
    assert counts["effective"] == counts["dense"]
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


def test_a_new_task_has_costs(tiny, monkeypatch):
    task = replace(TASKS["caption"], name="new", tokens=7)
    monkeypatch.setitem(TASKS, "new", task)
    found = costs.report(tiny, {"task": "new", "image_size": 32})
    assert costs.example(tiny, "new", 32)[1].shape == (1, 7)
    assert found["multiply_adds"]["dense"]["language"] > 0 < found["sparse"]["milliseconds"]


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
