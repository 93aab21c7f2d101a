"""Times the ID engine against the straightforward method, other packages and the bound.

    python -m benchmarks.id                            # all parts, two minutes on two cores
    python -m benchmarks.id distances --n 2000 --features 28416
    python -m benchmarks.id blocks --n 2000
    python -m benchmarks.id capture --n 96 --memory_gb 6
    python -m benchmarks.id general --n 12
    python -m benchmarks.id straightforward --n 12 --disk /tmp/activations
    python -m benchmarks.id plan --n 2000 --memory_gb 12

Models have random weights, images and captions are random: no data is needed. scikit-dimension and
DADApy take part where they are installed. Add --device cuda for a GPU.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dimension.any_model import measure
from dimension.budget import plan_capture
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.profile import block_permutations, measure_layer
from dimension.twonn import (
    FEWEST_POINTS,
    PRODUCT_FEATURES,
    add_products_,
    block_analysis,
    draw_permutations,
    estimate_id,
    pairwise_distances,
    strips,
)
from engine.processes import keep_freed_memory
from models.captioner import build_captioner
from models.layers import prunable_layers, sees_image
from utils import write_json

CAPTION_LENGTHS = (9, 16)  # tokens, prompt included


def seconds(run: Callable, repeats: int = 1) -> float:
    """The least time of some runs, after all that a GPU had to do."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def report(name: str, value: float, reference: float | None = None) -> None:
    """Prints a time, and how many times faster than it the reference time is."""
    ratio = "" if reference is None else f"   {value / reference:6.2f} x ours"
    print(f"  {name:44}{value:9.3f} s{ratio}", flush=True)


def gemm_rate(device: str) -> float:
    """Float32 multiply-adds a second, twice, of a large product."""
    a = torch.randn(2000, 4096, device=device)
    out = torch.empty(2000, 2000, device=device)
    torch.mm(a, a.T, out=out)
    return 2 * 2000 * 2000 * 4096 / seconds(lambda: torch.mm(a, a.T, out=out), 5)


def distances(args: argparse.Namespace) -> None:
    """All distances of one layer: ours, torch.pdist, the bound, and whole TwoNN of others."""
    n, width = args.n or 2000, args.features
    print(f"distances, n {n} x D {width}")
    points = torch.randn(n, width, device=args.device)
    pairwise_distances(points)  # warm-up
    gram = torch.zeros(n, n, dtype=torch.float64, device=args.device)
    before = gemm_rate(args.device)
    ours = seconds(lambda: pairwise_distances(points), 5)
    sums = seconds(lambda: add_products_(gram, points), 5)
    products = seconds(lambda: products_alone(gram, points), 5)
    rate = (before + gemm_rate(args.device)) / 2
    half = n * (n + 1) * width / rate  # seconds
    steps = {"ours": ours, "ours, products and sums": sums, "ours, products": products}
    for name, found in steps.items():
        report(name, found)
        print(f"  {'  useful rate / GEMM rate':54}{half / found:6.3f}")
    print(f"  {'GEMM rate':44}{rate / 1e9:9.0f}   GF/s")
    report("bound: half a product at the GEMM rate", half, ours)
    found = []
    report("torch.pdist", seconds(lambda: found.append(torch.pdist(points))), ours)
    above = torch.triu_indices(n, n, 1, device=args.device)
    error = (pairwise_distances(points)[above[0], above[1]] / found[0].double() - 1).abs().max()
    print(f"  largest relative difference from torch.pdist {error:.1e} (its own rounding included)")
    whole = seconds(lambda: estimate_id(pairwise_distances(points)), 3)
    report("ours, whole TwoNN", whole)
    for name, run in other_packages(points.cpu().numpy()).items():
        report(name, seconds(run), whole)


def products_alone(gram: Tensor, chunk: Tensor) -> None:
    """The matrix products of `add_products_`, without adding them up."""
    for down, columns in strips(gram):
        out = torch.empty(gram[down, columns].shape, device=chunk.device)
        for features in chunk.split(PRODUCT_FEATURES, dim=1):
            torch.mm(features[down], features[columns].T, out=out)


def other_packages(points) -> dict[str, Callable]:
    """TwoNN of the packages that are installed, on an array (n, D)."""
    found = {}
    try:
        skdim = importlib.import_module("skdim.id")
        found["scikit-dimension, whole TwoNN"] = lambda: skdim.TwoNN().fit(points)
    except ImportError as error:
        print(f"  scikit-dimension is not installed ({error})")
    try:
        dadapy = importlib.import_module("dadapy")
        found["DADApy, whole TwoNN"] = lambda: dadapy.Data(points).compute_id_2NN()
    except ImportError as error:
        print(f"  DADApy is not installed ({error})")
    return found


def sorted_blocks(distances: Tensor, permutations: Tensor) -> tuple[Tensor, Tensor]:
    """Block analysis by sorting every row of every block, as the original code does.

    Levels whose blocks are too small for a fit are left out, as in `block_analysis`.
    """
    means, stds = [], []
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
        slopes = torch.stack(slopes)
        means.append(slopes.mean())
        stds.append(slopes.std(correction=0))
    return torch.stack(means), torch.stack(stds)


def blocks(args: argparse.Namespace) -> None:
    """Block analysis of one layer: ours against full sorts."""
    n = args.n or 2000
    print(f"block analysis, n {n}")
    matrix = pairwise_distances(torch.randn(n, 100, device=args.device))
    permutations = draw_permutations(n, torch.Generator().manual_seed(0)).to(args.device)
    ours = seconds(lambda: block_analysis(matrix, permutations=permutations), 7)
    report("ours", ours)
    report("full sorts", seconds(lambda: sorted_blocks(matrix, permutations), 3), ours)
    error = block_analysis(matrix, permutations=permutations).mean
    expected = sorted_blocks(matrix, permutations)[0].cpu()
    error = (expected / error[: len(expected)] - 1).abs().max()
    print(f"  largest relative difference of a mean {error:.1e}")


def random_model(args: argparse.Namespace) -> nn.Module:
    """A captioner with random weights and a vocabulary of the prompt's words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(words) + "\n")
        sizes = {"vit": args.vit, "image_size": args.image_size, "med_config": {}}
        model = build_captioner(sizes | {"tokenizer": folder})
    return model.to(args.device).eval()


def random_samples(args: argparse.Namespace, n: int) -> Samples:
    """Random images, and captions of random tokens."""
    lengths = torch.randint(*CAPTION_LENGTHS, (n, 1))
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    ids = torch.randint(5, 30_000, mask.shape) * mask
    images = torch.randn(n, 3, args.image_size, args.image_size)
    return Samples(
        tensors={"input_ids": ids, "attention_mask": mask},
        images={"image": images},
        counted=counted_positions(mask, args.batch_size, keep_padding=False),
        batch_size=args.batch_size,
    )


def plan_for(args: argparse.Namespace, model: nn.Module, samples: Samples, n: int):
    """The engine's plan for all layers of a model."""
    layers = prunable_layers(model)
    shapes = trace_stages(model.stages(), layers, samples, torch.device(args.device))
    budget = int(args.memory_gb * 1e9)
    return plan_capture(shapes, set(layers), samples.sizes(), n, args.batch_size, budget)


@torch.no_grad()
def plain_forward(
    model: nn.Module, samples: Samples, device: str, rows: slice = slice(None)
) -> None:
    """The model over samples, without its vocabulary head, which has no profiled layer."""
    inputs = [values[rows] for values in (samples.images["image"], *samples.tensors.values())]
    for batch in zip(*(values.split(samples.batch_size) for values in inputs), strict=True):
        image, ids, mask = (values.to(device) for values in batch)
        model.text_decoder.bert(
            ids,
            attention_mask=mask,
            encoder_hidden_states=model.encode_image(image),
            is_decoder=True,
        )


def capture(args: argparse.Namespace) -> None:
    """All layers of a model: the whole engine against one plain forward.

    The plain forward is warmed up, so the engine runs twice: the first run also gets its memory
    from the system, which takes a virtual machine more than a second for each GB.
    """
    n = args.n or 12
    keep_freed_memory(torch.device(args.device))  # as ComputeID.py does
    model, samples = random_model(args), random_samples(args, n)
    plan = plan_for(args, model, samples, n)
    print(f"capture, vit {args.vit}, {args.image_size} px, n {n}\n{plan}")
    permutations = draw_permutations(n, torch.Generator().manual_seed(0))
    found = {}

    def engine() -> None:
        layers = prunable_layers(model)
        for layer, matrix in Capture(plan, layers, samples, torch.device(args.device), False):
            found[layer.name] = block_analysis(matrix, permutations=permutations).id

    plain_forward(model, samples, args.device, slice(args.batch_size))  # warm-up
    half = n // 2 // args.batch_size * args.batch_size
    plain = seconds(lambda: plain_forward(model, samples, args.device, slice(half)))
    first, ours = seconds(engine), seconds(engine)
    plain += seconds(lambda: plain_forward(model, samples, args.device, slice(half, None)))
    report("plain forward, half before, half after", plain)
    report("ours, IDs of all layers, into new memory", first)
    report("ours again, into memory used before", ours)
    print(f"  {'ours / plain forward':44}{first / plain:9.3f}, again {ours / plain:.3f}")
    if args.ids:
        write_json(args.ids, found)


class Whole(nn.Module):
    """A captioner as a model like any other: its `forward` is that of `plain_forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual_encoder, self.text_decoder = model.visual_encoder, model.text_decoder

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Runs what has profiled layers."""
        self.text_decoder.bert(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.visual_encoder(image),
            is_decoder=True,
        )


def general(args: argparse.Namespace) -> None:
    """`dimension.measure`, which knows nothing of stages, against the staged engine."""
    n = args.n or 12
    keep_freed_memory(torch.device(args.device))
    captioner, samples = random_model(args), random_samples(args, n)
    model, layers = Whole(captioner), list(prunable_layers(captioner))
    values = {"image": samples.images["image"], **samples.tensors}
    parts = zip(*(x.split(args.batch_size) for x in values.values()), strict=True)
    batches = [dict(zip(values, part, strict=True)) for part in parts]
    print(f"general, vit {args.vit}, {args.image_size} px, n {n}")
    permutations = block_permutations(n, 0)
    plan = plan_for(args, captioner, samples, n)
    found, runs = {}, []
    model.register_forward_pre_hook(lambda *call: runs.append(1))

    def staged() -> None:
        modules = prunable_layers(captioner)
        for layer, matrix in Capture(plan, modules, samples, torch.device(args.device), False):
            found[layer.name] = measure_layer(layer.name, 0, matrix, 1.0, permutations).id

    plain_forward(captioner, samples, args.device, slice(args.batch_size))  # warm-up
    plain = seconds(lambda: plain_forward(captioner, samples, args.device))
    ours = seconds(staged)
    report("plain forward", plain)
    report("staged", ours)
    print(f"  {'staged / plain forward':44}{ours / plain:9.3f}")
    for budget in (args.memory_gb, args.small_memory_gb):
        runs.clear()
        profile = []
        whole = seconds(lambda: profile.append(measure(model, batches, layers, budget)))  # noqa: B023
        passes = (len(runs) - 3) // len(batches)  # after three traces
        report(f"general, {budget:g} GB, {passes} passes", whole, ours)
        ratio, most = whole / plain, 1 + 1.3 * passes
        print(f"  {'general / plain forward':44}{ratio:9.3f}, accepted: {most:.1f}")
        errors = [abs(layer.id / found[name] - 1) for name, layer in profile[0].layers.items()]
        print(f"  largest relative difference of an ID {max(errors):.1e}")


def straightforward(args: argparse.Namespace) -> None:
    """Hooks keep all activations; then torch.pdist and full sorts, layer by layer."""
    n = args.n or 12
    model, samples = random_model(args), random_samples(args, n)
    layers, kept = prunable_layers(model), {}
    print(f"straightforward, vit {args.vit}, {args.image_size} px, n {n}")

    def keep(name: str, output: Tensor) -> None:
        kept.setdefault(name, []).append(output)

    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    report("forward with hooks", seconds(lambda: plain_forward(model, samples, args.device)))
    for hook in hooks:
        hook.remove()
    mask = samples.counted[..., None].to(args.device)

    def join() -> None:
        for name in kept:
            whole = torch.cat(kept[name])
            kept[name] = (whole if sees_image(name) else whole * mask).flatten(1)

    report("join batches, blank padding", seconds(join))
    if args.disk:
        disk_round_trip(kept, Path(args.disk))
    permutations = draw_permutations(n, torch.Generator().manual_seed(0)).to(args.device)

    def estimate() -> None:
        above = torch.triu_indices(n, n, 1)
        for points in kept.values():
            matrix = torch.zeros(n, n, dtype=torch.float64, device=args.device)
            matrix[above[0], above[1]] = torch.pdist(points).double()
            sorted_blocks(matrix + matrix.T, permutations)

    report("torch.pdist and full sorts", seconds(estimate))


def disk_round_trip(kept: dict[str, Tensor], folder: Path) -> None:
    """Writes all activations and reads them again, as the original code does."""
    folder.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        for number, points in enumerate(kept.values()):
            torch.save(points, folder / f"{number}.pt")

    def read() -> None:
        for number in range(len(kept)):
            torch.load(folder / f"{number}.pt", weights_only=True)

    report(f"write {sum(x.nbytes for x in kept.values()) / 1e9:.1f} GB", seconds(write))
    report("read them", seconds(read))
    for number in range(len(kept)):
        (folder / f"{number}.pt").unlink()


def plan(args: argparse.Namespace) -> None:
    """Prints the engine's plan; nothing is run over the samples."""
    n = args.n or 2000
    model, samples = random_model(args), random_samples(args, 1)
    print(f"plan, vit {args.vit}, {args.image_size} px, n {n}\n{plan_for(args, model, samples, n)}")


PARTS = {
    part.__name__: part for part in (distances, blocks, capture, general, straightforward, plan)
}


def main(args: argparse.Namespace) -> None:
    """Runs the parts that are asked for."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, device {args.device}")
    for part in args.parts or PARTS:
        PARTS[part](args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--n", type=int, help="samples; each part has its default")
    parser.add_argument("--features", type=int, default=28416)
    parser.add_argument("--memory_gb", type=float, default=12)
    parser.add_argument(
        "--small_memory_gb", type=float, default=1.5, help="for several passes of `general`"
    )
    parser.add_argument("--vit", default="base", choices=["tiny", "base", "large"])
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--disk", help="folder for the straightforward method's round trip")
    parser.add_argument(
        "--ids", help="JSON file for the IDs that `capture` finds, to compare budgets"
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
