"""What a model costs: parameters, bytes, multiply-adds, milliseconds, memory."""

import inspect
import statistics
import time
import timeit
from contextlib import ExitStack
from functools import partial

import psutil
import torch
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.tasks import TASKS
from models import compressed
from models.checkpoint import stored_tensors
from models.layers import modality
from sparse.linear import sparsify_

BYTES = {"float32": 4, "float16": 2}  # of an element
REPEATS = 5  # timed calls


def example(model: nn.Module, task: str, image_size: int, device: str = "cpu") -> tuple:
    """Random images, and a text of as many tokens as UPop's counts take, for a forward pass."""
    images, length = len(TASKS[task].images), TASKS[task].tokens or model.context_length
    texts = 3  # ids, mask, targets
    if hasattr(model, "logits_from_ids"):
        texts = len(inspect.signature(model.logits_from_ids).parameters) - images
    pixels = [torch.randn(1, 3, image_size, image_size, device=device) for _ in range(images)]
    return *pixels, *torch.ones(texts, 1, length, dtype=torch.int64, device=device)


@torch.no_grad()
def multiply_adds(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, dict[str, int]]:
    """Counts the multiply-adds of a forward pass to the logits, or to a captioner's loss.

    Linear layers, convolutions and products of attention are counted, as UPop does (Shi et al.,
    ICML 2023); norms and activations, below 0.2 % of BLIP's, are not. Returns "dense" and
    "effective" counts by modality; effective ones leave out products by zero.
    """
    saved = dict.fromkeys(("vision", "language"), 0)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
                add = partial(_add_saved, saved, modality(name))
                stack.enter_context(module.register_forward_hook(add))
        # the counter sees products of matrices, but not every kernel for attention
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        getattr(model, "logits_from_ids", model)(*tensors)
    counts = {name: sum(c.values()) // 2 for name, c in counter.get_flop_counts().items()}
    encoder = "visual_encoder" if hasattr(model, "visual_encoder") else "visual"
    # the counter names modules from the outermost one that was called
    names = f"{type(model).__name__}.{encoder}", type(getattr(model, encoder)).__name__
    vision = next(counts[name] for name in names if name in counts)
    dense = {"vision": vision, "language": counts["Global"] - vision}
    return {"dense": dense, "effective": {kind: dense[kind] - saved[kind] for kind in dense}}


def _add_saved(saved: dict[str, int], kind: str, module: nn.Module, inputs: tuple, output) -> None:
    """Adds a layer's products by zero weights; the last three arguments are a forward hook's."""
    weights = [module.weight] if hasattr(module, "weight") else []
    if isinstance(module, nn.MultiheadAttention):
        output, weights = output[0], [module.in_proj_weight, module.out_proj.weight]
    for weight in weights:
        zeros = weight.numel() - int(weight.count_nonzero()) if not weight.is_meta else 0
        saved[kind] += zeros * (output.numel() // weights[-1].shape[0])  # uses of each weight


def sizes(model: nn.Module) -> dict:
    """Counts "parameters" and "nonzeros" by modality, "bytes" by format and type."""
    found = {what: dict.fromkeys(("vision", "language"), 0) for what in ("parameters", "nonzeros")}
    found["bytes"] = {f"{form} {t}": 0 for form in ("dense", "compressed") for t in BYTES}
    for name, tensor in stored_tensors(model):
        kind, elements, stored = modality(name), tensor.numel(), int(tensor.count_nonzero())
        found["parameters"][kind] += elements
        found["nonzeros"][kind] += stored
        for dtype, size in BYTES.items():
            packed = round(compressed.packed_bytes(elements, stored, size))
            found["bytes"][f"dense {dtype}"] += elements * size
            found["bytes"][f"compressed {dtype}"] += min(packed, elements * size)
    return found


def report(model: nn.Module, config: dict) -> dict:
    """Sizes, multiply-adds, and costs on this machine, dense and sparse; makes the model sparse."""
    sample = example(model, config["task"], config["image_size"])
    found = sizes(model) | {"multiply_adds": multiply_adds(model, sample)}
    found["dense"] = measured(model, config, sample)
    found["sparse_layers"] = str(sparsify_(model))
    found["sparse"] = measured(model, config, sample)
    return found


@torch.no_grad()
def measured(model: nn.Module, config: dict, sample: tuple[Tensor, ...]) -> dict:
    """Milliseconds of a sample (a caption or a forward pass), their spread, and resident bytes."""
    call = partial(getattr(model, "logits_from_ids", model), *sample)
    if config["task"] == "caption":
        length = min(sample[1].shape[1], config["max_length"])  # the same for every model
        lengths = {"num_beams": config["num_beams"], "max_length": length, "min_length": length}
        call = partial(model.generate, sample[0], **lengths)
    call()
    seconds = timeit.repeat(call, timer=time.perf_counter, number=1, repeat=REPEATS)
    return {
        "milliseconds": 1000 * statistics.median(seconds),
        "spread": [1000 * min(seconds), 1000 * max(seconds)],
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def lines(found: dict) -> dict[str, str]:
    """A `report` in words: counts with their parts, bytes, times."""
    counts = {what: found[what] for what in ("parameters", "nonzeros")}
    counts |= {f"multiply-adds, {form}": parts for form, parts in found["multiply_adds"].items()}
    shown = {}
    for what, parts in counts.items():
        each = ", ".join(f"{part} {with_prefix(count)}" for part, count in parts.items())
        shown[what] = f"{with_prefix(sum(parts.values()))} ({each})"
    shown |= {f"bytes, {form}": with_prefix(count) for form, count in found["bytes"].items()}
    shown |= {f"ms a sample, {form}": times(found[form]) for form in ("dense", "sparse")}
    return shown | {"sparse layers": found["sparse_layers"].split(" linear")[0]}


def times(found: dict) -> str:
    """Milliseconds of a `measured` form: median (least–most)."""
    values = (found["milliseconds"], *found["spread"])
    return "{:g} ({:g}–{:g})".format(*(float(f"{value:.3g}") for value in values))


def with_prefix(count: float) -> str:
    """Three digits and a prefix, such as 1.13 M."""
    return EngFormatter()(float(f"{count:.3g}"))  # rounded first, because 999,600 is 1 M
