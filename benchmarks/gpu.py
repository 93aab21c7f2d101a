r"""What BLIP base costs on a GPU, each part beside the original's way of it, in one process.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --json tiny.json --device cpu --n 48 --layers 2 --memory_gb 1 \
        --vit tiny --image_size 64 --batch_size 2 --steps 1 --images 2

- profile: the IDs of all layers from `n` samples in one capture. The original: the whole model once
  for each layer, all its outputs kept, torch.pdist and full sorts; timed for a few layers, and
  multiplied.
- step: a training step of PLATON's cubic phase in float32 and bfloat16, without the pruner and with
  it, and its mask event. The original: the loop of `benchmarks.train`, float32.
- captions: three beams, images a second with the ViT. The original's way in `benchmarks.generate`:
  each beam and token projects the image's keys and values again.

Memory is the peak of torch's allocator, or of the process on a CPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import generate, id, train
from benchmarks.timing import document, peak_memory, reset_peak, wait
from dimension.budget import plan_capture
from dimension.capture import Capture, trace_stages
from dimension.profile import Estimation
from engine.processes import computes_bf16, init_distributed, keep_freed_memory
from models.layers import prunable_layers


def timed(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds and peak bytes of a work that is done once."""
    wait(device)
    reset_peak(device)
    start = time.perf_counter()
    work()
    wait(device)
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory(device)}


def profile(args: argparse.Namespace) -> dict[str, dict]:
    """IDs of all layers."""
    model, samples = id.random_captioner(args, args.n)
    layers, estimation, whole = prunable_layers(model), Estimation(), id.Whole(model)
    device = torch.device(args.device)
    shapes = trace_stages(model.stages(), layers, samples, device)
    plan = plan_capture(shapes, set(layers), samples, args.n, int(args.memory_gb * 1e9))
    few = dict(list(layers.items())[:: -(-len(layers) // args.layers)])
    named = {**samples.images, **samples.tensors}

    @torch.no_grad()
    def forward() -> None:
        for values in zip(*(x.split(args.batch_size) for x in named.values()), strict=True):
            batch = zip(named, values, strict=True)
            whole(**{name: value.to(device) for name, value in batch})

    def ours() -> None:
        for name, features, matrix in Capture(plan, layers, samples, device, progress=False):
            estimation.measure(name, features, matrix)

    def original() -> None:
        for name, layer in few.items():
            id.straightforward(forward, {name: layer}, samples)

    found = {"ours": timed(ours, device), "original": timed(original, device)}
    found["original"]["seconds"] *= len(layers) / len(few)
    return found


def step(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of ordinary steps and of a mask event, peak bytes."""
    found, device = {}, torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        run, model, batch = train.build_run(args, folder)
        plain = replace(run, flags=argparse.Namespace(**vars(run.flags) | {"final_threshold": 1.0}))
        ways = {"original": (run, train.straightforward)}
        for dtype in ("float32", "bfloat16")[: 1 + computes_bf16(device)]:
            ours = partial(train.ours, bf16=dtype == "bfloat16")
            ways |= {f"ours, {dtype}": (run, ours), f"ours, {dtype}, no pruner": (plain, ours)}
        for name, (of_run, way) in ways.items():
            found[name] = train.measure(way(of_run, model, batch), device, args.steps)
            model.zero_grad()
    return found


def captions(args: argparse.Namespace) -> dict[str, dict]:
    """Captions a second, peak bytes."""
    model, _ = id.random_captioner(args, args.images)
    device = torch.device(args.device)
    image = torch.randn(args.images, 3, args.image_size, args.image_size, device=device)
    prompt = torch.tensor([generate.PROMPT], device=device).expand(args.images, -1)

    @torch.no_grad()
    def work(way) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
            way(model.text_decoder, model.encode_image(image), prompt, 3, 20)

    ways = {"ours": generate.ours, "original": generate.without_image_cache}
    found = {}
    for name, way in ways.items():
        work(way)  # warms up
        found[name] = timed(partial(work, way), device)
    return {n: x | {"captions a second": args.images / x["seconds"]} for n, x in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each way, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--json", type=Path, required=True, help="file of the document")
    add("--device", default="auto", help="default: auto")
    add("--n", type=int, default=2000, help="samples of the profile; default: 2000")
    add("--layers", type=int, default=4, help="layers that the original's way times; default: 4")
    add("--memory_gb", type=float, default=40, help="budget of the profile; default: 40")
    add("--batch_size", type=int, default=20, help="samples of a step and forward; default: 20")
    add("--steps", type=int, default=5, help="ordinary steps that are timed; default: 5")
    add("--images", type=int, default=64, help="images that are captioned; default: 64")
    add("--image_size", type=int, default=384, help="pixels; default: 384")
    add("--vit", default="base", choices=["tiny", "base", "large"], help="default: base")
    args = parser.parse_args(argv)
    device = init_distributed(args.device).device
    args.device = str(device)
    keep_freed_memory(device)
    torch.manual_seed(0)
    results = {}
    for part in (profile, step, captions):
        results[part.__name__] = part(args)
        for way, found in results[part.__name__].items():
            numbers = ", ".join(f"{what} {value:.4g}" for what, value in found.items())
            print(f"{part.__name__:9}{way:28}{numbers}", flush=True)
    settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
    content = document("gpu", device, settings=settings, **results)
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
