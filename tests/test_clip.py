"""CLIP: golden steps, parts and processes of a step, checkpoints, layers, tokens."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from data.scenes.words import vocabulary
from models import build_clip, clip, load_checkpoint, prunable_layers
from tests.conftest import read_golden
from tests.runs import on_two_processes, outputs_of
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


# --- features and loss


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
        gradients = {n: p.grad for n, p in golden_clip.named_parameters()}
        known = {n: v for n, v in expected.items() if n.startswith(f"grad{step}.")}
        assert len(known) == 4
        for name, value in known.items():
            torch.testing.assert_close(gradients[name.split(".", 1)[1]], value, **CLOSE)
        optimizer.step()
    torch.testing.assert_close(golden_clip.image_queue, expected["image_queue"], **CLOSE)
    torch.testing.assert_close(golden_clip.text_queue, expected["text_queue"], **CLOSE)
    assert torch.equal(golden_clip.id_queue, expected["idx_queue"][0])
    assert golden_clip.queue_pointer == 8
    momentum = {n: v for n, v in expected.items() if n.startswith("momentum.")}
    assert len(momentum) == 2
    for name, value in momentum.items():
        copy = golden_clip.momentum_copy.get_buffer(name.removeprefix("momentum."))
        torch.testing.assert_close(copy, value, **CLOSE)


def test_loss_is_that_of_the_formula(golden_clip):
    image, texts, ids = batch()
    golden_clip.id_queue[5] = 1  # of the batch's second image: a positive among the queue
    queues = golden_clip.image_queue.clone(), golden_clip.text_queue.clone()
    key_ids = torch.cat([ids, golden_clip.id_queue])
    with torch.no_grad():
        features = [golden_clip.encode_image(image), golden_clip.encode_text(texts)]
        features = [feature / feature.norm(dim=1, keepdim=True) for feature in features]
    # the copy is what the model is, so that the momentum features are the model's
    losses = []
    for queries, keys, queue in zip(features, features[::-1], queues[::-1], strict=True):
        logits = golden_clip.logit_scale.exp() * queries @ torch.cat([keys.T, queue], dim=1)
        for row, image_id in zip(logits.softmax(dim=1), ids.tolist(), strict=True):
            positives = [c for c, key in enumerate(key_ids.tolist()) if key == image_id]
            hard = torch.zeros(28)
            hard[positives] = 1 / len(positives)
            assert len(positives) == {0: 2, 1: 2, 2: 1}[image_id]
            losses.append(-((0.3 * row + 0.7 * hard) * row.log()).sum())
    golden_clip.alpha = 0.3
    with torch.no_grad():
        loss = golden_clip(image, texts, ids)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), **CLOSE)


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
    other = deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(image, texts, ids), model(image, texts, ids))


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_must_fill_the_queues_evenly(model, parts):
    model.check_batch(8)
    for count in (5, 48):
        with pytest.raises(UserError, match=f"queue_size 24 is no multiple of the {count} samples"):
            model.check_batch(count)
    with pytest.raises(UserError, match=f"no multiple of the {5 * parts} samples of a step"):
        model.on_step(1.0, [batch(5)] * parts)


def test_a_state_holds_copy_and_queues(model):
    model(*batch()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    restored, inputs = build_clip(CONFIG), batch()
    restored.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs), restored(*inputs))
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), atol=0, rtol=0)


# --- checkpoints


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
    copies = {
        name.replace("visual.", "visual_m."): torch.rand_like(value)
        for name, value in weights.items()
        if name.startswith("visual.")
    }
    copies |= {"text_projection_m": torch.rand(64, 24), "ptr_queue": torch.zeros(1)}
    queues = {"image_queue": torch.rand(24, 57600), "text_queue": torch.rand(24, 57600)}
    torch.save({"model": weights | copies | queues, "epoch": 4}, path)
    return weights, [*copies]


def ours(model, path, buffers=True):
    trained = build_clip(CONFIG)
    trained(*batch())
    weights = {name: value.detach() for name, value in trained.named_parameters()}
    save_file(trained.state_dict() if buffers else weights, path)
    return weights, []


def ours_without_training_state(model, path):
    return ours(model, path, buffers=False)


@pytest.mark.parametrize("write", [openai, upop, ours, ours_without_training_state])
def test_weights_load_into_model_and_momentum_copy_without_training_state(model, tmp_path, write):
    weights, ignored = write(model, tmp_path / "weights")
    before = model.image_queue.clone()
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


def test_position_embedding_of_another_image_size_is_resampled(tmp_path):
    small, large = build_clip(CONFIG), build_clip(CONFIG | {"image_size": 48})
    weights = random_weights(small)
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 128)
    weights["visual.positional_embedding"] = torch.cat([torch.full((1, 128), 7.0), rows])
    torch.save(weights, tmp_path / "clip.pt")
    load_checkpoint(large, tmp_path / "clip.pt")
    embedding = large.visual.positional_embedding.detach()
    assert (embedding[0] == 7).all()
    # row 1 of 6 lies at 0.5 of 4: cubic weights -3/32, 19/32, 19/32, -3/32 of rows 0, 0, 1, 2
    torch.testing.assert_close(embedding[7], torch.full((128,), 13 / 32), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context_length": 20}, r"clip\.pt: positional_embedding has shape \(16, 64\)"),
        ({"vision_width": 64}, r"visual\.class_embedding has shape \(128,\)"),
        ({"text_layers": 4}, "leaves 12 of .* unset"),
    ],
)
def test_weights_of_other_sizes_name_the_configs_key(model, tmp_path, change, message):
    torch.save(random_weights(model), tmp_path / "clip.pt")
    other = build_clip(CONFIG | {"clip": TINY | change})
    with pytest.raises(UserError, match=f"{message}.*the config's `clip` fit it"):
        load_checkpoint(other, tmp_path / "clip.pt")


# --- profiling


def test_stages_call_every_layer_once_in_order_and_give_the_features(model):
    image, texts, _ = batch()
    layers, states = prunable_layers(model), {"image": image, "input_ids": texts}
    owners = {n: model.get_submodule(n.removesuffix(".out_proj")) for n in layers}  # that run
    features = []

    def plain():
        features.extend((model.encode_image(image), model.encode_text(texts)))

    def staged():
        for stage in model.stages():
            states[stage.writes] = stage.run(*(states[name] for name in stage.reads))

    expected, found = outputs_of(owners, plain), outputs_of(layers, staged)
    for name, (output,) in found.items():
        (own,) = expected[name]
        own = own[0] if name.endswith(".out_proj") else own
        torch.testing.assert_close(output, own, **CLOSE)
    end = states["text"][torch.arange(4), texts.argmax(dim=1)]
    ends = states["tokens"][:, 0] @ model.visual.proj, end @ model.text_projection
    torch.testing.assert_close(ends, tuple(features), **CLOSE)


# --- tokens


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


@pytest.fixture(scope="module")
def scenes_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    return str(folder)


def test_scene_tokens_end_with_the_highest_id(scenes_tokenizer):
    model = build_clip(CONFIG | {"tokenizer": scenes_tokenizer})
    words, size = vocabulary(), len(vocabulary())
    captions = ["a small red circle", " ".join(["ring"] * 40)]
    (image, ids, image_ids), terms = model.prepare("images", captions, "image ids")
    assert (image, image_ids, terms) == ("images", "image ids", 2)
    short = [size, *map(words.index, captions[0].split()), size + 1]
    assert ids[0].tolist() == short + [0] * 10
    assert ids[1].tolist() == [size, *[words.index("ring")] * 14, size + 1]
    assert model.count_cut([*captions, " ".join(["ring"] * 14), " ".join(["ring"] * 15)]) == 2


# --- configs


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


def test_texts_without_a_tokenizer_are_a_mistake(model):
    with pytest.raises(UserError, match="tokenizer: the config names none"):
        model.prepare(None, ["a ring"], None)


# --- parts and processes of a step

STEPS = 3


def train(rank: int = 0, world_size: int = 1, parts: int = 1) -> tuple[list[torch.Tensor], dict]:
    """Trains in float64 on this process's share of batches of 8; losses of steps, and the state."""
    torch.manual_seed(0)
    model = engine = build_clip(CONFIG).double()
    if world_size > 1:  # nothing but the gathering keeps buffers equal
        engine = DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        torch.manual_seed(step)
        image, texts, ids = batch(8)
        shares = (tensor.chunk(world_size * parts) for tensor in (image.double(), texts, ids))
        own = list(zip(*shares, strict=True))[rank * parts : (rank + 1) * parts]
        model.on_step(0.3 * step, own)
        loss = 0
        for i, part in enumerate(own):
            with nullcontext() if engine is model or i == parts - 1 else engine.no_sync():
                part_loss = engine(*part) / parts
                part_loss.backward()
            loss += part_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, model.state_dict()


def assert_same(run, other):
    """Losses, weights, momentum copy and queues, but for rounding in another order of sums."""
    close = {"atol": 1e-9, "rtol": 0}
    torch.testing.assert_close(run, other, **close)


def test_a_step_does_not_depend_on_the_number_of_its_parts():
    whole = train()
    assert whole[1]["queue_pointer"] == STEPS * 8 % 24 and (whole[1]["id_queue"] >= 0).all()
    for parts in (2, 8):
        assert_same(train(parts=parts), whole)


def work(rank: int, folder: Path):
    """A process of the data-parallel run."""
    torch.save(train(rank, 2, parts=2), folder / f"{rank}.pt")


def test_two_processes_train_as_one_with_the_double_batch(tmp_path):
    on_two_processes(work, tmp_path)
    (losses0, state0), (losses1, state1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert not torch.equal(losses0[0], losses1[0])
    assert_same(([(a + b) / 2 for a, b in zip(losses0, losses1, strict=True)], state0), train())
    torch.testing.assert_close(state0, state1, atol=0, rtol=0)
