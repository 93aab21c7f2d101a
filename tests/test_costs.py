"""Costs counted by hand."""

import mmap

import numpy as np
import pytest
import torch

from models import build_captioner, build_clip, build_nlvr
from reports import costs

BASE = {"vit": "base", "image_size": 384, "med_config": "configs/med_config.json"}
SMALL_CLIP = {
    "clip": {
        "embed_dim": 16,
        "patch_size": 8,
        "vision_width": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "context_length": 12,
        "vocab_size": 40,
        "text_width": 32,
        "text_heads": 2,
        "text_layers": 2,
    },
    "image_size": 32,
    "queue_size": 8,
}


@pytest.fixture
def base_config(golden_tokenizer):
    return BASE | {"tokenizer": golden_tokenizer}


def total(counts) -> int:
    return sum(counts.values())


def test_base_captioner_counts_as_published(base_config):
    with torch.device("meta"):
        model = build_captioner(base_config).eval()
    counts = costs.multiply_adds(model, costs.example(model, "caption", 384, "meta"))
    # UPop's published 65.7 G and 224.0 M
    assert total(counts["dense"]) == pytest.approx(65.7e9, rel=0.001)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(224.0e6, rel=0.001)


def test_base_nlvr_counts_as_published(base_config):
    with torch.device("meta"):
        model = build_nlvr(base_config).eval()
    model.to_empty(device="cpu")  # random values would take longer than all else
    for buffer in model.buffers():
        buffer.zero_()
    counts = costs.multiply_adds(model, costs.example(model, "nlvr", 384))
    # UPop's published 132.5 G and 259.5 M
    assert total(counts["dense"]) == pytest.approx(132.5e9, rel=0.001)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(259.5e6, rel=0.001)


def test_large_clip_by_hand():
    with torch.device("meta"):
        model = build_clip({"clip": "large", "image_size": 336, "queue_size": 8}).eval()
    counts = costs.multiply_adds(model, costs.example(model, "retrieval", 336, "meta"))
    tokens, width = 577, 1024
    patches = 576 * (3 * 14 * 14) * width
    vision = patches + 24 * (12 * tokens * width**2 + 2 * tokens**2 * width) + width * 768
    language = 12 * (12 * 77 * 768**2 + 2 * 77**2 * 768) + 768**2
    similarity = 768
    assert counts["dense"] == {"vision": vision, "language": language + similarity}


def test_zeros_of_clips_attention_save_their_products():
    torch.manual_seed(0)
    model = build_clip(SMALL_CLIP).eval()
    for parameter in model.parameters():
        parameter.data[parameter == 0] = 1.0
    with torch.no_grad():
        block = model.visual.transformer.resblocks[1]
        block.attn.in_proj_weight[:5] = 0
        block.attn.out_proj.weight[0] = 0
        model.transformer.resblocks[0].mlp.c_fc.weight[:, 2] = 0
    counts = costs.multiply_adds(model, costs.example(model, "retrieval", 32))
    saved = {kind: counts["dense"][kind] - counts["effective"][kind] for kind in counts["dense"]}
    assert saved == {"vision": 17 * 32 * (5 + 1), "language": 12 * 4 * 32}


def expected_vision(layers_products: float) -> float:
    """Of golden/caption_tiny: 16 patches of 8 x 8 x 3, 17 tokens, width 48, two blocks."""
    patches, attention = 16 * 192 * 48, 2 * 2 * 17 * 17 * 48  # scores and sums of two blocks
    return patches + attention + layers_products


@pytest.fixture
def tiny(caption_tiny_config):
    """A captioner without zeros: the library starts the embedding of [PAD], a tied row, at zero."""
    model = build_captioner(caption_tiny_config).eval()
    model.text_decoder.bert.embeddings.word_embeddings.weight.data[0] = 1.0
    return model


def test_a_small_captioner_by_hand(tiny):
    counts = costs.multiply_adds(tiny, costs.example(tiny, "caption", 32))
    block = 17 * 48 * 48 * (3 + 1 + 4 + 4)  # qkv, proj, fc1, fc2
    assert counts["dense"]["vision"] == expected_vision(2 * block)
    tokens, images, width = 15, 17, 32
    layer = tokens * width * width * (4 + 2) + 2 * images * 48 * width + tokens * 2 * width * 64
    products = 2 * tokens * tokens * width + 2 * tokens * images * width
    head = tokens * width * (width + 160)
    assert counts["dense"]["language"] == 3 * (layer + products) + head
    assert counts["effective"] == counts["dense"]


def test_zeros_save_their_products(tiny):
    with torch.no_grad():
        tiny.visual_encoder.blocks[0].mlp.fc1.weight[:, :5] = 0
        tiny.visual_encoder.patch_embed.proj.weight[0] = 0
        attention = tiny.text_decoder.bert.encoder.layer[1].crossattention.self
        attention.key.weight[3] = 0
        attention.query.weight[3] = 0
        attention.query.bias.zero_()  # an addition, no product
    counts = costs.multiply_adds(tiny, costs.example(tiny, "caption", 32))
    saved = {kind: counts["dense"][kind] - counts["effective"][kind] for kind in counts["dense"]}
    assert saved["vision"] == 17 * 5 * 192 + 16 * 192
    assert saved["language"] == 17 * 48 + 15 * 32


def test_counting_leaves_no_hooks(tiny):
    costs.multiply_adds(tiny, costs.example(tiny, "caption", 32))
    assert not any(module._forward_hooks for module in tiny.modules())


def test_sizes(tiny):
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.fill_(1.0)
        tiny.visual_encoder.blocks[0].mlp.fc1.weight[:150] = 0  # of 192 x 48
    found = costs.sizes(tiny)
    parameters = sum(p.numel() for p in tiny.parameters())  # tied ones once
    assert total(found["parameters"]) == parameters
    vision = sum(p.numel() for p in tiny.visual_encoder.parameters())
    assert found["parameters"]["vision"] == vision
    assert found["nonzeros"]["vision"] == vision - 150 * 48
    assert found["nonzeros"]["language"] == parameters - vision
    assert found["bytes"]["dense float32"] == 4 * parameters
    assert found["bytes"]["dense float16"] == 2 * parameters
    for dtype, size in (("float32", 4), ("float16", 2)):
        saved = 150 * 48 * size - 192 * 48 / 8
        compressed = found["bytes"][f"dense {dtype}"] - found["bytes"][f"compressed {dtype}"]
        assert saved - 250 <= compressed <= saved  # less the header's entries


def test_milliseconds_are_those_of_a_call(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.5, 2.0, 2.003])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    calls = []
    assert costs.milliseconds(lambda: calls.append(1), repeats=3) == pytest.approx(3)
    assert len(calls) == 4


@pytest.mark.parametrize(("longest", "tokens"), [(40, 15), (8, 8)])
def test_captions_that_are_timed_are_of_one_length(tiny, monkeypatch, longest, tokens):
    """Or the time would be that of how much a model says of random pixels."""
    lengths, generate_ids = [], tiny.generate_ids

    def counted(*args, **kwargs):
        lengths.append(generate_ids(*args, **kwargs).shape[1])
        return torch.zeros(1, 4, dtype=torch.int64)

    monkeypatch.setattr(tiny, "generate_ids", counted)
    config = {"task": "caption", "num_beams": 2, "max_length": longest, "min_length": 5}
    costs.measured(tiny, config, costs.example(tiny, "caption", 32))
    assert set(lengths) == {tokens}


def test_resident_memory_holds_what_is_in_use():
    before = costs.resident_bytes()
    if before is None:
        pytest.skip("no /proc")
    with mmap.mmap(-1, 64 << 20) as pages:  # of its own, whatever memory the process has kept
        np.frombuffer(pages, np.uint8).fill(1)
        assert costs.resident_bytes() - before > 60 << 20
