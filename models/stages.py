"""A model as a chain of stages, each a residual branch: what profiling runs in place of `forward`.

A stage reads and writes named states of all samples, so a chain can be stopped between two stages
and any stage can be repeated.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vit import VisionEncoder


class Stage(NamedTuple):
    """state[writes] = run(*(state[name] for name in reads)).

    Attributes:
        name: for the printed plan.
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
    """The stages of `encoder(image)`.

    Args:
        encoder: in eval mode.
        image: name of the input, (B, 3, S, S).
        tokens: name of the state, (B, L, D), in the end the image embeddings.
    """
    yield Stage(f"{tokens}: patch embedding", encoder.embed, (image,), tokens)
    for index, block in enumerate(encoder.blocks):
        for name, branch in (("attention", _vision_attention), ("mlp", _vision_mlp)):
            yield Stage(f"{tokens}: block {index}, {name}", branch(block), (tokens,), tokens)
    yield Stage(f"{tokens}: norm", encoder.norm, (tokens,), tokens)


def _vision_attention(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def _vision_mlp(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def text_stages(text: nn.Module, images: tuple[str, ...], causal: bool) -> Iterator[Stage]:
    """The stages of BLIP's text transformer, whose layers attend to text, then to images.

    They read the inputs "input_ids" and "attention_mask", both (B, L), and write "text" (B, L, D).

    Args:
        text: a `BlipTextModel` in eval mode.
        images: names of the states with image embeddings; several if its cross-attention takes a
            tuple of them.
        causal: whether a token sees only those before it (a decoder).
    """
    yield Stage("text: embedding", text.embeddings, ("input_ids",), "text")
    for index, layer in enumerate(text.encoder.layer):
        branches = (
            ("attention", _self_attention(layer, causal), ("attention_mask",)),
            ("cross-attention", _cross_attention(layer), images),
            ("mlp", layer.feed_forward_chunk, ()),
        )
        for name, branch, others in branches:
            yield Stage(f"text: layer {index}, {name}", branch, ("text", *others), "text")


def _self_attention(layer: nn.Module, causal: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def run(text: Tensor, attention_mask: Tensor) -> Tensor:
        visible = attention_mask[:, None, None].bool()  # (B, 1, 1, L)
        if causal:
            visible = visible & text.new_ones(1, 1, *[text.shape[1]] * 2, dtype=torch.bool).tril()
        hidden = torch.zeros_like(visible, dtype=text.dtype)
        hidden.masked_fill_(~visible, torch.finfo(text.dtype).min)
        return layer.attention(text, attention_mask=hidden)[0]

    return run


def _cross_attention(layer: nn.Module) -> Callable[..., Tensor]:
    def run(text: Tensor, *images: Tensor) -> Tensor:
        seen = images if len(images) > 1 else images[0]
        return layer.crossattention(text, encoder_hidden_states=seen)[0]

    return run


def resblock_stages(
    transformer: nn.Module, state: str, mask: Tensor | None = None
) -> Iterator[Stage]:
    """The stages of one of open_clip's transformers.

    Args:
        transformer: in eval mode.
        state: name of what it reads and replaces, (B, L, D).
        mask: (L, L), added to the attention's logits; None lets every token see all others.
    """
    for index, block in enumerate(transformer.resblocks):
        for name, branch in (("attention", _mixed(block, mask)), ("mlp", _transformed(block))):
            yield Stage(f"{state}: block {index}, {name}", branch, (state,), state)


def _mixed(block: nn.Module, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """As torch's own attention, but `out_proj` is called as a layer, so that hooks see it."""
    attention = block.attn

    def run(x: Tensor) -> Tensor:
        joint = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        heads = joint.unflatten(-1, (3, attention.num_heads, -1))  # (B, L, 3, H, D / H)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + attention.out_proj(context.transpose(1, 2).flatten(2))

    return run


def _transformed(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: x + block.mlp(block.ln_2(x))
