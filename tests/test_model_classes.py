"""Classes of transformers and timm: each layer as a plain measurement of its outputs, or named.

The models are of one block and have random weights.
"""

import pytest
import timm
import torch
import transformers
from torch import nn
from transformers.models.perceiver.modeling_perceiver import PerceiverTextPreprocessor

from dimension import measure
from dimension.any_model import MASKS, choose_layers
from dimension.profile import Estimation
from dimension.twonn import pairwise_distances
from tests.runs import outputs_of

N, SIZE = 24, 5  # samples, also of a batch
# What is kept is rounded to float32, by 2^-24 of itself, of the order of its distance to its
# neighbours. Those errors average out over the hundreds of elements of a distance and over the
# points of a fit, so that an ID moves by far less than this, which is what is promised.
PROMISED = 1e-6
WORDS, LENGTH = 40, 8
BLOCK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
BLOCK |= {"num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = BLOCK | {"vocab_size": WORDS}
SHORT = TEXT | {"max_position_embeddings": LENGTH}
LONG = TEXT | {"max_position_embeddings": 32}
GROUPED = TEXT | {"num_key_value_heads": 2}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
SIDES = {f"{x}_{k}": v for x in ("encoder", "decoder") for k, v in
         {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
BART = SIDES | {"vocab_size": WORDS, "d_model": 16, "pad_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": WORDS, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24}
OPT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
LATENT = {"num_latents": 4, "d_latents": 16, "d_model": 16, "qk_channels": 8, "v_channels": 16}
LATENT |= {"num_self_attends_per_block": 1, "num_self_attention_heads": 2}
SOUND = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_buckets": 8}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}


def texts(length=LENGTH, image_tokens=0, prefix=""):
    """Ids and mask of texts of four tokens or more, after tokens in the place of a picture."""
    lengths = torch.randint(4, length + 1, (N, 1))
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(5, WORDS, mask.shape) * mask
    image = torch.full((N, image_tokens), 2)
    ids, mask = torch.cat([image, ids], 1), torch.cat([torch.ones_like(image), mask], 1)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def pictures(size=16):
    return {"pixel_values": torch.randn(N, 3, size, size)}


def both(image_tokens=0):
    given = texts(image_tokens=image_tokens) | pictures()
    last = given["attention_mask"].sum(1) - 1
    given["input_ids"][torch.arange(N), last] = WORDS - 1  # the end, where CLIP looks for it
    return given


def two_texts():
    return texts() | texts(6, prefix="decoder_")


def inputs_of_perceiver():
    given = texts()
    return {"inputs": given["input_ids"], "attention_mask": given["attention_mask"]}


def of(name, inputs, *parts, model="Model", **sizes):
    """A class of transformers with its config's sizes, and what makes its inputs."""
    keys = ("text_config", "vision_config", "qformer_config")
    made = (getattr(transformers, f"{part}Config")(**given) for part, given in parts)
    config = dict(zip(keys, made, strict=False)) | sizes

    def make():
        kind = getattr(transformers, f"{name}Config")
        return getattr(transformers, name + model)(kind(**config))

    return make, inputs


def perceiver():
    config = transformers.PerceiverConfig(**LATENT, num_blocks=1, num_cross_attention_heads=2,
        vocab_size=WORDS, max_position_embeddings=LENGTH)  # fmt: skip
    return transformers.PerceiverModel(config, input_preprocessor=PerceiverTextPreprocessor(config))


def of_timm(name, size=16, **sizes):
    return lambda: timm.create_model(name, img_size=size, num_classes=5, **sizes), (
        lambda: {"x": torch.randn(N, 3, size, size)}
    )


SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
CLASSES = {
    "SigLIP": of("Siglip", both, ("SiglipText", SHORT), ("SiglipVision", BLOCK | IMAGE)),
    "CLIP": of("CLIP", both, ("CLIPText", SHORT | {"eos_token_id": WORDS - 1}),
               ("CLIPVision", BLOCK | IMAGE)),
    "CaiT": of_timm("cait_xxs24_224", **SMALL),
    "EVA-02": of_timm("eva02_tiny_patch14_224", **SMALL),
    "Swin V2, timm": of_timm("swinv2_tiny_window8_256", 32, embed_dim=8, depths=(2, 1),
                             num_heads=(2, 2), window_size=4),
    "Perceiver": (perceiver, inputs_of_perceiver),
    "BEiT": of("Beit", pictures, **BLOCK, **IMAGE),
    "Swin V2": of("Swinv2", lambda: pictures(32), **SWIN, window_size=4),
    "T5": of("T5", two_texts, **T5),
    "Switch": of("SwitchTransformers", two_texts, **T5 | {"num_layers": 2}, num_experts=3,
                 num_sparse_encoder_layers=1),
    "BART": of("Bart", two_texts, **BART),
    "Whisper": of("Whisper", lambda: {"input_features": torch.randn(N, 8, 32),
                  "decoder_input_ids": torch.randint(3, WORDS, (N, 5))}, **BART, num_mel_bins=8,
                  max_source_positions=16, decoder_start_token_id=0),
    "Mixtral": of("Mixtral", texts, **GROUPED, num_local_experts=3),
    "Mamba": of("Mamba", texts, vocab_size=WORDS, hidden_size=16, state_size=4,
                num_hidden_layers=1),
    "LLaVA": of("Llava", lambda: both(4), ("Llama", GROUPED), ("CLIPVision", BLOCK | IMAGE),
                image_token_index=2, vision_feature_layer=-1),
    "BLIP-2": of("Blip2", lambda: both(2), ("OPT", OPT), ("Blip2Vision", BLOCK | IMAGE),
                 ("Blip2QFormer", TEXT | {"encoder_hidden_size": 16,
                  "cross_attention_frequency": 1}),
                 num_query_tokens=2, image_token_index=2, model="ForConditionalGeneration"),
    "BLIP": of("Blip", both, ("BlipText", LONG), ("BlipVision", BLOCK | IMAGE),
               model="ForConditionalGeneration"),
    "WavLM": of("WavLM", lambda: {"input_values": torch.randn(N, 64)}, **BLOCK, **SOUND,
                num_feat_extract_layers=2, max_bucket_distance=16),
    "BERT": of("Bert", texts, **TEXT),
    "MPNet": of("MPNet", texts, **TEXT),
    "Bloom": of("Bloom", texts, vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2),
    "GPT-2": of("GPT2", texts, vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2),
    "Qwen 3": of("Qwen3", texts, **GROUPED, head_dim=8),
    "DeBERTa": of("DebertaV2", texts, **TEXT, relative_attention=True, position_buckets=4,
                  pos_att_type=["p2c", "c2p"], max_relative_positions=8),
    "ViT": of("ViT", pictures, **BLOCK, **IMAGE),
    "DINOv2": of("Dinov2", pictures, **BLOCK, **IMAGE),
    "YOLOS": of("Yolos", pictures, **BLOCK, image_size=[16, 16], patch_size=8,
                num_detection_tokens=3),
}  # fmt: skip
LEFT_OUT = {  # by what a name holds; of all other classes nothing
    "EVA-02": "attn.qkv", "Swin V2, timm": "cpb_mlp attn.qkv", "Mamba": "dt_proj",
    "Swin V2": "continuous_position_bias_mlp", "WavLM": "attention.", "DeBERTa": "self.pos_",
    "Switch": "experts.",
}  # fmt: skip


def in_batches(inputs, size):
    """Mappings, as processors return them."""
    parts = {name: x.split(size) for name, x in inputs.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


def far_apart(model):
    """The model with weights from which samples differ in all layers."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def assert_ids(profile, outputs, rel=PROMISED):
    """IDs against those of whole outputs (n, ...) by layer name."""
    for name, x in outputs.items():
        expected = Estimation().measure(name, 0, pairwise_distances(x.detach().flatten(1))).id
        assert profile.layers[name].id == pytest.approx(expected, rel=rel), name


@pytest.mark.parametrize("kind", CLASSES)
def test_each_layer_is_measured_as_its_outputs_or_named(kind):
    make, inputs = CLASSES[kind]
    model, given = far_apart(make()), inputs()
    batches = in_batches(given, SIZE)
    profile = measure(model, batches, memory_gb=1)
    layers = choose_layers(model)
    kept = {name: layers[name] for name in profile.layers}
    calls = outputs_of(kept, lambda: [model(**batch) for batch in batches])
    joined, sizes = {}, [min(SIZE, N - i) for i in range(0, N, SIZE)]
    for name, outputs in calls.items():
        outputs = [x[0] if isinstance(x, tuple) else x for x in outputs]
        rows = [x.unflatten(0, (n, -1)) for x, n in zip(outputs, sizes, strict=True)]
        joined[name] = torch.cat([x.flatten(1, -2) for x in rows])  # (N, L, width)
        for mask in [given[x] for x in MASKS if x in given]:  # no two lengths are the same
            if mask.shape[1] == joined[name].shape[1]:
                joined[name] = joined[name] * mask[..., None]
    assert_ids(profile, joined, rel=1e-5)
    remarks = " ".join(x for x in profile.remarks if x.startswith("left out"))
    missing = [name for name in layers if name not in kept]
    assert all(name in remarks for name in missing)
    parts = LEFT_OUT.get(kind, "").split()
    assert all(any(part in name for part in parts) for name in missing)
    assert all(any(part in name for name in missing) for part in parts)
    fused = [x for x in profile.remarks if x.startswith("not looked at")]
    assert [x.split(": ")[1] for x in fused] == ["layers.0.mlp.experts"] * (kind == "Mixtral")
