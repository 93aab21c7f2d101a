"""Times the measurement of IDs against the straightforward method; models and inputs are random.

python -m benchmarks.id                            # two minutes on two cores
python -m benchmarks.id distances blocks --n 2000
python -m benchmarks.id capture --n 96 --memory_gb 6 --device cuda
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import print_document, seconds
from dimension import measure
from dimension.budget import plan_capture
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.profile import Estimation, block_permutations
from dimension.twonn import FEWEST_POINTS, block_analysis, draw_permutations, pairwise_distances
from engine.processes import keep_freed_memory
from models.captioner import build_captioner
from models.layers import prunable_layers, sees_image

CAPTION_LENGTHS = (9, 16)  # tokens, prompt included


def distances(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for the distances of one layer, torch.pdist, and half a matrix product."""
    n, width = args.n or 2000, args.features
    points = torch.randn(n, width, device=args.device)
    wide = points[:, :4096].contiguous()
    works = {"ours": lambda: pairwise_distances(points), "product": lambda: torch.mm(wide, wide.T)}
    times = seconds(works, 5, args.device)
    rate = n * n * 4096 / times.pop("product")
    times |= seconds({"torch.pdist": lambda: torch.pdist(points)}, 1, args.device)
    return times | {"bound: half a matrix product": n * (n + 1) / 2 * width / rate}


def sorted_blocks(distances: Tensor, permutations: Tensor) -> Tensor:
    """Mean dimensions by sorting every row of every block, like the original code."""
    means = []
    for b, permutation in enumerate(permutations, 1):
        size = len(permutation) // b
        if size < FEWEST_POINTS:
            break
        slopes = []
        for block in permutation[: b * size].view(b, size):
            nearest = distances[block][:, block].sort(dim=1).values
            r1, r2 = nearest[:, 1], nearest[:, 2]
            usable = (r1 > 0) & (r2 > r1)
            x = (r2[usable] / r1[usable]).sort().values.log()
            rank = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
            y = -torch.log1p(-rank / len(x))
            slopes.append((x[:-2] @ y[:-2]) / (x[:-2] @ x[:-2]))
        means.append(torch.stack(slopes).mean())
    return torch.stack(means)


def blocks(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for the block analysis of one layer, and for sorting every row of every block."""
    n = args.n or 2000
    matrix = pairwise_distances(torch.randn(n, 100, device=args.device))
    permutations = draw_permutations(n, torch.Generator().manual_seed(0)).to(args.device)
    expected = sorted_blocks(matrix, permutations).cpu()
    found = block_analysis(matrix, permutations=permutations).mean[: len(expected)]
    works = {
        "ours": lambda: block_analysis(matrix, permutations=permutations),
        "full sorts": lambda: sorted_blocks(matrix, permutations),
    }
    apart = (expected / found - 1).abs().max().item()
    return seconds(works, 3, args.device) | {"largest relative difference of a mean": apart}


class Whole(nn.Module):
    """A captioner as a model like any other, without its vocabulary head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual_encoder, self.text_decoder = model.visual_encoder, model.text_decoder

    def forward(self, image: Tensor, **texts: Tensor) -> None:
        """Runs all layers that have a profile."""
        embeds = self.visual_encoder(image)
        self.text_decoder.bert(**texts, encoder_hidden_states=embeds, is_decoder=True)


def random_captioner(args: argparse.Namespace, n: int) -> tuple[nn.Module, Samples]:
    """A captioner with random weights, random images, and captions of random tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(words) + "\n")
        sizes = {"vit": args.vit, "image_size": args.image_size, "med_config": {}}
        model = build_captioner(sizes | {"tokenizer": folder}).to(args.device).eval()
    lengths = torch.randint(*CAPTION_LENGTHS, (n, 1))
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    tensors = {"input_ids": torch.randint(5, 30_000, mask.shape) * mask, "attention_mask": mask}
    images = {"image": torch.randn(n, 3, args.image_size, args.image_size)}
    return model, Samples(tensors, images, counted_positions(mask, 1, False), args.batch_size)


def straightforward(
    forward: Callable, layers: dict[str, nn.Module], samples: Samples
) -> dict[str, float]:
    """IDs from hooks that keep all activations, torch.pdist and full sorts."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda m, args, output, name=name: kept[name].append(output))
        for name, layer in layers.items()
    ]
    forward()
    for hook in hooks:
        hook.remove()
    n, ids = len(samples), {}
    for name in layers:
        points = torch.cat(kept.pop(name))
        if not sees_image(name):
            points = points * samples.text[..., None].to(points.device)
        above = torch.triu_indices(n, n, 1, device=points.device)
        matrix = torch.zeros(n, n, dtype=torch.float64, device=points.device)
        matrix[above[0], above[1]] = torch.pdist(points.flatten(1)).double()
        means = sorted_blocks(matrix + matrix.T, block_permutations(n, 0).to(points.device))
        ids[name] = means[: max(1, min(20, n // 20))].mean().item()
    return ids


def capture(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for the IDs of all layers: by stages, `measure`, and keeping all activations."""
    n, device = args.n or 24, torch.device(args.device)
    keep_freed_memory(device)  # as ComputeID.py does
    model, samples = random_captioner(args, n)
    layers, whole, estimation = prunable_layers(model), Whole(model), Estimation()
    shapes = trace_stages(model.stages(), layers, samples, device)
    plan = plan_capture(shapes, set(layers), samples, n, int(args.memory_gb * 1e9))
    print(plan)
    named = {**samples.images, **samples.tensors}
    columns = zip(*(values.split(args.batch_size) for values in named.values()), strict=True)
    batches = [dict(zip(named, values, strict=True)) for values in columns]
    found: dict[str, dict[str, float]] = {"stages": {}, "measure": {}}

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            whole(**{name: values.to(device) for name, values in batch.items()})

    def stages() -> None:
        for name, features, matrix in Capture(plan, layers, samples, device, progress=False):
            found["stages"][name] = estimation.measure(name, features, matrix).id

    def general() -> None:
        profile = measure(whole, batches, list(layers), args.memory_gb)
        found["measure"] = {name: layer.id for name, layer in profile.layers.items()}

    expected = {}
    works = {
        "plain forward": forward,
        "stages": stages,
        "measure": general,
        "straightforward": lambda: expected.update(straightforward(forward, layers, samples)),
    }
    times = seconds(works, 1, device)
    for name, ids in found.items():
        apart = max(abs(value / expected[layer] - 1) for layer, value in ids.items())
        times[f"{name}: largest relative difference from a straightforward ID"] = apart
    return times


PARTS = {part.__name__: part for part in (distances, blocks, capture)}


def main(args: argparse.Namespace) -> None:
    """Runs the parts that are asked for, and prints the document."""
    torch.manual_seed(0)
    results = {}
    for part in args.parts or PARTS:
        results[part] = PARTS[part](args)
        for name, value in results[part].items():
            print(f"{part}: {name:80}{value:12.4g}", flush=True)
    print_document("id", args.device, **results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to run (all)")
    parser.add_argument("--n", type=int, help="samples (2000; 24 for capture)")
    parser.add_argument("--features", type=int, default=28416, help="width of a layer (28416)")
    parser.add_argument("--memory_gb", type=float, default=12, help="budget in GB (12)")
    parser.add_argument("--vit", default="base", choices=["tiny", "base", "large"])
    parser.add_argument("--image_size", type=int, default=384, help="pixels (384)")
    parser.add_argument("--batch_size", type=int, default=4, help="samples in a forward (4)")
    parser.add_argument("--device", default="cpu", help="device (cpu)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
