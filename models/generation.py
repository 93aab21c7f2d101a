"""Beam search over a BLIP text decoder, with the semantics that the published captions have."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate_ids(
    decoder: nn.Module,
    image_embeds: Tensor,
    prompt_ids: Tensor,
    num_beams: int,
    max_length: int,
    min_length: int,
    eos_id: int,
    pad_id: int,
    length_normalization: str = "total",
) -> Tensor:
    """Captions a batch of images by beam search.

    Args:
        decoder: transformers' `BlipTextLMHeadModel`, in eval mode.
        image_embeds: (B, L, D) image tokens.
        prompt_ids: (B, P) first tokens of every caption.
        num_beams: hypotheses kept for each image; 1 is greedy decoding.
        max_length: longest caption in tokens, prompt included.
        min_length: the end token is impossible before this length in tokens, prompt included.
        eos_id: end token.
        pad_id: fills the rows of captions that end early.
        length_normalization: "total" or "generated".

    Returns:
        (B, <= max_length) token ids.
    """
    raise NotImplementedError
