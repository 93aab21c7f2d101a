"""BLIP's captioner: a vision transformer, and a text decoder that cross-attends to its tokens."""

import compat  # noqa: F401

import torch
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.checkpoint import blip_name
from models.generation import generate_ids
from models.stages import Stage, text_stages, vision_stages
from models.text import (
    MAX_TOKENS,
    check_max_tokens,
    count_cut,
    load_tokenizer,
    text_config,
    tokenize,
)
from models.vit import build_vision_encoder
from utils import UserError

IGNORED_LABEL = -100


class Captioner(nn.Module):
    """Image captioning (Li et al., BLIP, ICML 2022), with the official checkpoints' names."""

    official_name = staticmethod(blip_name)

    def __init__(self, config: dict):
        """Makes random weights. Raises a UserError if a value cannot be.

        Args:
            config: `vit`, `image_size`, `med_config`, `tokenizer`, and optionally `prompt`,
                `length_normalization`, `max_tokens`, `vit_grad_ckpt` and `vit_ckpt_layer`.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(config["tokenizer"])
        self.visual_encoder = build_vision_encoder(config)
        text = text_config(config["med_config"], self.visual_encoder.embed_dim, self.tokenizer)
        self.text_decoder = BlipTextLMHeadModel(text)
        self.prompt = config.get("prompt", "a picture of ")
        self.prompt_length = len(self.tokenizer(self.prompt).input_ids) - 1  # [SEP] is no part
        for key in ("min_length", "max_length"):
            if key in config and config[key] <= self.prompt_length:
                raise UserError(
                    f"{key} {config[key]} must be above the length of the prompt, which it counts: "
                    f"{self.prompt_length} tokens"
                )
        self.max_tokens = config.get("max_tokens", MAX_TOKENS)
        check_max_tokens(self.max_tokens, self.prompt_length + 2, text.max_position_embeddings)
        self.length_normalization = config.get("length_normalization", "total")

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) to token embeddings (B, L, D)."""
        return self.visual_encoder(image)

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both (B, L), of captions that begin with the prompt."""
        return tokenize(self.tokenizer, captions, "[DEC]", self.max_tokens)

    def count_cut(self, captions: list[str]) -> int:
        """Number of captions that `max_tokens` cuts."""
        return count_cut(self.tokenizer, captions, self.max_tokens)

    def prepare(self, image: Tensor, captions: list[str]) -> tuple[tuple[Tensor, ...], int]:
        """The tensors of `forward`, and the number of predicted tokens: those after the prompt.

        The tensors are the image, and input ids, attention mask and labels, each (B, L).
        """
        input_ids, attention_mask = self.tokenize(captions)
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        labels[:, : self.prompt_length] = IGNORED_LABEL
        terms = int((labels != IGNORED_LABEL).sum())
        return (image, input_ids, attention_mask, labels), terms

    def forward(self, image: Tensor, *text) -> Tensor:
        """Label-smoothed cross-entropy, a mean over all predicted tokens of a batch.

        Args:
            image: (B, 3, S, S), normalised.
            *text: B captions that begin with the prompt, or the tensors of `prepare`.
        """
        if len(text) == 1:
            (_, *text), _ = self.prepare(image, *text)
        return self.text_loss(self.encode_image(image), *(t.to(image.device) for t in text))

    def text_loss(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of `forward` from image tokens (B, L, D)."""
        return self.text_decoder(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            labels=labels,
        ).loss

    def stages(self) -> list[Stage]:
        """The forward pass over "image", "input_ids" and "attention_mask", for profiling."""
        return [
            *vision_stages(self.visual_encoder),
            *text_stages(self.text_decoder.bert, images=("tokens",), causal=True),
        ]

    @torch.no_grad()
    def generate_ids(
        self, image: Tensor, prompt_ids: Tensor, num_beams=3, max_length=20, min_length=5
    ) -> Tensor:
        """Padded ids (B, <= max_length) of the best captions of images (B, 3, S, S).

        They begin with the prompt (B, P), [DEC] first, which both lengths count; a caption without
        an end token was cut.
        """
        lengths = num_beams, max_length, min_length
        return self._generate_ids(self.encode_image(image), prompt_ids, *lengths)

    def _generate_ids(self, image_embeds: Tensor, prompt_ids: Tensor, *lengths: int) -> Tensor:
        special = self.tokenizer.sep_token_id, self.tokenizer.pad_token_id
        rule = self.length_normalization
        return generate_ids(self.text_decoder, image_embeds, prompt_ids, *lengths, *special, rule)

    @torch.no_grad()
    def generate(self, image: Tensor, num_beams=3, max_length=20, min_length=5) -> list[str]:
        """Captions of images (B, 3, S, S), without the prompt. Lengths as in `generate_ids`."""
        return self.caption(self.encode_image(image), num_beams, max_length, min_length)

    def caption(self, image_embeds: Tensor, num_beams=3, max_length=20, min_length=5) -> list[str]:
        """The captions of `generate` from image tokens (B, L, D)."""
        prompt_ids = self.tokenize([self.prompt])[0][:, : self.prompt_length]
        prompt_ids = prompt_ids.to(image_embeds.device).expand(len(image_embeds), -1)
        ids = self._generate_ids(image_embeds, prompt_ids, num_beams, max_length, min_length)
        # Joining "man ' s" to "man's" was the default when BLIP's scores were published.
        texts = self.tokenizer.batch_decode(
            ids[:, self.prompt_length :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=True,
        )
        return [text.strip() for text in texts]


build_captioner = Captioner
