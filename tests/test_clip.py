"""CLIP: the golden steps, checkpoints of every format, layers, tokens, and two processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from data.scenes.words import vocabulary
from dimension.budget import plan_capture
from dimension.capture import Capture, Samples, trace_stages
from dimension.twonn import pairwise_distances
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
    load_checkpoint(model, tmp_path / "clip.safetensors")
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
        step_inputs = (inputs[name][step] for name in ("images", "texts", "idx"))
        loss = golden_clip.contrastive_loss(*step_inputs, alpha)
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
    with torch.no_grad():
        loss = golden_clip.contrastive_loss(image, texts, ids, 0.3)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), **CLOSE)


def test_momentum_copy_follows_and_takes_the_final_text_norm_whole(model):
    before = {n: v.clone() for n, v in model.momentum_copy.named_buffers()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    model.contrastive_loss(*batch(), 0.4)
    for name, parameter in model.named_parameters():
        expected = 0.995 * before[name] + 0.005 * parameter
        if name.startswith("ln_final."):
            expected = parameter
        torch.testing.assert_close(model.momentum_copy.get_buffer(name), expected.detach())


def test_queues_are_filled_in_turn_with_the_models_own_features(model):
    assert (model.id_queue == -100).all()
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(24))
    torch.testing.assert_close(model.text_queue.norm(dim=0), torch.ones(24))
    with torch.no_grad():
        model.text_projection.mul_(-1)  # unlike the copy's
        for step in range(4):
            image, texts, ids = batch(8)
            model.contrastive_loss(image, texts, ids + 10 * step, 0.4)
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
        model.contrastive_loss(*batch(), 0.4)
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_alpha_ramps_over_the_first_epoch(model):
    inputs, losses = batch(), {}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for epochs, alpha in ((0.0, 0.0), (0.25, 0.1), (1.0, 0.4), (3.5, 0.4)):
        model.load_state_dict(state)
        model.on_step(epochs)
        losses[epochs] = model(*inputs)
        model.load_state_dict(state)
        assert torch.equal(losses[epochs], model.contrastive_loss(*inputs, alpha))
    assert len({loss.item() for loss in losses.values()}) == 3


def test_autocast_does_not_reach_the_logits(golden_clip, monkeypatch):
    image, texts, ids = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images, texts = clip._normalised_features(golden_clip, image, texts)
    assert images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=1), torch.ones(4))  # normalised in float32, too
    monkeypatch.setattr(clip, "_normalised_features", lambda *_: (images, texts))
    state = {name: value.clone() for name, value in golden_clip.state_dict().items()}
    expected = golden_clip.contrastive_loss(image, texts, ids, 0.4)
    golden_clip.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(golden_clip.contrastive_loss(image, texts, ids, 0.4), expected)


def test_batches_must_fill_the_queues_evenly(model):
    model.check_batch(8)
    for count in (5, 48):
        with pytest.raises(UserError, match=f"queue_size 24 is no multiple of the {count} samples"):
            model.check_batch(count)
    with pytest.raises(UserError, match="no multiple of the 5 samples"):
        model(*batch(5))


# --- state


def test_only_weights_are_parameters_and_checkpoints_hold_everything(golden_clip):
    parameters = dict(golden_clip.named_parameters())
    assert set(parameters) == set(read_golden("clip_tiny", "weights."))
    others = {f"momentum_copy.{name}" for name in parameters}
    others |= {"image_queue", "text_queue", "id_queue", "queue_pointer"}
    assert set(golden_clip.state_dict()) == set(parameters) | others
    shapes = [
        tuple(golden_clip.get_buffer(f"{name}_queue").shape) for name in ("image", "text", "id")
    ]
    assert shapes == [(24, 24), (24, 24), (24,)]


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


def test_weights_of_upop_and_the_original_load_without_their_training_state(model, tmp_path):
    weights = random_weights(model)
    towers = ("visual.", "transformer.", "token_embedding.", "ln_final.")
    copies = {
        tower.replace(".", "_m.") + name.removeprefix(tower): torch.rand_like(value)
        for name, value in weights.items()
        for tower in towers
        if name.startswith(tower)
    }
    copies |= {
        "text_projection_m": torch.rand(64, 24),
        "positional_embedding_m": torch.rand(16, 64),
    }
    queues = {"image_queue": torch.rand(24, 57600), "text_queue": torch.rand(24, 57600)}
    queues |= {"idx_queue": torch.zeros(1, 57600), "ptr_queue": torch.zeros(1)}
    before = model.image_queue.clone()
    torch.save({"model": weights | copies | queues, "epoch": 4}, tmp_path / "upop.pth")
    report = load_checkpoint(model, tmp_path / "upop.pth")
    assert set(copies) | {"idx_queue", "ptr_queue"} == set(report.ignored)
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

    tower = {"hidden_act": "quick_gelu", "attention_dropout": 0.0}
    config = CLIPConfig(
        projection_dim=24,
        vision_config=tower
        | {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 24,
        },
        text_config=tower
        | {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "vocab_size": 160,
            "max_position_embeddings": 16,
            "projection_dim": 24,
            "bos_token_id": 158,
            "eos_token_id": 159,
            "pad_token_id": 0,
        },
    )
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
    names = ["visual.positional_embedding", "momentum_copy.visual.positional_embedding"]
    assert report.resampled == names
    assert f"2 resampled ({', '.join(names)})" in str(report)
    embedding = large.visual.positional_embedding.detach()
    assert torch.equal(embedding[0], torch.full((128,), 7.0))
    grid = embedding[1:].view(6, 6, 128)
    torch.testing.assert_close(grid, grid[:, :1, :1].expand(6, 6, 128))
    # row 1 of 6 lies at 0.5 of 4: cubic weights -3/32, 19/32, 19/32, -3/32 of rows 0, 0, 1, 2
    torch.testing.assert_close(grid[1, 0, 0].item(), 13 / 32, atol=1e-6, rtol=0)
    copy = large.momentum_copy.visual.positional_embedding
    assert torch.equal(copy, embedding)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_width": 32}, r"positional_embedding has shape \(16, 64\), .* is \(16, 32\)"),
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


def test_a_checkpoint_must_be_complete(model, tmp_path):
    weights = random_weights(model)
    weights.pop("visual.proj")
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"leaves 1 of .* unset.*visual\.proj"):
        load_checkpoint(model, tmp_path / "clip.pt")


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
    assert list(layers) == list(json.loads(Path("configs/id/clip_flickr.json").read_text()))
    assert len(layers) == 108
    kinds = [modality(name) for name in layers]
    assert kinds == ["vision"] * 72 + ["language"] * 36
    wide, narrow = 24 * (9 * 1024**2 + 6 * 1024), 12 * (9 * 768**2 + 6 * 768)
    assert sum(m.weight.numel() + m.bias.numel() for m in layers.values()) == wide + narrow


def test_published_profile_has_the_published_means():
    profile = json.loads(Path("configs/id/clip_flickr.json").read_text())
    for kind, mean in (("vision", 24.4), ("language", 10.9)):
        ids = [value for name, value in profile.items() if modality(name) == kind]
        assert round(sum(ids) / len(ids), 1) == mean


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


def test_layers_are_measured_like_those_of_other_models(model):
    """Distances between samples, from the staged engine and from whole outputs."""
    image, texts, _ = batch(12)
    inside = texts.bool()  # no text has the id of the padding
    samples = Samples({"input_ids": texts}, {"image": list(image)}, inside, batch_size=5)
    layers, outputs = prunable_layers(model.eval()), {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
    with torch.no_grad():
        run_stages(model, image=image, input_ids=texts)
    plain = {
        name: pairwise_distances(
            (out if modality(name) == "vision" else out * inside[..., None]).flatten(1)
        )
        for name, out in outputs.items()
    }
    cpu = torch.device("cpu")
    shapes = trace_stages(model.stages(), layers, samples, cpu)
    plan = plan_capture(shapes, set(layers), samples, 12, 10**9)
    capture = Capture(plan, layers, samples, cpu, progress=False)
    found = {name: distances for name, _, distances in capture}
    assert set(found) == set(plain)
    for name, distances in plain.items():
        torch.testing.assert_close(found[name], distances, rtol=1e-5, atol=1e-12)


# --- tokens


def test_openai_tokens():
    with torch.device("meta"):
        large = build_clip({"clip": "large", "image_size": 336})
    ids, mask = large.tokenize(["a photo of a cat", "dog " * 200])
    assert mask.sum(dim=1).tolist() == [7, 77]
    assert ids.shape == (2, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[0, 7:].sum() == 0 and ids[1, -1] == 49407


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


def test_text_after_the_end_token_changes_nothing(model):
    _, texts, _ = batch()
    texts[0, 5:] = torch.tensor([159, *[0] * 10])
    changed = texts.clone()
    changed[0, 6:] = 3
    earlier = texts.clone()
    earlier[0, 2] = 151
    with torch.no_grad():
        features, same, other = map(model.eval().encode_text, (texts, changed, earlier))
    torch.testing.assert_close(same, features)
    assert not torch.allclose(other[0], features[0])
    torch.testing.assert_close(other[1:], features[1:])


# --- configs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clip": "huge"}, "clip: 'huge' is none of"),
        ({"clip": {"width": 3}}, r"needs .*embed_dim.*; got \['width'\]"),
        ({"clip": TINY | {"text_layers": 0}}, "clip: text_layers must be a whole number"),
        ({"clip": TINY | {"vision_heads": 3}}, "vision_width 128 is no multiple of vision_heads 3"),
        ({"image_size": 36}, "image_size 36 is no multiple of patch_size 8"),
        ({"tokenizer": "clip"}, "vocab_size 160 is below the 49408 tokens of tokenizer 'clip'"),
        ({"tokenizer": "no/such/folder"}, "tokenizer: cannot load 'no/such/folder'"),
    ],
)
def test_bad_configs_are_named(change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        build_clip(CONFIG | change)


# --- several processes

STEPS, WORLD_SIZE = 3, 2


def train(model, rank: int, world_size: int) -> tuple[list[torch.Tensor], dict]:
    """Trains on this process's share of batches that all processes draw alike."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        share = slice(4 // world_size * rank, 4 // world_size * (rank + 1))
        loss = model(*(tensor[share] for tensor in batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {n.removeprefix("module."): v for n, v in model.state_dict().items()}


def work(rank: int, folder: Path):
    """A process of the data-parallel run."""
    torch.manual_seed(0)
    # nothing but the gathering keeps buffers equal
    model = DistributedDataParallel(build_clip(CONFIG), forward_sync_buffers=False)
    losses, state = train(model, rank, WORLD_SIZE)
    torch.save((losses, state), folder / f"{rank}.pt")


def test_two_processes_train_as_one_with_the_double_batch(tmp_path):
    on_two_processes(work, tmp_path)
    (losses0, state0), (losses1, state1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    torch.manual_seed(0)
    losses, state = train(build_clip(CONFIG), 0, 1)
    for loss0, loss1, loss in zip(losses0, losses1, losses, strict=True):
        torch.testing.assert_close((loss0 + loss1) / 2, loss, **CLOSE)
    for name, value in state.items():
        assert torch.equal(state0[name], state1[name]), name
        torch.testing.assert_close(state0[name], value, **CLOSE)
    assert state["queue_pointer"] == STEPS * 4
    assert not torch.equal(losses0[0], losses1[0])
