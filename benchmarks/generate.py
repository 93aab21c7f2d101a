"""Captioning with BLIP base, against two straightforward ways to do it, in one process.

    python -m benchmarks.generate
    python -m benchmarks.generate --batch 20 --device cuda       # bfloat16

The library's generation gives every beam a copy of the image's keys and values; the original code
projected them again for every beam and token. All decode to the full length (the end token is
forbidden) and must give the same captions. The bound is the sum of parts that cannot be avoided:
the ViT, one projection of keys and values, and for each token one reading of the decoder's weights
at memory bandwidth. On two cores it takes about a minute and a half.
"""

import argparse
import time
from collections.abc import Callable

import compat  # noqa: F401  (before transformers)

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from models.generation import BeamSearch, CachedDecoder, generate_ids
from models.vit import build_vision_encoder

PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
SPECIAL = dict(eos_id=102, pad_id=0)


def seconds(work: Callable, device: torch.device, repeat: int) -> float:
    """Shortest of several runs, after one that warms up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def library(decoder, image_embeds, prompt_ids, beams: int, max_length: int) -> torch.Tensor:
    """Beam search by transformers; with no end token its rule chooses as the published one."""
    return decoder.generate(
        input_ids=prompt_ids,
        encoder_hidden_states=image_embeds,
        num_beams=beams,
        max_length=max_length,
        min_length=max_length,
        eos_token_id=SPECIAL["eos_id"],
        pad_token_id=SPECIAL["pad_id"],
    )


@torch.no_grad()
def without_image_cache(decoder, image_embeds, prompt_ids, beams: int, max_length: int):
    """Our search over the library's forward pass, whose image cache is forgotten at each token."""
    search = BeamSearch(prompt_ids, beams, max_length, **SPECIAL, length_normalization="total")
    batch, length = prompt_ids.shape
    first = torch.arange(batch, device=prompt_ids.device)[:, None] * beams
    image_embeds = image_embeds.repeat_interleave(beams, 0)
    ids = prompt_ids.repeat_interleave(beams, 0)
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    while True:
        logits = decoder(
            ids, encoder_hidden_states=image_embeds, past_key_values=past, use_cache=True
        ).logits[:, -1]
        log_probs = logits.float().log_softmax(-1).view(batch, beams, -1)
        log_probs[..., SPECIAL["eos_id"]] = -torch.inf
        if ids.shape[1] > 1:
            log_probs = log_probs[:, :1]  # the prompt's beams are all the same
        parent, token = search.advance(log_probs, length)
        length += 1
        if length == max_length:
            return search.best_captions()
        past.self_attention_cache.reorder_cache((first + parent).flatten())
        past = EncoderDecoderCache(past.self_attention_cache, DynamicCache())
        ids = token.view(-1, 1)


def weight_bytes(decoder: nn.Module, size: int) -> int:
    """Bytes of the linear layers that a new token passes, at `size` bytes a number."""
    image_side = ("crossattention.self.key", "crossattention.self.value")
    return size * sum(
        module.weight.numel()
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(image_side)
    )


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    vit = build_vision_encoder({"vit": "base", "image_size": 384}).eval().to(device)
    config = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=vit.embed_dim)
    decoder = BlipTextLMHeadModel(config).eval().to(device)
    image = torch.randn(args.batch, 3, 384, 384, device=device)
    prompt_ids = torch.tensor([PROMPT], device=device).expand(args.batch, -1)
    new_tokens = args.max_length - len(PROMPT)
    read = torch.ones(200_000_000, device=device)  # 0.8 GB, beyond every cache

    def ours(embeds, prompt_ids, beams, length):
        return generate_ids(decoder, embeds, prompt_ids, beams, length, length, **SPECIAL)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.device != "cpu"):
        embeds = vit(image)
        size = torch.mm(read[:1, None], read[:1, None]).element_size()  # of what autocast chose
        parts = {
            "ViT": seconds(lambda: vit(image), device, args.repeat),
            "keys and values": seconds(
                lambda: CachedDecoder(decoder, embeds, 1), device, args.repeat
            ),
            "reading weights": new_tokens
            * weight_bytes(decoder, size)
            * seconds(lambda: read.sum(), device, 5)
            / (4 * len(read)),
        }
        captions, times = {}, {}
        for name, decode in (
            ("ours", ours),
            ("library", lambda *inputs: library(decoder, *inputs)),
            ("no image cache", lambda *inputs: without_image_cache(decoder, *inputs)),
        ):
            work = (embeds, prompt_ids, args.beams, args.max_length)
            captions[name] = decode(*work)
            repeat = 1 if name == "no image cache" else args.repeat
            times[name] = parts["ViT"] + seconds(lambda: decode(*work), device, repeat)  # noqa: B023

    bound, total = sum(parts.values()), times["ours"]
    for name, part in parts.items():
        print(f"{name:20s} {part:8.3f} s")
    print(f"{'sum of the parts':20s} {bound:8.3f} s")
    for name, value in times.items():
        same = (captions[name] == captions["ours"]).all(1).sum().item()
        print(
            f"{name:20s} {value:8.3f} s  {value / total:6.2f} x  {same}/{args.batch} captions alike"
        )
    print(
        f"ours / sum of the parts {total / bound:.2f}; share of the ViT {parts['ViT'] / total:.0%}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=20, help="tokens, prompt included")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the shortest counts")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
