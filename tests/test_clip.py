"""CLIP: golden steps, parts and processes of a step, checkpoints, layers, tokens."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from data.scenes.words import vocabulary
from models import build_clip, clip, load_checkpoint, modality, prunable_layers
from tests.conftest import read_golden
from tests.runs import on_two_processes
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


def test_momentum_copy_follows_and_takes_the_final_text_norm_whole(model):
    before = {n: v.clone() for n, v in model.momentum_copy.named_buffers()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    model(*batch())
    for name, parameter in model.named_parameters():
        kept = 0.0 if name.startswith("ln_final.") else 0.995
        expected = kept * before[name] + (1 - kept) * parameter.detach()
        torch.testing.assert_close(model.momentum_copy.get_buffer(name), expected)


def test_queues_are_filled_in_turn_with_the_models_own_features(model):
    assert (model.id_queue == -100).all()
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(24))
    torch.testing.assert_close(model.text_queue.norm(dim=0), torch.ones(24))
    with torch.no_grad():
        model.text_projection.mul_(-1)  # unlike the copy's
        for step in range(4):
            image, texts, ids = batch(8)
            model(image, texts, ids + 10 * step)
            columns = slice(8 * (step % 3), 8 * (step % 3) + 8)
            assert model.queue_pointer == (8, 16, 0, 8)[step]
            for queue, features in (
                (model.image_queue, model.encode_image(image)),
                (model.text_queue, model.encode_text(texts)),
            ):
                unit = features / features.norm(dim=1, keepdim=True)
                torch.testing.assert_close(queue[:, columns], unit.T, **CLOSE)
            assert torch.equal(model.id_queue[columns], ids + 10 * step)
    assert model.id_queue[8:].min() == 10 and model.id_queue[:8].min() == 30


def test_logit_scale_is_clamped(model):
    for value, clamped in ((9.0, 4.6052), (-1.0, 0.0)):
        model.logit_scale.data.fill_(value)
        model(*batch())
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_alpha_ramps_over_the_first_epoch(model):
    inputs, state = batch(), {name: value.clone() for name, value in model.state_dict().items()}

    def loss(alpha, epochs):
        model.load_state_dict(state)
        model.alpha = alpha
        model.on_step(epochs, [inputs])
        return model(*inputs).item()

    for epochs, alpha in ((0.0, 0.0), (0.25, 0.1), (3.5, 0.4)):
        assert loss(0.4, epochs) == loss(alpha, 1.0)
    assert len({loss(alpha, 1.0) for alpha in (0.0, 0.1, 0.4)}) == 3


def test_autocast_does_not_reach_the_logits(golden_clip, monkeypatch):
    image, texts, ids = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = clip._unit_features(golden_clip, image, texts)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(4, 2))  # in float32, too
    monkeypatch.setattr(clip, "_unit_features", lambda *_: features)
    state = {name: value.clone() for name, value in golden_clip.state_dict().items()}
    expected = golden_clip(image, texts, ids)
    golden_clip.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(golden_clip(image, texts, ids), expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_must_fill_the_queues_evenly(model, parts):
    model.check_batch(8)
    for count in (5, 48):
        with pytest.raises(UserError, match=f"queue_size 24 is no multiple of the {count} samples"):
            model.check_batch(count)
    with pytest.raises(UserError, match=f"no multiple of the {5 * parts} samples of a step"):
        model.on_step(1.0, [batch(5)] * parts)


def test_a_restored_model_goes_on_as_if_nothing_had_happened(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [batch() for _ in range(3)]
    model(*batches[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    restored = build_clip(CONFIG)
    restored.load_state_dict(model.state_dict())
    for inputs in batches[1:]:
        assert torch.equal(model(*inputs), restored(*inputs))
    assert set(restored.state_dict()) == set(model.state_dict())
    for name, value in restored.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# --- checkpoints


def random_weights(model) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(value) for name, value in model.named_parameters()}


def assert_started_from(model, weights):
    """The model and its momentum copy have these weights."""
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value), name
        assert torch.equal(model.momentum_copy.get_buffer(name), value), name


def test_openai_weights_load(model, tmp_path):
    weights = {name: value.half() for name, value in random_weights(model).items()}
    others = {n: torch.tensor(32) for n in ("input_resolution", "context_length", "vocab_size")}
    torch.save(weights | others, tmp_path / "openai.pt")
    report = load_checkpoint(model, tmp_path / "openai.pt")
    assert set(report.loaded) >= set(weights)
    assert report.ignored == list(others) and report.initialised == []
    assert_started_from(model, {name: value.float() for name, value in weights.items()})


def test_weights_of_upop_load_without_their_training_state(model, tmp_path):
    weights = random_weights(model)
    copies = {
        name.replace("visual.", "visual_m."): torch.rand_like(value)
        for name, value in weights.items()
        if name.startswith("visual.")
    }
    copies |= {"text_projection_m": torch.rand(64, 24), "ptr_queue": torch.zeros(1)}
    queues = {"image_queue": torch.rand(24, 57600), "text_queue": torch.rand(24, 57600)}
    before = model.image_queue.clone()
    torch.save({"model": weights | copies | queues, "epoch": 4}, tmp_path / "upop.pth")
    report = load_checkpoint(model, tmp_path / "upop.pth")
    assert report.ignored == list(copies)
    assert torch.equal(model.image_queue, before)
    assert_started_from(model, weights)


def test_own_weights_load_with_and_without_the_training_state(model, tmp_path):
    model(*batch())
    weights = dict(model.named_parameters())
    for name, saved in (("whole", model.state_dict()), ("weights", weights)):
        save_file({n: v.detach() for n, v in saved.items()}, tmp_path / f"{name}.safetensors")
        other = build_clip(CONFIG)
        report = load_checkpoint(other, tmp_path / f"{name}.safetensors")
        assert report.ignored == report.initialised == []
        assert_started_from(other, weights)
        assert (other.id_queue == -100).all()


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
    report = load_checkpoint(large, tmp_path / "clip.pt")
    assert report.resampled == ["visual.positional_embedding"]
    embedding = large.visual.positional_embedding.detach()
    assert torch.equal(embedding[0], torch.full((128,), 7.0))
    # row 1 of 6 lies at 0.5 of 4: cubic weights -3/32, 19/32, 19/32, -3/32 of rows 0, 0, 1, 2
    torch.testing.assert_close(embedding[7], torch.full((128,), 13 / 32), atol=1e-6, rtol=0)
    assert torch.equal(large.momentum_copy.visual.positional_embedding, embedding)


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


# --- the official size


def official_shapes() -> dict[str, list[int]]:
    """Names and shapes of OpenAI's ViT-L/14 at 336 px, from its sizes."""
    shapes = {"logit_scale": [], "text_projection": [768, 768], "positional_embedding": [77, 768]}
    shapes |= {"token_embedding.weight": [49408, 768], "visual.class_embedding": [1024]}
    shapes |= {"visual.positional_embedding": [24 * 24 + 1, 1024], "visual.proj": [1024, 768]}
    shapes |= {"visual.conv1.weight": [1024, 3, 14, 14]}
    norms = {"ln_final": 768, "visual.ln_pre": 1024, "visual.ln_post": 1024}
    linear = {}
    for tower, width, blocks in (("visual.transformer", 1024, 24), ("transformer", 768, 12)):
        for block in (f"{tower}.resblocks.{index}" for index in range(blocks)):
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            linear |= {f"{block}.attn.out_proj": [width, width]}
            linear |= {f"{block}.mlp.c_fc": [4 * width, width]}
            linear |= {f"{block}.mlp.c_proj": [width, 4 * width]}
            shapes |= {f"{block}.attn.in_proj_weight": [3 * width, width]}
            shapes |= {f"{block}.attn.in_proj_bias": [3 * width]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": [width], f"{name}.bias": [width]}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_official_key_list_and_layers_of_clip_large():
    with torch.device("meta"):
        large = build_clip({"clip": "large", "image_size": 336})
    shapes = {name: list(value.shape) for name, value in large.named_parameters()}
    assert shapes == official_shapes()
    assert sum(p.numel() for p in large.parameters()) == 427_944_193
    assert large.image_queue.shape == large.text_queue.shape == (768, 57600)
    layers = prunable_layers(large)
    profile = json.loads(Path("configs/id/clip_flickr.json").read_text())
    assert list(layers) == list(profile) and len(layers) == 108
    kinds = [modality(name) for name in layers]
    assert kinds == ["vision"] * 72 + ["language"] * 36
    assert round(sum([*profile.values()][:72]) / 72, 1) == 24.4  # the published means
    assert round(sum([*profile.values()][72:]) / 36, 1) == 10.9
    wide, narrow = 24 * (9 * 1024**2 + 6 * 1024), 12 * (9 * 768**2 + 6 * 768)
    assert sum(m.weight.numel() + m.bias.numel() for m in layers.values()) == wide + narrow


# --- profiling


def run_stages(model, **states) -> dict[str, torch.Tensor]:
    for stage in model.stages():
        states[stage.writes] = stage.run(*(states[name] for name in stage.reads))
    return states


def test_stages_call_every_layer_once_in_order_and_give_the_features(model):
    image, texts, _ = batch()
    layers, outputs, expected = prunable_layers(model), {}, {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
        if name.endswith(".attn.out_proj"):  # what stands for it in the model's own forward
            attention = model.get_submodule(name.removesuffix(".out_proj"))
            attention.register_forward_hook(
                lambda m, args, out, name=name: expected.update({name: out[0]})
            )
    with torch.no_grad():
        features = model.encode_image(image), model.encode_text(texts)
        expected |= {name: out for name, out in outputs.items() if ".mlp." in name}
        outputs.clear()
        states = run_stages(model, image=image, input_ids=texts)
    assert list(outputs) == list(layers) and set(outputs) == set(expected)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], **CLOSE)
    end = states["text"][torch.arange(4), texts.argmax(dim=1)]
    found = states["tokens"][:, 0] @ model.visual.proj, end @ model.text_projection
    for feature, own in zip(found, features, strict=True):
        torch.testing.assert_close(feature, own, **CLOSE)


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
    torch.testing.assert_close(run[0], other[0], **close)
    assert set(run[1]) == set(other[1])
    for name, value in run[1].items():
        torch.testing.assert_close(value, other[1][name], **close)


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
    for name, value in state0.items():
        assert torch.equal(state1[name], value), name
