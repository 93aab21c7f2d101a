"""Writes a captioner as a folder that Hugging Face's transformers opens."""

from pathlib import Path

import compat  # noqa: F401

import safetensors.torch
import torch
from transformers import BlipConfig, BlipImageProcessor, BlipProcessor, GenerationConfig

from data.transforms import CLIP_MEAN, CLIP_STD
from models.captioner import Captioner
from models.checkpoint import hugging_face_name

# Under these names transformers 4 wants what version 5 ties to others.
_TIED = {
    "text_decoder.cls.predictions.decoder.weight": (
        "text_decoder.bert.embeddings.word_embeddings.weight"
    ),
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


def write_folder(
    model: Captioner, config: dict, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Writes what `BlipForConditionalGeneration` and `BlipProcessor` read with `from_pretrained`.

    Args:
        model: captioner.
        config: its `image_size`, and `num_beams`, `max_length` and `min_length` of its captions.
        folder: exists, and is empty.
        weights: what `stored_tensors(model)` gives, of one type.
    """
    encoder, tokenizer = model.visual_encoder, model.tokenizer
    vision = {
        "hidden_size": encoder.embed_dim,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "layer_norm_eps": encoder.norm.eps,
    }
    BlipConfig(
        text_config=model.text_decoder.config.to_dict(),
        vision_config=vision,
        architectures=["BlipForConditionalGeneration"],
        dtype=str(weights["visual_encoder.cls_token"].dtype).removeprefix("torch."),
    ).save_pretrained(folder)
    GenerationConfig(
        **{key: config[key] for key in ("num_beams", "max_length", "min_length")},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    images = BlipImageProcessor(
        size={"height": config["image_size"], "width": config["image_size"]},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)  # `preprocessor_config.json`, which transformers 4 reads
    words = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    # so that a config of ours can name the folder as its tokenizer
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    weights = weights | {name: weights[source].clone() for name, source in _TIED.items()}
    renamed = {hugging_face_name(name): value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    # which the library makes private
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
