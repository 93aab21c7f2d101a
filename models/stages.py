"""A model as a chain of stages, each a residual branch: what profiling runs in place of `forward`.

A stage reads and writes named states of all samples, so that it can be repeated.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vit import VisionEncoder

Parts = tuple[Callable[[Tensor], Tensor], ...]  # of a branch, in their order


class Stage(NamedTuple):
    """state[writes] = run(*(state[name] for name in reads)).

    Attributes:
        name: name in the printed plan.
        run: from the states of one batch (B, ...) to the new state of the batch (B, ...).
        reads: names of states; those that no stage writes are the model's inputs.
        writes: name of a state; one of `reads` is replaced.
    """

    name: str
    run: Callable[..., Tensor]
    reads: tuple[str, ...]
    writes: str


def vision_stages(
    encoder: VisionEncoder, image: str = "image", tokens: str = "tokens"
) -> Iterator[Stage]:
    """The stages from an image (B, 3, S, S) to its tokens (B, L, D), in eval mode."""
    yield Stage(f"{tokens}: patch embedding", encoder.embed, (image,), tokens)
    for index, block in enumerate(encoder.blocks):
        attention, mlp = (block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)
        yield from _block_stages(index, tokens, attention, mlp)
    yield Stage(f"{tokens}: norm", encoder.norm, (tokens,), tokens)


def _block_stages(index: int, state: str, attention: Parts, mlp: Parts) -> Iterator[Stage]:
    for name, parts in (("attention", attention), ("mlp", mlp)):
        yield Stage(f"{state}: block {index}, {name}", partial(_residual, parts), (state,), state)


def _residual(parts: Parts, x: Tensor) -> Tensor:
    return x + reduce(lambda branch, part: part(branch), parts, x)


def text_stages(text: nn.Module, images: tuple[str, ...], causal: bool) -> Iterator[Stage]:
    """The stages of a `BlipTextModel` in eval mode, whose layers attend to text, then to images.

    They read the inputs "input_ids" and "attention_mask", both (B, L), and the states `images`, of
    which a twin cross-attention takes several; they write "text" (B, L, D). In a `causal` text a
    token sees only the tokens before it.
    """
    yield Stage("text: embedding", text.embeddings, ("input_ids",), "text")
    for index, layer in enumerate(text.encoder.layer):
        for name, branch, others in (
            ("attention", partial(_self_attention, layer, causal), ("attention_mask",)),
            ("cross-attention", partial(_cross_attention, layer), images),
            ("mlp", layer.feed_forward_chunk, ()),
        ):
            yield Stage(f"text: layer {index}, {name}", branch, ("text", *others), "text")


def _self_attention(layer: nn.Module, causal: bool, text: Tensor, mask: Tensor) -> Tensor:
    visible = mask[:, None, None].bool()  # (B, 1, 1, L)
    if causal:
        visible = visible & text.new_ones(1, 1, *[text.shape[1]] * 2, dtype=torch.bool).tril()
    hidden = torch.zeros_like(visible, dtype=text.dtype)
    hidden.masked_fill_(~visible, torch.finfo(text.dtype).min)
    return layer.attention(text, attention_mask=hidden)[0]


def _cross_attention(layer: nn.Module, text: Tensor, *images: Tensor) -> Tensor:
    seen = images if len(images) > 1 else images[0]
    return layer.crossattention(text, encoder_hidden_states=seen)[0]


def resblock_stages(blocks: nn.Module, state: str, mask: Tensor | None = None) -> Iterator[Stage]:
    """The stages of open_clip's blocks in eval mode, which replace `state` (B, L, D).

    `mask` (L, L) is added to the attention's logits; None lets every token see all others.
    """
    for index, block in enumerate(blocks):
        attention = block.ln_1, partial(_attention, block.attn, mask)
        yield from _block_stages(index, state, attention, (block.ln_2, block.mlp))


def _attention(attention: nn.MultiheadAttention, mask: Tensor | None, x: Tensor) -> Tensor:
    """As torch's own attention, but `out_proj` is called as a layer, so that hooks see it."""
    joint = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = joint.unflatten(-1, (3, attention.num_heads, -1))  # (B, L, 3, H, D / H)
    query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(context.transpose(1, 2).flatten(2))
