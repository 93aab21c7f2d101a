"""What a model costs: parameters, bytes, multiply-adds, milliseconds, memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import llvmlite.binding
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build_captioner, build_clip, build_nlvr, compressed
from models.checkpoint import stored_tensors
from models.layers import modality
from sparse.linear import sparsify_

BYTES = {"float32": 4, "float16": 2}  # of an element
REPEATS = 5  # of what is timed


# Task to what builds its model, and one sample of it: pictures, tensors of tokens (ids, their mask,
# targets), and tokens in UPop's published counts (a caption of 13 words, a statement of 34 word
# pieces and commas, both with [CLS] and [SEP]); None: as many as the model has positions.
SAMPLES = {
    "caption": (build_captioner, 1, 3, 15),
    "nlvr": (build_nlvr, 2, 2, 36),
    "retrieval": (build_clip, 1, 1, None),
}


def example(model: nn.Module, task: str, image_size: int, device: str = "cpu") -> tuple:
    """One sample as tensors of `infer`: random pixels and a text."""
    _, pictures, texts, tokens = SAMPLES[task]
    size, length = (1, 3, image_size, image_size), tokens or model.context_length
    ids = [torch.ones(1, length, dtype=torch.int64, device=device) for _ in range(texts)]
    return (*(torch.randn(size, device=device) for _ in range(pictures)), *ids)


def infer(model: nn.Module, tensors: tuple) -> Tensor:
    """A forward pass: a captioner's loss of a caption, or what another model makes of a sample."""
    return getattr(model, "logits_from_ids", model)(*tensors)


@torch.no_grad()
def multiply_adds(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, dict[str, int]]:
    """Counts the multiply-adds of a forward pass, as UPop does (Shi et al., ICML 2023).

    Linear layers, convolutions and products of attention are counted; norms and activations, below
    0.2 % of BLIP's, are not. A weight that is zero saves its product with every token.

    Args:
        model: in eval mode.
        tensors: of `example`.

    Returns:
        "dense" and "effective", each by modality; the effective ones without products by zero.
    """
    saved = dict.fromkeys(("vision", "language"), 0)
    hooks = [
        module.register_forward_hook(partial(_add_saved, saved, modality(name)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # the counter sees products of matrices, but not every device's kernel for attention
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            infer(model, tensors)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    counts = {name: sum(c.values()) // 2 for name, c in counter.get_flop_counts().items()}
    encoder = "visual_encoder" if hasattr(model, "visual_encoder") else "visual"
    # the counter names modules from the outermost one that was called
    names = f"{type(model).__name__}.{encoder}", type(getattr(model, encoder)).__name__
    vision = next(counts[name] for name in names if name in counts)
    dense = {"vision": vision, "language": counts["Global"] - vision}
    return {"dense": dense, "effective": {kind: dense[kind] - saved[kind] for kind in dense}}


def _add_saved(saved: dict[str, int], kind: str, module: nn.Module, inputs: tuple, output) -> None:
    """Adds a layer's products by zero weights; a forward hook once its first two are given."""
    weights = [module.weight] if hasattr(module, "weight") else []
    if isinstance(module, nn.MultiheadAttention):
        output, weights = output[0], [module.in_proj_weight, module.out_proj.weight]
    for weight in weights:
        zeros = weight.numel() - int(weight.count_nonzero()) if not weight.is_meta else 0
        saved[kind] += zeros * (output.numel() // weights[-1].shape[0])  # uses of each weight


def sizes(model: nn.Module) -> dict:
    """Parameters, those that are not zero, and bytes of the weights in each format.

    Returns:
        "parameters" and "nonzeros", each by modality; "bytes" by format and type.
    """
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


def milliseconds(run: Callable[[], object]) -> list[float]:
    """Times of a call, in ascending order, after one that is not timed."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def report(model: nn.Module, config: dict) -> dict:
    """Measures what a model costs, here; sparse as well, which makes it sparse.

    Returns:
        Fit for JSON: what `sizes` and `multiply_adds` return, what became of the linear layers
        ("sparse_layers", a text), and of the model as it is ("dense") and with sparse layers
        ("sparse") what `measured` returns.
    """
    sample = example(model, config["task"], config["image_size"])
    found = sizes(model) | {"multiply_adds": multiply_adds(model, sample)}
    found["dense"] = measured(model, config, sample)
    found["sparse_layers"] = str(sparsify_(model))
    found["sparse"] = measured(model, config, sample)
    return found


def measured(model: nn.Module, config: dict, sample: tuple[Tensor, ...]) -> dict:
    """Milliseconds of one sample (a caption of one length, or a forward pass), resident bytes.

    Returns:
        "milliseconds", the median of the repeats; "spread", their least and most;
        "resident_bytes".
    """
    if config["task"] == "caption":
        tokens = SAMPLES["caption"][-1]
        length = min(tokens, config["max_length"])  # the same whatever a model says
        lengths = {"num_beams": config["num_beams"], "max_length": length, "min_length": length}
        times = milliseconds(lambda: model.generate(sample[0], **lengths))
    else:
        with torch.no_grad():
            times = milliseconds(lambda: infer(model, sample))
    return {
        "milliseconds": statistics.median(times),
        "spread": [times[0], times[-1]],
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def processor() -> str:
    """The processor's family, as compilers name it: znver4, skylake-avx512, apple-m1."""
    return llvmlite.binding.get_host_cpu_name()
