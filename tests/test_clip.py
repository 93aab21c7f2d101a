"""CLIP: golden steps, parts and processes of a step, checkpoints, tokens."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from data.scenes.words import vocabulary
from models import build_clip, clip, load_checkpoint
from tests.conftest import read_golden
from utils import UserError

TINY = {
    "embed_dim": 24,
    "patch_size": 8,
    "vision_width": 128,
    "vision_layers": 2,
    "vision_heads": 2,
    "context_length": 16,
    "vocab_size": 160,
    "text_width": 64,
    "text_heads": 1,
    "text_layers": 3,
}
CONFIG = {"clip": TINY, "image_size": 32, "queue_size": 24, "momentum": 0.995, "alpha": 0.4}
CLOSE = {"atol": 1e-5, "rtol": 0}  # the goldens' tolerance


@pytest.fixture
def model():
    return build_clip(CONFIG)


@pytest.fixture
def golden_clip(model, tmp_path):
    """The golden weights and queues."""
    save_file(read_golden("clip_tiny", "weights."), tmp_path / "clip.safetensors")
    report = load_checkpoint(model, tmp_path / "clip.safetensors")
    assert sorted(report.loaded) == sorted(name for name, _ in model.named_parameters())
    inputs = read_golden("clip_tiny", "input.")
    model.image_queue.copy_(inputs["image_queue"])
    model.text_queue.copy_(inputs["text_queue"])
    return model


def batch(count: int = 4, images: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, texts that end with the highest id and are padded, ids of fewer images."""
    texts = torch.randint(1, 150, (count, 16))
    for row, length in zip(texts, torch.randint(3, 17, (count,)).tolist(), strict=True):
        row[length - 1], row[length:] = 159, 0
    return torch.randn(count, 3, 32, 32), texts, torch.arange(count) % images


def test_two_steps_equal_the_original(golden_clip):
    inputs, expected = read_golden("clip_tiny", "input."), read_golden("clip_tiny", "expected.")
    with torch.no_grad():
        images = golden_clip.encode_image(inputs["images"][0])
        texts = golden_clip.encode_text(inputs["texts"][0])
    torch.testing.assert_close(images, expected["image_features"], **CLOSE)
    torch.testing.assert_close(texts, expected["text_features"], **CLOSE)
    optimizer = torch.optim.SGD(golden_clip.parameters(), lr=0.1)
    for step, alpha in enumerate((0.2, 0.4)):
        golden_clip.alpha = alpha
        loss = golden_clip(*(inputs[name][step] for name in ("images", "texts", "idx")))
        torch.testing.assert_close(loss, expected[f"loss{step}"], **CLOSE)
        optimizer.zero_grad()
        loss.backward()
        known = read_golden("clip_tiny", f"expected.grad{step}.")
        assert len(known) == 4
        found = {name: golden_clip.get_parameter(name).grad for name in known}
        torch.testing.assert_close(found, known, **CLOSE)
        optimizer.step()
    torch.testing.assert_close(golden_clip.image_queue, expected["image_queue"], **CLOSE)
    torch.testing.assert_close(golden_clip.text_queue, expected["text_queue"], **CLOSE)
    assert torch.equal(golden_clip.id_queue, expected["idx_queue"][0])
    assert golden_clip.queue_pointer == 8
    momentum = read_golden("clip_tiny", "expected.momentum.")
    assert len(momentum) == 2
    copy = {name: golden_clip.momentum_copy.get_buffer(name) for name in momentum}
    torch.testing.assert_close(copy, momentum, **CLOSE)


def test_queues_start_as_unit_vectors_and_are_filled_in_turn(model):
    assert (model.id_queue == -100).all()
    for queue in (model.image_queue, model.text_queue):
        torch.testing.assert_close(queue.norm(dim=0), torch.ones(24))
    for step, pointer in enumerate((8, 16, 0, 8)):
        image, texts, ids = batch(8)
        model(image, texts, ids + 10 * step)
        assert model.queue_pointer == pointer
    assert model.id_queue.view(3, 8).min(dim=1).values.tolist() == [30, 10, 20]


def test_logit_scale_is_clamped(model):
    for value, clamped in ((9.0, 4.6052), (-1.0, 0.0)):
        model.logit_scale.data.fill_(value)
        model(*batch())
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_alpha_ramps_over_the_first_epoch(model):
    inputs, state = batch(), deepcopy(model.state_dict())

    def loss(alpha, epochs):
        model.load_state_dict(state)
        model.alpha = alpha
        model.on_step(epochs, [inputs])
        return model(*inputs).item()

    for epochs, alpha in ((0.0, 0.0), (0.25, 0.1), (3.5, 0.4)):
        assert loss(0.4, epochs) == loss(alpha, 1.0)
    assert len({loss(alpha, 1.0) for alpha in (0.0, 0.1, 0.4)}) == 3


def test_autocast_does_not_reach_the_logits(model, monkeypatch):
    image, texts, ids = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = clip._unit_features(model, image, texts)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(4, 2))  # in float32, too
    monkeypatch.setattr(clip, "_unit_features", lambda *_: features)
    expected = deepcopy(model)(image, texts, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(image, texts, ids), expected)


def test_what_no_step_can_take_is_a_mistake(model):
    for pairs, parts in ((5, 1), (5, 2), (48, 1)):
        with pytest.raises(UserError, match=f"24 is no multiple of the {pairs * parts} samples"):
            model.on_step(1.0, [batch(pairs)] * parts)
    with pytest.raises(UserError, match="tokenizer: the config names none"):
        model.prepare(None, ["a ring"], None)


def random_weights(model) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(value) for name, value in model.named_parameters()}


def openai(model, path):
    """Half-precision weights, and numbers beside them; what was written, and what is ignored."""
    weights = {name: value.half() for name, value in random_weights(model).items()}
    others = {n: torch.tensor(32) for n in ("input_resolution", "context_length", "vocab_size")}
    torch.save(weights | others, path)
    return weights, [*others]


def upop(model, path):
    """With momentum copies and queues of its training."""
    weights = random_weights(model)
    copies = {"visual_m.proj": torch.rand(128, 24), "ptr_queue": torch.zeros(1)}
    queues = {"image_queue": torch.rand(24, 57600), "text_queue": torch.rand(24, 57600)}
    torch.save({"model": weights | copies | queues, "epoch": 4}, path)
    return weights, [*copies]


def ours(model, path):
    trained = build_clip(CONFIG)
    trained(*batch())
    save_file(trained.state_dict(), path)
    return dict(trained.named_parameters()), []


@pytest.mark.parametrize("write", [openai, upop, ours])
def test_weights_load_into_model_and_momentum_copy_without_training_state(model, tmp_path, write):
    weights, ignored = write(model, tmp_path / "weights")
    before = model.image_queue.clone()
    other = build_clip(CONFIG | {"clip": TINY | {"context_length": 20}})
    with pytest.raises(UserError, match=r"shape \(16, 64\).*the config's `clip` fit it"):
        load_checkpoint(other, tmp_path / "weights")
    report = load_checkpoint(model, tmp_path / "weights")
    assert report.ignored == ignored and report.initialised == []
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value.float()), name
        assert torch.equal(model.momentum_copy.get_buffer(name), value.float()), name
    assert torch.equal(model.image_queue, before) and (model.id_queue == -100).all()


def test_hugging_face_folder_loads_and_gives_its_features(model, tmp_path):
    from transformers import CLIPConfig, CLIPModel  # here, to spare the started processes

    tower = {"hidden_act": "quick_gelu", "attention_dropout": 0.0, "projection_dim": 24}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 1, "vocab_size": 160, "max_position_embeddings": 16}
    text |= {"bos_token_id": 158, "eos_token_id": 159, "pad_token_id": 0}
    config = CLIPConfig(projection_dim=24, vision_config=tower | vision, text_config=tower | text)
    library = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in library.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases, too
    library.save_pretrained(tmp_path)
    report = load_checkpoint(model, tmp_path)
    assert report.initialised == report.ignored == []
    image, texts, _ = batch()
    with torch.no_grad():
        outputs = library(input_ids=texts, pixel_values=image)
        expected = outputs.image_embeds, outputs.text_embeds  # normalised
        features = model.eval().encode_image(image), model.encode_text(texts)
    for feature, value in zip(features, expected, strict=True):
        feature = feature / feature.norm(dim=1, keepdim=True)
        torch.testing.assert_close(feature, value, **CLOSE)
    assert torch.equal(model.logit_scale, library.logit_scale)


def test_openai_tokens():
    with torch.device("meta"):
        large = build_clip({"clip": "large", "image_size": 336})
    ids, mask = large.tokenize(["a photo of a cat", "dog " * 200])
    assert mask.sum(dim=1).tolist() == [7, 77]
    assert ids.shape == (2, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[0, 7:].sum() == 0 and ids[1, -1] == 49407
    assert large.max_tokens == 77
    assert large.count_cut(["dog " * 75, "dog " * 76, "dog " * 200]) == 2


@pytest.mark.parametrize("pad", [0, 2])
def test_scene_tokens_end_with_the_highest_id_and_are_padded_with_0(tmp_path, pad):
    words, size = vocabulary(), len(vocabulary())
    words[0], words[pad] = words[pad], words[0]  # [PAD] may have any id
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    model = build_clip(CONFIG | {"tokenizer": str(tmp_path)})
    captions = ["a small red circle", " ".join(["ring"] * 40)]
    (image, ids, image_ids), terms = model.prepare("images", captions, "image ids")
    assert (image, image_ids, terms) == ("images", "image ids", 2)
    short = [size, *map(words.index, captions[0].split()), size + 1]
    assert ids[0].tolist() == short + [0] * 10
    assert ids[1].tolist() == [size, *[words.index("ring")] * 14, size + 1]
    assert model.count_cut([*captions, " ".join(["ring"] * 14), " ".join(["ring"] * 15)]) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clip": "huge"}, "clip: 'huge' is none of"),
        ({"clip": {"width": 3}}, r"needs .*embed_dim.*; got \['width'\]"),
        ({"clip": TINY | {"text_layers": 0}}, "clip: text_layers is 0, but must be a whole"),
        ({"clip": TINY | {"vision_heads": 3}}, "vision_width 128 is no multiple of vision_heads 3"),
        ({"image_size": 36}, "image_size: 36 is no multiple of patch_size 8"),
        ({"tokenizer": "clip"}, "vocab_size 160 is below the 49408 tokens of tokenizer 'clip'"),
        ({"tokenizer": "no/such/folder"}, "tokenizer: cannot load 'no/such/folder'"),
    ],
)
def test_bad_configs_are_named(change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        build_clip(CONFIG | change)
