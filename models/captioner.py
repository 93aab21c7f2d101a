"""BLIP's captioner: a vision transformer, and a text decoder that cross-attends to its tokens."""

import compat  # noqa: F401

import torch
from torch import nn
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.generation import LENGTH_NORMALIZATIONS, generate_ids
from models.stages import Stage, text_stages, vision_stages
from models.text import MAX_TOKENS, check_max_tokens, load_tokenizer, text_config, tokenize
from models.vit import VisionEncoder, build_vision_encoder
from utils import UserError

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
        max_tokens: int = MAX_TOKENS,
    ):
        """Puts the parts together; `build_captioner` makes them from a config."""
        super().__init__()
        if length_normalization not in LENGTH_NORMALIZATIONS:
            raise UserError(
                f"length_normalization: {length_normalization!r} is none of "
                f"{', '.join(LENGTH_NORMALIZATIONS)}"
            )
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.prompt_length = len(tokenizer(prompt).input_ids) - 1  # [SEP] is no part of it
        self.length_normalization = length_normalization
        self.max_tokens = max_tokens

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) to token embeddings (B, L, D)."""
        return self.visual_encoder(image)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both (B, L), of captions that begin with the prompt."""
        return tokenize(self.tokenizer, captions, "[DEC]", max_tokens=self.max_tokens)

    def prepare(
        self, image: torch.Tensor, captions: list[str]
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        """Tokenizes a batch once, for `loss` and for the weight of its loss.

        Args:
            image: (B, 3, S, S), normalised; handed on.
            captions: B captions that begin with the prompt; its tokens are not predicted.

        Returns:
            The tensors of `loss` (the new ones on the CPU), and the number of predicted tokens,
            over which that loss is a mean.
        """
        input_ids, attention_mask = self.tokenize(captions)
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        labels[:, : self.prompt_length] = IGNORED_LABEL
        terms = int((labels != IGNORED_LABEL).sum())
        return (image, input_ids, attention_mask, labels), terms

    def forward(self, *inputs) -> torch.Tensor:
        """The loss of a batch: label-smoothed cross-entropy of the next token.

        Args:
            *inputs: `image, captions` as `prepare` takes them; or the tensors that it returns, on
                the model's device. Data parallelism reaches the loss through this method alone.

        Returns:
            Scalar: the mean over all predicted tokens of the batch.
        """
        if len(inputs) == 2:
            inputs, _ = self.prepare(*inputs)
        image, *text = inputs
        return self.loss(image, *(tensor.to(image.device) for tensor in text))

    def loss(
        self,
        image: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of `forward` from tensors.

        Args:
            image: (B, 3, S, S), normalised.
            input_ids: (B, L), [DEC] first.
            attention_mask: (B, L), 0 at padding.
            labels: (B, L) ids, or IGNORED_LABEL where the token is not predicted.
        """
        return self.text_loss(self.encode_image(image), input_ids, attention_mask, labels)

    def text_loss(
        self,
        image_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of `loss` from image tokens (B, L, D)."""
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
        lengths = dict(num_beams=num_beams, max_length=max_length, min_length=min_length)
        return self._generate_ids(self.encode_image(image), prompt_ids, **lengths)

    def _generate_ids(
        self, image_embeds: torch.Tensor, prompt_ids: torch.Tensor, **lengths: int
    ) -> torch.Tensor:
        return generate_ids(
            self.text_decoder,
            image_embeds,
            prompt_ids,
            **lengths,
            eos_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            length_normalization=self.length_normalization,
        )

    @torch.no_grad()
    def generate(
        self, image: torch.Tensor, num_beams: int = 3, max_length: int = 20, min_length: int = 5
    ) -> list[str]:
        """Captions of images (B, 3, S, S), without the prompt. Lengths as in `generate_ids`."""
        lengths = dict(num_beams=num_beams, max_length=max_length, min_length=min_length)
        return self.caption(self.encode_image(image), **lengths)

    @torch.no_grad()
    def caption(self, image_embeds: torch.Tensor, **lengths: int) -> list[str]:
        """The captions of `generate` from image tokens (B, L, D)."""
        prompt_ids = self.tokenize([self.prompt])[0][:, : self.prompt_length]
        prompt_ids = prompt_ids.to(image_embeds.device).expand(len(image_embeds), -1)
        ids = self._generate_ids(image_embeds, prompt_ids, **lengths)
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
            `max_tokens`, `vit_grad_ckpt` and `vit_ckpt_layer` if they are not the defaults.

    Raises:
        UserError: a value that is none of the possible ones, or a tokenizer that cannot be read.
    """
    tokenizer = load_tokenizer(config["tokenizer"])
    visual_encoder = build_vision_encoder(config)
    text = text_config(config["med_config"], visual_encoder.embed_dim, tokenizer)
    chosen = ("prompt", "length_normalization", "max_tokens")
    options = {key: config[key] for key in chosen if key in config}
    model = Captioner(visual_encoder, BlipTextLMHeadModel(text), tokenizer, **options)
    check_lengths(config, model.prompt_length)
    check_max_tokens(model.max_tokens, model.prompt_length + 2, text.max_position_embeddings)
    return model


def check_lengths(config: dict, prompt_length: int) -> None:
    """Checks that a caption has room after the prompt.

    Raises:
        UserError: min_length or max_length of the config leave none.
    """
    for key in ("min_length", "max_length"):
        if key in config and config[key] <= prompt_length:
            raise UserError(
                f"{key} {config[key]} must be above the length of the prompt, which it counts: "
                f"{prompt_length} tokens"
            )
