"""Writes a captioner as a folder that Hugging Face's transformers opens."""

from pathlib import Path

import compat  # noqa: F401

import safetensors.torch
from torch import Tensor
from transformers import BlipConfig, BlipImageProcessor, BlipProcessor, GenerationConfig

from data.transforms import CLIP_MEAN, CLIP_STD
from models.captioner import Captioner
from models.checkpoint import hugging_face_name
from models.text import write_vocabulary
from utils import write_json

_HEAD = "text_decoder.cls.predictions"
_TIED = {  # names that transformers 4 wants in the file, and version 5 ties
    f"{_HEAD}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
}


def write_folder(model: Captioner, config: dict, folder: Path, weights: dict[str, Tensor]) -> None:
    """Fills a folder for `BlipForConditionalGeneration` and `BlipProcessor`.

    `weights` are the tensors of `stored_tensors(model)`, in one type.
    """
    encoder, tokenizer = model.visual_encoder, model.tokenizer
    block = encoder.blocks[0]
    vision = {
        "hidden_size": encoder.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
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
    size = dict.fromkeys(("height", "width"), config["image_size"])
    images = BlipImageProcessor(size=size, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)  # `preprocessor_config.json`, which all versions read
    # in version 5 the processor's file repeats it, on which 4.46 stumbles
    write_json(folder / "processor_config.json", {"processor_class": "BlipProcessor"})
    write_vocabulary(tokenizer, folder)  # a config of ours may name the folder as its tokenizer
    weights = weights | {name: weights[source].clone() for name, source in _TIED.items()}
    renamed = {hugging_face_name(name): value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    # safetensors makes private files
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
