"""Pruned BLIP base on a CPU: sparse layers against dense ones, torch's CSR product and bfloat16.

    python -m benchmarks.sparse                       # all but crossover, about two minutes
    python -m benchmarks.sparse layers
    python -m benchmarks.sparse captioning --batches 4
    python -m benchmarks.sparse reading
    python -m benchmarks.sparse crossover             # what a nonzero, a segment, an element cost

Weights are random, with zeros spread as PLATON leaves them: a vision and a language share for each
sparsity. Dense is float32 in the better of two layouts, `F.linear` and a product of a transposed
weight; bfloat16 takes part where it is faster than that. The bound is the time of the nonzeros'
multiply-adds at the rate of the dense product, which is near the processor's peak. All figures are
medians, dense and sparse in turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.scenes.words import vocabulary
from models import compressed
from models.captioner import build_captioner
from models.checkpoint import load_checkpoint
from models.layers import modality, prunable_layers
from reports.costs import processor
from sparse.linear import SparseLinear, gains, sparsify_

SPARSITY = {80: (0.868, 0.684), 90: (0.94, 0.83), 95: (0.973, 0.911)}  # vision, language
SHAPES = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]  # outputs, inputs
PATCHES = 577  # tokens of an image at 384 pixels
LENGTHS = {"num_beams": 3, "max_length": 20, "min_length": 20}


def medians(works: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after a round that warms up."""
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def prune_(weight: Tensor, share: float) -> None:
    """Zeroes a random share of a weight, in place."""
    weight[torch.rand_like(weight) < share] = 0


@torch.no_grad()
def layers(args: argparse.Namespace) -> None:
    """Each shape of layer, at the tokens of one image and of a batch."""
    print(f"{'layer':12}{'tokens':>7}{'zeros':>7}{'dense, ms':>11}{'sparse':>8}{'CSR':>8}", end="")
    print(f"{'bf16':>8}   dense : ours   CSR : ours   ours : bound")
    for rows, columns in SHAPES:
        for batch in args.batches:
            for percent in SPARSITY:
                one_layer(rows, columns, batch * PATCHES, percent / 100, args.repeats)


def one_layer(rows: int, columns: int, tokens: int, share: float, repeats: int) -> None:
    """A line of the table of layers."""
    layer = nn.Linear(columns, rows)
    prune_(layer.weight, share)
    sparse, csr = SparseLinear(layer).eval(), layer.weight.to_sparse_csr()
    x = torch.randn(tokens, columns)
    transposed = layer.weight.T.contiguous()
    x16, layer16 = x.bfloat16(), nn.Linear(columns, rows).bfloat16()
    taken = medians(
        {
            "linear": lambda: layer(x),
            "product": lambda: torch.addmm(layer.bias, x, transposed),
            "sparse": lambda: sparse(x),
            "CSR": lambda: F.linear(x, csr, layer.bias),
            "bf16": lambda: layer16(x16),
        },
        repeats,
    )
    dense, ours = min(taken["linear"], taken["product"]), taken["sparse"]
    bound = dense * (1 - share)
    print(
        f"{f'{rows} x {columns}':12}{tokens:7}{share:7.0%}{dense * 1e3:11.2f}{ours * 1e3:8.2f}"
        f"{taken['CSR'] * 1e3:8.2f}{taken['bf16'] * 1e3:8.2f}{dense / ours:12.2f}x"
        f"{taken['CSR'] / ours:12.2f}x{ours / bound:14.2f}",
        flush=True,
    )


@torch.no_grad()
def captioning(args: argparse.Namespace) -> None:
    """Whole captions of BLIP base: ViT and 3 beams of 20 tokens."""
    print(f"{'captioning':12}{'batch':>6}{'zeros':>7}{'dense, s':>10}{'sparse':>8}", end="")
    print("   dense : ours   sparse layers   captions")
    for percent, shares in SPARSITY.items():
        dense, sparse = (captioner(shares) for _ in range(2))
        report = sparsify_(sparse)
        for batch in args.batches:
            image = torch.randn(batch, 3, 384, 384)
            same = dense.generate(image, **LENGTHS) == sparse.generate(image, **LENGTHS)
            taken = medians(
                {
                    "dense": lambda image=image, model=dense: model.generate(image, **LENGTHS),
                    "sparse": lambda image=image, model=sparse: model.generate(image, **LENGTHS),
                },
                max(1, args.repeats // 3),
            )
            print(
                f"{'BLIP base':12}{batch:6}{percent / 100:7.0%}{taken['dense']:10.2f}"
                f"{taken['sparse']:8.2f}{taken['dense'] / taken['sparse']:14.2f}x"
                f"{len(report.sparse):16}   {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )


def captioner(shares: tuple[float, float]) -> nn.Module:
    """BLIP base with random weights, pruned by modality; the same one each time."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
        config = {"vit": "base", "image_size": 384, "tokenizer": folder, "med_config": {}}
        model = build_captioner(config).eval()
    for name, layer in prunable_layers(model).items():
        prune_(layer.weight.data, shares[modality(name) == "language"])
    return model


def reading(args: argparse.Namespace) -> None:
    """Checkpoints of BLIP base, compressed against dense, from pages that are in memory."""
    print(
        f"{'reading':12}{'zeros':>7}{'dense, s':>10}{'compressed':>12}   compressed : dense", end=""
    )
    print("   MB dense, compressed")
    for percent, shares in SPARSITY.items():
        model = captioner(shares)
        # safetensors refuses tensors that share memory
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            dense, packed = (Path(folder, f"{name}.safetensors") for name in ("dense", "packed"))
            save_file(weights, dense)
            compressed.write(packed, weights.items())
            sizes = ", ".join(f"{path.stat().st_size / 1e6:.0f}" for path in (dense, packed))
            taken = medians(
                {path.stem: partial(load_checkpoint, model, str(path)) for path in (dense, packed)},
                args.repeats,
            )
        print(
            f"{'BLIP base':12}{percent / 100:7.0%}{taken['dense']:10.2f}{taken['packed']:12.2f}"
            f"{taken['packed'] / taken['dense']:17.2f}x   {sizes}",
            flush=True,
        )


@torch.no_grad()
def crossover(args: argparse.Namespace) -> None:
    """Dense against sparse at each tenth of zeros: where the rule of `sparsify_` decides."""
    print(f"{'layer':12}{'tokens':>7}  dense : sparse at 0, 10, ..., 90 % zeros (*: made sparse)")
    for rows, columns in SHAPES:
        for tokens in (3, 12, PATCHES):
            cells = [cell(rows, columns, tokens, tenth / 10, args.repeats) for tenth in range(10)]
            print(f"{f'{rows} x {columns}':12}{tokens:7}  {' '.join(cells)}", flush=True)


def cell(rows: int, columns: int, tokens: int, share: float, repeats: int) -> str:
    """How many times as fast as dense a layer is sparse, and whether it would be made sparse."""
    layer, x = nn.Linear(columns, rows), torch.randn(tokens, columns)
    prune_(layer.weight, share)
    sparse = SparseLinear(layer).eval()
    taken = medians({"dense": lambda: layer(x), "sparse": lambda: sparse(x)}, repeats)
    chosen = gains(rows, columns, int(layer.weight.count_nonzero()))
    return f"{taken['dense'] / taken['sparse']:5.2f}{'*' if chosen else ' '}"


PARTS = {"layers": layers, "captioning": captioning, "reading": reading, "crossover": crossover}


def main(argv: list[str] | None = None) -> None:
    """Prints the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but crossover")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    print(f"{processor()}, {torch.get_num_threads()} threads")
    for part in args.parts or ("layers", "captioning", "reading"):
        PARTS[part](args)


if __name__ == "__main__":
    main()
