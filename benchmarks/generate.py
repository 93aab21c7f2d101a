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

import compat  # noqa: F401  (before transformers)

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from benchmarks.timing import print_document, seconds
from models.generation import BeamSearch, CachedDecoder, generate_ids
from models.vit import build_vision_encoder

PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
SPECIAL = dict(eos_id=102, pad_id=0)


def ours(decoder, image_embeds, prompt_ids, beams: int, length: int) -> torch.Tensor:
    """This project's beam search."""
    return generate_ids(decoder, image_embeds, prompt_ids, beams, length, length, **SPECIAL)


def library(decoder, image_embeds, prompt_ids, beams: int, length: int) -> torch.Tensor:
    """Beam search by transformers; with no end token its rule chooses as the published one."""
    return decoder.generate(
        input_ids=prompt_ids,
        encoder_hidden_states=image_embeds,
        num_beams=beams,
        max_length=length,
        min_length=length,
        eos_token_id=SPECIAL["eos_id"],
        pad_token_id=SPECIAL["pad_id"],
    )


def without_image_cache(decoder, image_embeds, prompt_ids, beams: int, length: int):
    """Our search over the library's forward pass, whose image cache is forgotten at each token."""
    search = BeamSearch(prompt_ids, beams, length, **SPECIAL, rule="total")
    batch = len(prompt_ids)
    first = torch.arange(batch, device=prompt_ids.device)[:, None] * beams
    image_embeds = image_embeds.repeat_interleave(beams, 0)
    ids = prompt_ids.repeat_interleave(beams, 0)
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for taken in range(prompt_ids.shape[1], length):
        logits = decoder(
            ids, encoder_hidden_states=image_embeds, past_key_values=past, use_cache=True
        ).logits[:, -1]
        log_probs = logits.float().log_softmax(-1).view(batch, beams, -1)
        log_probs[..., SPECIAL["eos_id"]] = -torch.inf
        if ids.shape[1] > 1:
            log_probs = log_probs[:, :1]  # the prompt's beams are all the same
        parent, token = search.advance(log_probs, taken)
        past.self_attention_cache.reorder_cache((first + parent).flatten())
        past = EncoderDecoderCache(past.self_attention_cache, DynamicCache())
        ids = token.view(-1, 1)
    return search.best_captions()


def weight_bytes(decoder: nn.Module, size: int) -> int:
    """Bytes of the linear layers that a new token passes, at `size` bytes a number."""
    image_side = ("crossattention.self.key", "crossattention.self.value")
    return size * sum(
        module.weight.numel()
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(image_side)
    )


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each part and each way, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="images; default: 4")
    parser.add_argument("--beams", type=int, default=3, help="default: 3")
    parser.add_argument("--max_length", type=int, default=20, help="tokens, with the prompt's")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; default: 3")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device(args.device)
    vit = build_vision_encoder({"vit": "base", "image_size": 384}).eval().to(device)
    config = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=vit.embed_dim)
    decoder = BlipTextLMHeadModel(config).eval().to(device)
    image = torch.randn(args.batch, 3, 384, 384, device=device)
    prompt_ids = torch.tensor([PROMPT], device=device).expand(args.batch, -1)
    read = torch.ones(200_000_000, device=device)  # 0.8 GB, beyond every cache
    ways = {"ours": ours, "library": library, "no image cache": without_image_cache}

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.device != "cpu"):
        work = (decoder, vit(image), prompt_ids, args.beams, args.max_length)
        captions = {name: way(*work) for name, way in ways.items()}
        size = torch.mm(read[:1, None], read[:1, None]).element_size()  # of what autocast chose
        parts = {
            "ViT": lambda: vit(image),
            "keys and values": lambda: CachedDecoder(decoder, work[1], 1),
            "reading": read.sum,
        }
        parts = seconds(parts, args.rounds, device)
        again = (args.max_length - len(PROMPT)) * weight_bytes(decoder, size) / (4 * len(read))
        parts["reading weights"] = again * parts.pop("reading")
        decoding = {name: lambda way=way: way(*work) for name, way in ways.items()}
        times = seconds(decoding, args.rounds, device)

    times = {name: parts["ViT"] + value for name, value in times.items()}
    same = {name: int((c == captions["ours"]).all(1).sum()) for name, c in captions.items()}
    for name, value in {**parts, "sum of the parts": sum(parts.values())}.items():
        print(f"{name:20s} {value:8.3f} s")
    for name, value in times.items():
        ratio = value / times["ours"]
        print(
            f"{name:20s} {value:8.3f} s  {ratio:6.2f} x  {same[name]}/{args.batch} captions alike"
        )
    print_document("generate", device, seconds=times, parts=parts, captions_alike=same)


if __name__ == "__main__":
    main()
