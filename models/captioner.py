"""BLIP's captioner: a vision transformer, and a text decoder that cross-attends to its tokens."""

import compat  # noqa: F401

import torch
from torch import Tensor
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.blip import Blip
from models.generation import generate_ids
from models.stages import Stage, text_stages, vision_stages
from utils import UserError

IGNORED_LABEL = -100
MAX_TOKENS = 40


class Captioner(Blip):
    """BLIP's image captioning: texts are captions that begin with a prompt."""

    def __init__(self, config: dict):
        """As `Blip`; the config may have `prompt` and `length_normalization`, too."""
        super().__init__(config, "[DEC]", MAX_TOKENS, config.get("prompt", "a picture of "))
        self.text_decoder = BlipTextLMHeadModel(self.text_config)
        for key in ("min_length", "max_length"):
            if key in config and config[key] <= self.prompt_length:
                raise UserError(
                    f"{key} {config[key]} must be above the length of the prompt, which it counts: "
                    f"{self.prompt_length} tokens"
                )
        self.length_normalization = config.get("length_normalization", "total")

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) to token embeddings (B, L, D)."""
        return self.visual_encoder(image)

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
        inputs = {"attention_mask": attention_mask, "encoder_hidden_states": image_embeds}
        return self.text_decoder(input_ids, **inputs, labels=labels).loss

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
        return self._search(self.encode_image(image), prompt_ids, num_beams, max_length, min_length)

    def _search(self, image_embeds: Tensor, prompt_ids: Tensor, *lengths: int) -> Tensor:
        special = self.tokenizer.sep_token_id, self.tokenizer.pad_token_id
        rule = self.length_normalization
        return generate_ids(self.text_decoder, image_embeds, prompt_ids, *lengths, *special, rule)

    @torch.no_grad()
    def generate(self, image: Tensor, num_beams=3, max_length=20, min_length=5) -> list[str]:
        """Captions of images (B, 3, S, S), without the prompt. Lengths as in `generate_ids`."""
        return self.caption(self.encode_image(image), num_beams, max_length, min_length)

    def caption(
        self, image_embeds: Tensor, num_beams: int, max_length: int, min_length: int
    ) -> list[str]:
        """The captions of `generate` from image tokens (B, L, D)."""
        prompt_ids = self.tokenize([self.prompt])[0][:, : self.prompt_length]
        prompt_ids = prompt_ids.to(image_embeds.device).expand(len(image_embeds), -1)
        ids = self._search(image_embeds, prompt_ids, num_beams, max_length, min_length)
        # Joining "man ' s" to "man's" was the default when BLIP's scores were published.
        rule = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
        texts = self.tokenizer.batch_decode(ids[:, self.prompt_length :], **rule)
        return [text.strip() for text in texts]


build_captioner = Captioner
