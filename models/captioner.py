"""BLIP's captioner: a vision transformer, and a text decoder that cross-attends to its tokens."""

import torch
from torch import nn
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.generation import generate_ids
from models.stages import Stage, text_stages, vision_stages
from models.text import load_tokenizer, text_config, tokenize
from models.vit import VisionEncoder, build_vision_encoder

IGNORED_LABEL = -100


class Captioner(nn.Module):
    """Image captioning (Li et al., BLIP, ICML 2022).

    Parameter names are those of the official checkpoints.
    """

    def __init__(
        self,
        visual_encoder: VisionEncoder,
        text_decoder: BlipTextLMHeadModel,
        tokenizer,
        prompt: str = "a picture of ",
        length_normalization: str = "total",
    ):
        """Puts the parts together; `build_captioner` makes them from a config."""
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.prompt_length = len(tokenizer(prompt).input_ids) - 1  # [SEP] is no part of it
        self.length_normalization = length_normalization

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) to token embeddings (B, L, D)."""
        return self.visual_encoder(image)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both (B, L), of captions that begin with the prompt."""
        device = self.visual_encoder.cls_token.device
        ids, mask = tokenize(self.tokenizer, captions, "[DEC]")
        return ids.to(device), mask.to(device)

    def forward(self, image: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The loss of a batch: label-smoothed cross-entropy of the next token.

        Args:
            image: (B, 3, S, S), normalised.
            captions: B captions that begin with the prompt; its tokens are not predicted.

        Returns:
            Scalar: the mean over all predicted tokens of the batch.
        """
        input_ids, attention_mask = self.tokenize(captions)
        labels = input_ids.masked_fill(input_ids == self.tokenizer.pad_token_id, IGNORED_LABEL)
        labels[:, : self.prompt_length] = IGNORED_LABEL
        return self.loss_from_ids(self.encode_image(image), input_ids, attention_mask, labels)

    def stages(self) -> list[Stage]:
        """The forward pass over "image", "input_ids" and "attention_mask", for profiling."""
        return [
            *vision_stages(self.visual_encoder),
            *text_stages(self.text_decoder.bert, images=("tokens",), causal=True),
        ]

    def loss_terms(self, image: torch.Tensor, captions: list[str]) -> int:
        """Number of predicted tokens, over which the loss of `forward` is a mean."""
        _, mask = tokenize(self.tokenizer, captions, "[DEC]")
        return int(mask.sum()) - self.prompt_length * len(captions)

    def loss_from_ids(self, image_embeds, input_ids, attention_mask, labels) -> torch.Tensor:
        """The loss of token ids (B, L) given image embeddings (B, L_img, D)."""
        return self.text_decoder(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            labels=labels,
        ).loss

    @torch.no_grad()
    def generate_ids(
        self,
        image: torch.Tensor,
        prompt_ids: torch.Tensor,
        num_beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
    ) -> torch.Tensor:
        """Token ids of the best caption of each image.

        Args:
            image: (B, 3, S, S), normalised.
            prompt_ids: (B, P), the same for all images, [DEC] first.
            num_beams: 1 is greedy.
            max_length: in tokens, prompt included.
            min_length: in tokens, prompt included; no end token before.

        Returns:
            (B, <= max_length) ids with prompt and end token, padded with the pad id.
        """
        return generate_ids(
            self.text_decoder,
            self.encode_image(image),
            prompt_ids,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            eos_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            length_normalization=self.length_normalization,
        )

    @torch.no_grad()
    def generate(
        self, image: torch.Tensor, num_beams: int = 3, max_length: int = 20, min_length: int = 5
    ) -> list[str]:
        """Captions of images (B, 3, S, S), without the prompt. Lengths as in `generate_ids`."""
        prompt_ids = self.tokenize([self.prompt])[0][:, : self.prompt_length]
        prompt_ids = prompt_ids.expand(len(image), -1)
        ids = self.generate_ids(image, prompt_ids, num_beams, max_length, min_length)
        ids = ids[:, self.prompt_length :]
        # Joining "man ' s" to "man's" was the default when BLIP's scores were published.
        texts = self.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        return [text.strip() for text in texts]


def build_captioner(config: dict) -> Captioner:
    """Builds a captioner with random weights.

    Args:
        config: `vit`, `image_size`, `med_config`, `tokenizer`; `prompt`, `length_normalization`,
            `vit_grad_ckpt` and `vit_ckpt_layer` if they are not the defaults.
    """
    tokenizer = load_tokenizer(config["tokenizer"])
    visual_encoder = build_vision_encoder(config)
    text = text_config(config["med_config"], visual_encoder.embed_dim, tokenizer)
    options = {key: config[key] for key in ("prompt", "length_normalization") if key in config}
    return Captioner(visual_encoder, BlipTextLMHeadModel(text), tokenizer, **options)
