"""BLIP's NLVR2 model: does a sentence hold for a pair of images?

Its text encoder has two cross-attentions a layer, one for each image (Li et al., BLIP, ICML 2022,
section 5.4 and figure 5).
"""

import re

import compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from models.blip import Blip
from models.checkpoint import Weights
from models.stages import Stage, text_stages, vision_stages

FIRST_MERGED_LAYER = 6  # from here on a layer merges what it saw in the two images; before: mean
_CROSS_ATTENTION = re.compile(r"^text_encoder\..*\.crossattention\.(self|output\.dense)(?=\.)")


class TwinCrossAttention(nn.Module):
    """Cross-attention to two images: their outputs' mean or merge, dropout, residual, LayerNorm."""

    def __init__(self, config: BlipTextConfig, merge: bool):
        super().__init__()
        width = config.hidden_size
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = nn.Module()  # the checkpoints' name
        self.output.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output.dense0 = nn.Linear(width, width)
        self.output.dense1 = nn.Linear(width, width)
        self.output.merge_layer = nn.Linear(2 * width, width) if merge else None

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **_
    ) -> tuple[Tensor, None]:
        """Text states (B, L, D) from such and two images (B, L_img, D_img), which need no mask."""
        image0, image1 = encoder_hidden_states
        output0 = self.output.dense0(self.self0(hidden_states, encoder_hidden_states=image0)[0])
        output1 = self.output.dense1(self.self1(hidden_states, encoder_hidden_states=image1)[0])
        if self.output.merge_layer is None:
            joined = (output0 + output1) / 2
        else:
            joined = self.output.merge_layer(torch.cat([output0, output1], dim=-1))
        return self.output.LayerNorm(self.output.dropout(joined) + hidden_states), None


class TwinTextEncoder(BlipTextModel):
    """BLIP's text encoder with twin cross-attention in every layer."""

    def __init__(self, config: BlipTextConfig):
        super().__init__(config, add_pooling_layer=False)
        for index, layer in enumerate(self.encoder.layer):
            layer.crossattention = TwinCrossAttention(config, merge=index >= FIRST_MERGED_LAYER)
        self.post_init()  # initialises the twins as the library does the rest


class NlvrClassifier(Blip):
    """Judges a statement about a pair of images."""

    def __init__(self, config: dict):
        # BLIP trains base with a drop path of 0.1 for NLVR2
        super().__init__(config, "[ENC]", drop_path_rate=0.1 if config["vit"] == "base" else 0.0)
        self.text_encoder = TwinTextEncoder(self.text_config)
        width = self.text_config.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def prepare(
        self, image0: Tensor, image1: Tensor, sentences: list[str], targets: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        """`forward`'s images, ids and mask (B, L) and targets; the number of statements."""
        return (image0, image1, *self.tokenize(sentences), targets), len(sentences)

    def forward(self, image0: Tensor, image1: Tensor, *text) -> Tensor:
        """Cross-entropy of the two classes, a mean over the statements of a batch.

        Args:
            image0: (B, 3, S, S) left images, normalised.
            image1: (B, 3, S, S) right images.
            *text: B sentences and targets (B,) int64, 1 where the statement holds; or the tensors
                of `prepare`.
        """
        if len(text) == 2:
            (_, _, *text), _ = self.prepare(image0, image1, *text)
        input_ids, attention_mask, targets = (tensor.to(image0.device) for tensor in text)
        logits = self.logits_from_ids(image0, image1, input_ids, attention_mask)
        return F.cross_entropy(logits, targets)

    def logits(self, image0: Tensor, image1: Tensor, sentences: list[str]) -> Tensor:
        """(B, 2) logits of "false" and "true" of B sentences about pairs of images."""
        text = (tensor.to(image0.device) for tensor in self.tokenize(sentences))
        return self.logits_from_ids(image0, image1, *text)

    def logits_from_ids(
        self, image0: Tensor, image1: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """(B, 2) logits of "false" and "true" from token ids and their mask, both (B, L)."""
        images = self.visual_encoder(torch.cat([image0, image1])).chunk(2)  # in one call
        return self.cls_head(self.encode_text(images, input_ids, attention_mask)[:, 0])

    def encode_text(
        self, images: tuple[Tensor, Tensor], input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Final text states (B, L, D), given the images' embeddings (B, L_img, D_img)."""
        # a mask of 0s and 1s makes the library look for padding, and each step wait for the GPU
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
        only an NLVR2 model has may then be missing.
        """
        base = any(name.startswith("text_encoder.") for name in weights)
        adapted = {}
        for name, value in weights.items():
            if not base:
                name = name.replace("text_decoder.bert.", "text_encoder.")
            for twin in "01":
                adapted[_CROSS_ATTENTION.sub(rf"\g<0>{twin}", name)] = value
        if len(adapted) == len(weights):
            return adapted, set()
        own = {n for n in self.state_dict() if n.startswith("cls_head.") or ".merge_layer." in n}
        return adapted, own


build_nlvr = NlvrClassifier
