"""Writes a captioner as a folder that Hugging Face's transformers opens."""

from pathlib import Path

import compat  # noqa: F401

import safetensors.torch
import torch
from transformers import BlipConfig, BlipImageProcessor, BlipProcessor, GenerationConfig

from data.transforms import CLIP_MEAN, CLIP_STD
from models.captioner import Captioner
from models.checkpoint import hugging_face_name


def write_folder(
    model: Captioner, config: dict, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Writes what `BlipForConditionalGeneration` and `BlipProcessor` read with `from_pretrained`.

    The folder also gets the tokenizer's `vocab.txt`, so that a config of ours can name it.

    Args:
        model: captioner.
        config: its `image_size`, and `num_beams`, `max_length` and `min_length` of its captions.
        folder: exists, and is empty.
        weights: what `stored_tensors(model)` gives, of one type.
    """
    blip_config(model, weights["visual_encoder.cls_token"].dtype).save_pretrained(folder)
    GenerationConfig(
        num_beams=config["num_beams"],
        max_length=config["max_length"],
        min_length=config["min_length"],
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    ).save_pretrained(folder)
    images = BlipImageProcessor(
        size={"height": config["image_size"], "width": config["image_size"]},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    BlipProcessor(images, model.tokenizer).save_pretrained(folder)
    words = model.tokenizer.convert_ids_to_tokens(range(model.tokenizer.vocab_size))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    renamed = {hugging_face_name(name): value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    # which the library makes private
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def blip_config(model: Captioner, dtype: torch.dtype) -> BlipConfig:
    """The sizes of a captioner in Hugging Face's words."""
    encoder, text = model.visual_encoder, model.text_decoder.config
    vision = {
        "hidden_size": encoder.embed_dim,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "layer_norm_eps": encoder.norm.eps,
    }
    return BlipConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        architectures=["BlipForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
    )
