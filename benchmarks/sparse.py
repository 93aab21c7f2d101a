"""Pruned BLIP base on a CPU: sparse layers against dense ones and what a user may take instead.

    python -m benchmarks.sparse                       # all but crossover, about three minutes
    python -m benchmarks.sparse layers
    python -m benchmarks.sparse captioning --batches 4
    python -m benchmarks.sparse reading
    python -m benchmarks.sparse crossover             # what a nonzero, a segment, an element cost

Weights are random; the named share of all prunable weights is zero, spread over vision and language
as PLATON leaves them. "dense" is float32: of layers the better of `F.linear` and a product of a
transposed weight. "bound" is the time of the nonzeros' multiply-adds at the rate of the dense
product. "int8" is torch's dynamic quantisation of the dense model. Times are medians in seconds, of
works taken in turns. The last line is one JSON document.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.scenes.words import vocabulary
from engine.processes import machine_of
from models import compressed
from models.captioner import build_captioner
from models.checkpoint import load_checkpoint, stored_tensors
from models.layers import modality, prunable_layers
from sparse.linear import SparseLinear, gains, sparsify_

# Percent of zeros to the shares that PLATON keeps in vision and language, up to a factor.
KEPT = {80: (0.132, 0.316), 90: (0.06, 0.17), 95: (0.027, 0.089)}
SHAPES = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]  # outputs, inputs
PATCHES = 577  # tokens of an image at 384 pixels
LENGTHS = {"num_beams": 3, "max_length": 20, "min_length": 20}
Row = dict[str, str | int | float | bool]


def medians(repeats: int, **works: Callable) -> dict[str, float]:
    """Median seconds of each, taken in turns after a round that warms up."""
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def keep_(weight: Tensor, share: float) -> None:
    """Zeroes all but a random share of a weight, in place."""
    weight[torch.rand_like(weight) >= share] = 0


def layers(args: argparse.Namespace) -> Iterator[Row]:
    """Each shape of layer, at the tokens of one image and of a batch."""
    for rows, columns in SHAPES:
        for tokens in (batch * PATCHES for batch in args.batches):
            for percent in KEPT:
                layer, x = nn.Linear(columns, rows), torch.randn(tokens, columns)
                keep_(layer.weight, 1 - percent / 100)
                sparse, csr = SparseLinear(layer), layer.weight.to_sparse_csr()
                transposed, bias = layer.weight.T.contiguous(), layer.bias
                x16, layer16 = x.bfloat16(), nn.Linear(columns, rows).bfloat16()
                taken = medians(
                    args.repeats,
                    linear=partial(layer, x),
                    product=partial(torch.addmm, bias, x, transposed),
                    sparse=partial(sparse, x),
                    CSR=partial(F.linear, x, csr, bias),
                    bf16=partial(layer16, x16),
                )
                dense = min(taken.pop("linear"), taken.pop("product"))
                taken = {"dense": dense} | taken | {"bound": dense * (1 - percent / 100)}
                yield {"layer": f"{rows} x {columns}", "tokens": tokens, "zeros": percent} | taken


def captioning(args: argparse.Namespace) -> Iterator[Row]:
    """Whole captions of BLIP base: ViT and 3 beams of 20 tokens."""
    for percent in KEPT:
        dense, sparse = captioner(percent), captioner(percent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            int8 = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, torch.qint8)
        sparsify_(sparse)
        for batch in args.batches:
            image = torch.randn(batch, 3, 384, 384)
            works = {"dense": dense, "sparse": sparse, "int8": int8}
            works = {
                name: partial(model.generate, image, **LENGTHS) for name, model in works.items()
            }
            same = works["dense"]() == works["sparse"]()
            yield {"batch": batch, "zeros": percent, "captions equal": same} | medians(
                max(1, args.repeats // 3), **works
            )


def captioner(percent: int) -> nn.Module:
    """BLIP base with random weights, `percent` of them zero; the same one each time."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
        config = {"vit": "base", "image_size": 384, "tokenizer": folder, "med_config": {}}
        model = build_captioner(config).eval()
    weights = {name: layer.weight.data for name, layer in prunable_layers(model).items()}
    kept = {name: KEPT[percent][modality(name) == "language"] for name in weights}
    elements = sum(weight.numel() for weight in weights.values())
    share = sum(kept[name] * weight.numel() for name, weight in weights.items()) / elements
    for name, weight in weights.items():
        keep_(weight, kept[name] * (1 - percent / 100) / share)
    return model


def reading(args: argparse.Namespace) -> Iterator[Row]:
    """Checkpoints of BLIP base, compressed against dense, from pages that are in memory."""
    for percent in KEPT:
        model = captioner(percent)
        weights = dict(stored_tensors(model))
        with tempfile.TemporaryDirectory() as folder:
            dense, packed = Path(folder, "dense.safetensors"), Path(folder, "packed.safetensors")
            save_file(weights, dense)
            compressed.write(packed, weights.items())
            sizes = {f"{path.stem} MB": path.stat().st_size / 1e6 for path in (dense, packed)}
            works = {
                path.stem: partial(load_checkpoint, model, str(path)) for path in (dense, packed)
            }
            yield {"zeros": percent} | medians(args.repeats, **works) | sizes


def crossover(args: argparse.Namespace) -> Iterator[Row]:
    """Dense against sparse at each tenth of zeros: where the rule of `sparsify_` decides."""
    for rows, columns in SHAPES:
        for tokens in (3, 12, PATCHES):
            for percent in range(0, 100, 10):
                layer, x = nn.Linear(columns, rows), torch.randn(tokens, columns)
                keep_(layer.weight, 1 - percent / 100)
                chosen = gains(rows, columns, int(layer.weight.count_nonzero()))
                works = {"dense": partial(layer, x), "sparse": partial(SparseLinear(layer), x)}
                row = {"layer": f"{rows} x {columns}", "tokens": tokens, "zeros": percent}
                yield row | {"chosen": chosen} | medians(args.repeats, **works)


PARTS = {"layers": layers, "captioning": captioning, "reading": reading, "crossover": crossover}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but crossover")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    document = machine_of(torch.device("cpu"))
    print(*document.values(), sep=", ")
    for part in args.parts or ("layers", "captioning", "reading"):
        document[part] = []
        for row in PARTS[part](args):
            if not document[part]:
                print(part, *(f"{key:>10}" for key in row), sep="  ")
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
            print(part, *(f"{cell:>10}" for cell in cells), sep="  ", flush=True)
            document[part].append(row)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
