"""BLIP's NLVR2 model: does a sentence hold for a pair of images?

It is BLIP's text encoder with its cross-attention doubled: one attends to the first image, its twin
to the second. The rest is timm's vision transformer and the BLIP text layers of transformers.

Source: Li et al., BLIP, ICML 2022, section 5.4 and figure 5.
"""

import re

import compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from models.checkpoint import Weights, blip_name
from models.stages import Stage, text_stages, vision_stages
from models.text import check_max_tokens, count_cut, load_tokenizer, text_config, tokenize
from models.vit import build_vision_encoder

FIRST_MERGED_LAYER = 6  # from here on a layer merges what it saw in the two images; before: mean
_SINGLE_CROSS_ATTENTION = re.compile(r"(?<=\.crossattention\.)(self|output\.dense)(?=\.)")


class TwinCrossAttention(nn.Module):
    """Cross-attention to two images, in the place of a BLIP text layer's `crossattention`."""

    def __init__(self, config, merge: bool):
        """Args: transformers' `BlipTextConfig`; whether the outputs are merged or averaged."""
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = TwinOutput(config, merge)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **_
    ) -> tuple[Tensor, None]:
        """Text states (B, L, D) from such and two images (B, L_img, D_img); no attention map.

        The library also passes a mask and a cache: images have no padding, encoders no cache.
        """
        image0, image1 = encoder_hidden_states
        context0, _ = self.self0(hidden_states, encoder_hidden_states=image0)
        context1, _ = self.self1(hidden_states, encoder_hidden_states=image1)
        return self.output(context0, context1, hidden_states), None


class TwinOutput(nn.Module):
    """Joins two contexts: a projection of each, mean or merge, dropout, residual, LayerNorm."""

    def __init__(self, config, merge: bool):
        """Arguments as `TwinCrossAttention`."""
        super().__init__()
        width = config.hidden_size
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None

    def forward(self, context0: Tensor, context1: Tensor, residual: Tensor) -> Tensor:
        """All (B, L, D)."""
        output0, output1 = self.dense0(context0), self.dense1(context1)
        if self.merge_layer is None:
            joined = (output0 + output1) / 2
        else:
            joined = self.merge_layer(torch.cat([output0, output1], dim=-1))
        return self.LayerNorm(self.dropout(joined) + residual)


class TwinTextEncoder(BlipTextModel):
    """BLIP's text encoder with twin cross-attention in every layer."""

    def __init__(self, config):
        """Args: transformers' `BlipTextConfig` with `is_decoder`, see `models.text.text_config`."""
        super().__init__(config, add_pooling_layer=False)
        for index, layer in enumerate(self.encoder.layer):
            layer.crossattention = TwinCrossAttention(config, merge=index >= FIRST_MERGED_LAYER)
        self.post_init()  # initialises the twins as the library does the rest


class NlvrClassifier(nn.Module):
    """Judges a statement about a pair of images, with the official checkpoints' names."""

    official_name = staticmethod(blip_name)

    def __init__(self, config: dict):
        """Makes random weights; see `build_nlvr`."""
        super().__init__()
        self.tokenizer = load_tokenizer(config["tokenizer"])
        # BLIP trains base with a drop path of 0.1 for NLVR2
        self.visual_encoder = build_vision_encoder(config, 0.1 if config["vit"] == "base" else 0.0)
        text = text_config(config["med_config"], self.visual_encoder.embed_dim, self.tokenizer)
        self.text_encoder = TwinTextEncoder(text)
        width, positions = text.hidden_size, text.max_position_embeddings
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.max_tokens = config.get("max_tokens", positions)
        check_max_tokens(self.max_tokens, 3, positions)

    def tokenize(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both (B, L)."""
        return tokenize(self.tokenizer, sentences, "[ENC]", self.max_tokens)

    def count_cut(self, sentences: list[str]) -> int:
        """Number of sentences that `max_tokens` cuts."""
        return count_cut(self.tokenizer, sentences, self.max_tokens)

    def prepare(
        self, image0: Tensor, image1: Tensor, sentences: list[str], targets: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        """The tensors of `forward`, and the number of statements, over which the loss is a mean.

        Args:
            image0: (B, 3, S, S) left images, normalised; handed on, as all tensors.
            image1: (B, 3, S, S) right images.
            sentences: B statements, of which ids and attention mask are made, (B, L) on the CPU.
            targets: (B,) int64, 1 where the statement holds.
        """
        return (image0, image1, *self.tokenize(sentences), targets), len(sentences)

    def forward(self, image0: Tensor, image1: Tensor, *text) -> Tensor:
        """The loss of a batch: cross-entropy of the two classes, a mean over the statements.

        Args:
            image0: (B, 3, S, S) left images, normalised.
            image1: (B, 3, S, S) right images.
            *text: sentences and targets, or what `prepare` makes of them.
        """
        if len(text) == 2:
            (_, _, *text), _ = self.prepare(image0, image1, *text)
        input_ids, attention_mask, targets = (tensor.to(image0.device) for tensor in text)
        logits = self.logits_from_ids(image0, image1, input_ids, attention_mask)
        return F.cross_entropy(logits, targets)

    def logits(self, image0: Tensor, image1: Tensor, sentences: list[str]) -> Tensor:
        """(B, 2) logits of "false" and "true"; arguments as `prepare`."""
        text = (tensor.to(image0.device) for tensor in self.tokenize(sentences))
        return self.logits_from_ids(image0, image1, *text)

    def logits_from_ids(
        self, image0: Tensor, image1: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """(B, 2) logits of "false" and "true" from token ids and their mask, both (B, L)."""
        images = self.encode_images(image0, image1)
        return self.cls_head(self.encode_text(images, input_ids, attention_mask)[:, 0])

    def encode_images(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings, (B, L_img, D_img) each, of two batches (B, 3, S, S); one ViT call."""
        return self.visual_encoder(torch.cat([image0, image1])).chunk(2)

    def encode_text(
        self, images: tuple[Tensor, Tensor], input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Final text states (B, L, D), given the images' embeddings (B, L_img, D_img)."""
        # as the layers add it: of 0s and 1s the library asks first whether there is any padding,
        # so that every step would wait for the GPU
        dtype = self.text_encoder.dtype
        added = torch.zeros_like(attention_mask, dtype=dtype)
        added.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
        return self.text_encoder(
            input_ids, attention_mask=added[:, None, None], encoder_hidden_states=images
        ).last_hidden_state

    def stages(self) -> list[Stage]:
        """The forward pass over "image0" (the vision layers' samples), "image1" and text."""
        return [
            *vision_stages(self.visual_encoder, "image0", "tokens0"),
            *vision_stages(self.visual_encoder, "image1", "tokens1"),
            *text_stages(self.text_encoder, images=("tokens0", "tokens1"), causal=False),
        ]

    def adapt_weights(self, weights: Weights) -> tuple[Weights, set[str]]:
        """Starts both twins from the cross-attention of a BLIP that sees one image.

        Its text transformer is `text_encoder` (BLIP base) or `text_decoder` (a captioner). What
        only an NLVR2 model has may then be missing. See `load_checkpoint`.
        """
        if not any(name.startswith("text_encoder.") for name in weights):
            weights = {
                name.replace("text_decoder.bert.", "text_encoder."): value
                for name, value in weights.items()
            }
        adapted = {}
        for name, value in weights.items():
            if name.startswith("text_encoder.") and _SINGLE_CROSS_ATTENTION.search(name):
                for twin in "01":
                    adapted[_SINGLE_CROSS_ATTENTION.sub(rf"\g<1>{twin}", name)] = value
            else:
                adapted[name] = value
        if len(adapted) == len(weights):
            return weights, set()
        own = {n for n in self.state_dict() if n.startswith("cls_head.") or ".merge_layer." in n}
        return adapted, own


def build_nlvr(config: dict) -> NlvrClassifier:
    """Builds an NLVR2 model with random weights.

    Args:
        config: `vit`, `image_size`, `med_config`, `tokenizer`, and optionally `max_tokens` (default
            as in the original: all positions), `vit_grad_ckpt` and `vit_ckpt_layer`.

    Raises:
        UserError: a value that cannot be, or a tokenizer that cannot be read.
    """
    return NlvrClassifier(config)
