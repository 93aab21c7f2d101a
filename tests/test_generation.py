"""Beam search against a plain one, written out for one image and without any cache."""

import pytest
import torch
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.generation import CachedDecoder, generate_ids, linear
from tests.conftest import read_golden

EOS, PAD, VOCABULARY = 2, 0, 30
PROMPT = [25, 7, 8]


def random_decoder(seed: int, eos_bias: float = 0.0) -> BlipTextLMHeadModel:
    """A small decoder whose predictions are far from uniform and depend on the image."""
    torch.manual_seed(seed)
    config = BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        encoder_hidden_size=24,
        bos_token_id=25,
        eos_token_id=EOS,
        sep_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.5,
    )
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


def next_log_probs(decoder, embeds, *rows: list[int]) -> torch.Tensor:
    """Log-probabilities (rows, tokens, V) of what follows each token, by the library."""
    with torch.no_grad():
        images = embeds[None].expand(len(rows), -1, -1)
        return decoder(torch.tensor(rows), encoder_hidden_states=images).logits.log_softmax(-1)


def plain_beam_search(decoder, embeds, num_beams, max_length, min_length) -> list[int]:
    """The published beam search for one image (L, D): lists, loops, no cache."""
    running, finished = [(0.0, PROMPT)], []
    for length in range(len(PROMPT), max_length):
        candidates = []
        after = next_log_probs(decoder, embeds, *(ids for _, ids in running))[:, -1]
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
    ids = decoder.generate(
        input_ids=torch.tensor([PROMPT]).expand(4, -1),
        encoder_hidden_states=embeds,
        num_beams=3,
        max_length=12,
        min_length=5,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    expected = [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]
    assert captions(decoder, embeds, rule="generated") == expected


def test_a_caption_does_not_depend_on_its_batch():
    decoder, embeds = random_decoder(1, eos_bias=1.0), images(5)
    together = captions(decoder, embeds)
    assert len(set(map(len, together))) > 1  # they end at different steps
    assert together == [captions(decoder, image[None])[0] for image in embeds]
    assert together[::-1] == captions(decoder, embeds.flip(0))


def test_the_end_token_waits_for_the_minimum_and_the_maximum_cuts():
    rows = captions(random_decoder(0, eos_bias=50.0), images(3), min_length=9)
    assert [len(row) for row in rows] == [9 + 1] * 3
    for most in (4, 10):
        rows = captions(random_decoder(0, eos_bias=-50.0), images(2), max_length=most)
        assert [len(row) for row in rows] == [most] * 2 and EOS not in sum(rows, [])


def test_image_keys_and_values_are_projected_once_and_shared_by_beams():
    decoder, embeds = random_decoder(0), images(2)
    shapes = []
    for layer in decoder.bert.encoder.layer:
        for projection in (layer.crossattention.self.key, layer.crossattention.self.value):
            projection.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    captions(decoder, embeds, num_beams=4)
    assert shapes == [(2, 9, 32)] * 4


def test_cached_decoder_equals_the_library():
    inputs, expected = (read_golden("caption_tiny", f"{part}.") for part in ("input", "expected"))
    decoder = BlipTextLMHeadModel(
        BlipTextConfig(
            vocab_size=160,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            encoder_hidden_size=48,
        )
    ).eval()
    weights = read_golden("caption_tiny", "weights.text_decoder.")
    decoder.load_state_dict(weights, strict=False)
    ids = inputs["input_ids"]
    with torch.no_grad():
        cached = CachedDecoder(decoder, expected["image_embeds"], ids.shape[1])
        hidden = []
        for piece in (slice(0, 5), slice(5, 6), slice(6, ids.shape[1])):
            causal = torch.ones(ids.shape[1], piece.stop, dtype=torch.bool).tril()[piece]
            position = torch.arange(piece.start, piece.stop)
            hidden.append(cached.feed(ids[:, piece], position, causal.expand(len(ids), -1, -1)))
        log_probs = cached.log_probabilities(torch.cat(hidden, dim=1))
    real = inputs["attention_mask"].bool()  # the original masks padding, which we never feed
    expected = expected["logits"].log_softmax(-1)
    # logits of some 10 are sums of 32 products in float32: 32 x 2^-24 x 10 = 2e-5 at worst, of
    # random signs sqrt(32) x 2^-24 x 10 = 3e-6
    torch.testing.assert_close(log_probs[real], expected[real], atol=1e-5, rtol=0)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_gpu_gives_the_captions_of_the_cpu(half):
    decoder, embeds = random_decoder(0, eos_bias=1.0), images(6)
    expected = captions(decoder, embeds)
    decoder.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        prompt_ids = torch.tensor([PROMPT], device="cuda").expand(6, -1)
        ids = generate_ids(decoder, embeds.cuda(), prompt_ids, 3, 12, 5, EOS, PAD).tolist()
    rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in ids]
    same = sum(a == b for a, b in zip(rows, expected, strict=True))
    assert same >= (3 if half else 6)
