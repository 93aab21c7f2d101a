"""Pruned BLIP base on a CPU: sparse layers against dense ones and what a user may take instead.

    python -m benchmarks.sparse                       # the first four parts, eight minutes
    python -m benchmarks.sparse captioning vision
    python -m benchmarks.sparse layers --batches 4
    python -m benchmarks.sparse models --folders ../vit ../bert   # of Hugging Face
    python -m benchmarks.sparse crossover             # what a nonzero, a segment, an element cost

Weights of BLIP are random; the named share of all prunable weights is zero, spread over vision and
language as PLATON leaves them. "dense" is float32: of layers the better of `F.linear` and a product
of a transposed weight. "bound" is the time of the nonzeros' multiply-adds at the rate of the dense
product. "GFLOP/s" are those of the nonzeros, 2 for each and token. "int8" is torch's dynamic
quantisation of the dense model, "bf16" its `bfloat16()`, "MNN" its sparse kernels (where the
packages MNN and onnx are there). Times are medians in seconds, of works taken in turns.
"""

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import compat  # noqa: F401  (before transformers)

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.timing import print_document, seconds
from data.scenes.words import vocabulary
from models import compressed
from models.captioner import build_captioner
from models.checkpoint import load_checkpoint, stored_tensors
from models.layers import modality, prunable_layers
from sparse.linear import SparseLinear, gains, sparsify_

# Percent of zeros to the shares that PLATON keeps in vision and language, up to a factor.
KEPT = {80: (0.132, 0.316), 90: (0.06, 0.17), 95: (0.027, 0.089)}
SHAPES = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]  # outputs, inputs
SPARSELAB = [(384, 1536, 2048), (640, 2560, 1024)]  # its published shapes and tokens, at 90 %
PATCHES = 577  # tokens of an image at 384 pixels
LENGTHS = {"num_beams": 3, "max_length": 20, "min_length": 20}
Row = dict[str, str | int | float | bool]


def keep_(weight: Tensor, share: float) -> None:
    """Zeroes all but a random share of a weight, in place."""
    weight[torch.rand_like(weight) >= share] = 0


def int8(model: nn.Module) -> nn.Module:
    """A copy of a dense model with torch's dynamic quantisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def layers(args: argparse.Namespace) -> Iterator[Row]:
    """Each shape of layer, at the tokens of one image and of a batch; sparselab's shapes."""
    cases = [(*s, b * PATCHES, percent) for s in SHAPES for b in args.batches for percent in KEPT]
    for rows, columns, tokens, percent in cases + [(*shape, 90) for shape in SPARSELAB]:
        layer, x = nn.Linear(columns, rows), torch.randn(tokens, columns)
        keep_(layer.weight, 1 - percent / 100)
        sparse, csr = SparseLinear(layer), layer.weight.to_sparse_csr()
        transposed, bias = layer.weight.T.contiguous(), layer.bias
        works = {
            "linear": partial(layer, x),
            "product": partial(torch.addmm, bias, x, transposed),
            "sparse": partial(sparse, x),
            "CSR": partial(F.linear, x, csr, bias),
            "int8": partial(int8(nn.Sequential(layer)), x),
            "bf16": partial(copy.deepcopy(layer).bfloat16(), x.bfloat16()),
        }
        taken = seconds(works, args.repeats)
        dense = min(taken.pop("linear"), taken.pop("product"))
        taken = {"dense": dense} | taken | {"bound": dense * (1 - percent / 100)}
        taken["GFLOP/s"] = 2e-9 * len(sparse.values) * tokens / taken["sparse"]
        yield {"layer": f"{rows} x {columns}", "tokens": tokens, "zeros": percent} | taken


def captioning(args: argparse.Namespace) -> Iterator[Row]:
    """Whole captions of BLIP base: ViT and 3 beams of 20 tokens."""
    for percent in KEPT:
        dense, sparse = captioner(percent), captioner(percent)
        models = {"dense": dense, "sparse": sparse, "int8": int8(dense)}
        sparsify_(sparse)
        for batch in args.batches:
            image = torch.randn(batch, 3, 384, 384)
            works = {name: partial(m.generate, image, **LENGTHS) for name, m in models.items()}
            same = works["dense"]() == works["sparse"]()
            row = {"batch": batch, "zeros": percent, "captions equal": same}
            yield row | seconds(works, max(1, args.repeats // 2))


def vision(args: argparse.Namespace) -> Iterator[Row]:
    """The ViT of BLIP base; how far its tokens are from the dense ones."""
    for percent in KEPT:
        model, image = captioner(percent).visual_encoder, torch.randn(1, 3, 384, 384)
        yield (
            {"zeros": percent}
            | ways(model, {"image": image}, args.repeats)
            | mnn(model, image, args.repeats)
        )


def models(args: argparse.Namespace) -> Iterator[Row]:
    """Models of Hugging Face: the weights of each layer that are smallest are zeroed."""
    for folder in args.folders:
        for percent in KEPT:
            model = AutoModel.from_pretrained(folder).eval()
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    cut = (
                        layer.weight.abs().flatten().kthvalue(layer.weight.numel() * percent // 100)
                    )
                    layer.weight[layer.weight.abs() <= cut.values] = 0
            for batch in args.batches:
                given = inputs_of(model, batch)
                shape = " ".join(str(list(x.shape)) for x in given.values())
                row = {"model": type(model).__name__, "inputs": shape, "zeros": percent}
                yield row | ways(model, given, args.repeats)


def inputs_of(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Pictures of the model's size, texts of 64 tokens, or both."""
    config, given = model.config, {}
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        given["pixel_values"] = torch.randn(batch, 3, vision.image_size, vision.image_size)
    words = getattr(getattr(config, "text_config", config), "vocab_size", 0)
    if words:
        given["input_ids"] = torch.randint(5, words, (batch, 64))
    return given


def ways(model: nn.Module, given: dict[str, Tensor], repeats: int) -> Row:
    """Seconds of a dense model and of what may be made of it."""
    sparse, bf16 = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    sparsify_(sparse)
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in given.items()}
    works = {
        name: partial(made, **given)
        for name, made in {"dense": model, "sparse": sparse, "int8": int8(model)}.items()
    }
    return seconds(works | {"bf16": partial(bf16, **half)}, repeats)


def mnn(model: nn.Module, image: Tensor, repeats: int) -> Row:
    """Seconds of MNN with its sparse kernels, and its largest difference, if it is there."""
    if not (importlib.util.find_spec("MNN") and importlib.util.find_spec("onnx")):
        return {}
    from MNN import expr
    from MNN import nn as networks

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx, file = f"{folder}/model.onnx", f"{folder}/model.mnn"
        names = {"input_names": ["image"], "output_names": ["tokens"]}
        torch.onnx.export(model, (image,), onnx, dynamo=False, opset_version=17, **names)
        convert = [Path(sys.executable).with_name("mnnconvert"), "-f", "ONNX", "--modelFile", onnx]
        convert += ["--MNNModel", file, "--bizCode", "x", "--detectSparseSpeedUp", "1"]
        subprocess.run(convert, check=True, capture_output=True)
        threads = {"numThread": torch.get_num_threads(), "precision": "high", "backend": 0}
        runtime = networks.create_runtime_manager((threads,))
        network = networks.load_module_from_file(
            file, ["image"], ["tokens"], runtime_manager=runtime
        )

    def work() -> Tensor:
        x = expr.placeholder(list(image.shape), expr.NCHW, expr.float)
        x.write(image.numpy())
        return torch.from_numpy(network.forward([x])[0].read())

    difference = float((work() - model(image)).abs().max())
    return {"MNN": seconds({"MNN": work}, repeats)["MNN"], "MNN differs by": difference}


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
            yield {"zeros": percent} | seconds(works, args.repeats) | sizes


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
                yield row | {"chosen": chosen} | seconds(works, args.repeats)


PARTS = {part.__name__: part for part in (layers, captioning, vision, reading, models, crossover)}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: the first four")
    parser.add_argument("--folders", nargs="+", default=[], help="of Hugging Face, for `models`")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    results = {}
    for part in args.parts or list(PARTS)[:4]:
        results[part] = []
        for row in PARTS[part](args):
            if not results[part]:
                print(part, *(f"{key:>10}" for key in row), sep="  ")
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
            print(part, *(f"{cell:>10}" for cell in cells), sep="  ", flush=True)
            results[part].append(row)
    print_document("sparse", **results)


if __name__ == "__main__":
    main()
