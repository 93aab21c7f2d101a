"""Beam search against a plain one, written out for one image and without any cache."""

import pytest
import torch
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.generation import generate_ids, linear

EOS, PAD, VOCABULARY = 2, 0, 30
PROMPT = [25, 7, 8]


def random_decoder(seed: int, eos_bias: float = 0.0) -> BlipTextLMHeadModel:
    """A small decoder whose predictions are far from uniform and depend on the image."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 32, "encoder_hidden_size": 24}
    special = {"bos_token_id": 25, "eos_token_id": EOS, "sep_token_id": EOS, "pad_token_id": PAD}
    config = BlipTextConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes, **special)
    decoder = BlipTextLMHeadModel(config).eval()
    with torch.no_grad():
        decoder.cls.predictions.transform.LayerNorm.weight.fill_(0.25)
        decoder.cls.predictions.decoder.bias[EOS] = eos_bias
    return decoder


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 9, 24)


def captions(decoder, embeds, num_beams=3, max_length=12, min_length=5, rule="total"):
    """Ids of each caption up to the end token, and checks that only padding follows it."""
    prompt_ids = torch.tensor([PROMPT]).expand(len(embeds), -1)
    ids = generate_ids(
        decoder, embeds, prompt_ids, num_beams, max_length, min_length, EOS, PAD, rule
    )
    rows = []
    for row in ids.tolist():
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert set(row[length:]) <= {PAD}
        rows.append(row[:length])
    assert ids.shape[1] == max(map(len, rows))
    return rows


@torch.no_grad()
def plain_beam_search(decoder, embeds, num_beams, max_length, min_length) -> list[int]:
    """The published beam search for one image (L, D): lists, loops, no cache."""
    running, finished = [(0.0, PROMPT)], []
    for length in range(len(PROMPT), max_length):
        candidates = []
        image = embeds.expand(len(running), -1, -1)
        rows = torch.tensor([ids for _, ids in running])
        after = decoder(rows, encoder_hidden_states=image).logits[:, -1].log_softmax(-1)
        if length < min_length:
            after[:, EOS] = -torch.inf
        for (total, ids), log_probs in zip(running, after.tolist(), strict=True):
            candidates += [(total + p, [*ids, token]) for token, p in enumerate(log_probs)]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * num_beams]
        running = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] != EOS:
                running.append((total, ids))
            elif rank < num_beams:
                finished.append((total / length, ids))
        running = running[:num_beams]
        finished = sorted(finished, key=lambda f: -f[0])[:num_beams]
        if len(finished) == num_beams and finished[-1][0] >= candidates[0][0] / length:
            return finished[0][1]
    finished += [(total / max_length, ids) for total, ids in running]
    return max(finished, key=lambda f: f[0])[1]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize("eos_bias", [0.0, 1.0, 3.0])
def test_equals_a_plain_search_of_one_image_at_a_time(num_beams, eos_bias):
    for seed in range(2):
        decoder, embeds = random_decoder(seed, eos_bias), images(4)
        expected = [plain_beam_search(decoder, image, num_beams, 12, 5) for image in embeds]
        assert captions(decoder, embeds, num_beams) == expected


@pytest.mark.parametrize("seed", range(4))
def test_generated_rule_equals_the_library(seed):
    decoder, embeds = random_decoder(seed, eos_bias=1.0), images(4)
    options = {"num_beams": 3, "max_length": 12, "min_length": 5, "eos_token_id": EOS}
    prompt_ids = torch.tensor([PROMPT]).expand(4, -1)
    ids = decoder.generate(prompt_ids, encoder_hidden_states=embeds, pad_token_id=PAD, **options)
    expected = [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]
    assert captions(decoder, embeds, rule="generated") == expected


def test_image_keys_and_values_are_projected_once_and_shared_by_beams():
    decoder, embeds = random_decoder(0), images(2)
    shapes = []
    for layer in decoder.bert.encoder.layer:
        for projection in (layer.crossattention.self.key, layer.crossattention.self.value):
            projection.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    captions(decoder, embeds, num_beams=4)
    assert shapes == [(2, 9, 32)] * 4


def test_captions_under_bfloat16_autocast():
    layer, x = torch.nn.Linear(48, 20), torch.randn(2, 3, 48)
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), layer(x))
    decoder, embeds = random_decoder(0, eos_bias=50.0), images(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(layer, x), layer(x))
        assert linear(layer, x).dtype == torch.bfloat16
        rows = captions(decoder, embeds, min_length=7)
    # the bias, far beyond what rounding changes, ends each caption as soon as it may
    assert [len(row) for row in rows] == [8] * 3
