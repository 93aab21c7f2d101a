"""Linear layers that keep only the nonzeros of their weights, and the rule that chooses them."""

import ctypes
import dis
import inspect
import math
import platform
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sparse.matrix import PANEL, compress, decompress
from sparse.product import TILES, compiled, multiply

# Costs of a product of many tokens, in units of a dense multiply-add: the largest that
# `python -m benchmarks.sparse` has printed on any machine.
NONZERO = 2.0
SEGMENT = 8.0  # a row of a panel
ELEMENT = 12.0  # of the input or the output, which are transposed
SMALLEST = 1 << 14  # elements of a weight; below, the call itself takes longer than the product


class SparseLinear(nn.Module):
    """A linear layer for inference that keeps the nonzeros of its weight, five bytes each.

    y = x @ weight.T + bias, in float32 on the CPU, without a gradient. `state_dict` gives the dense
    weight and `load_state_dict` takes one, so checkpoints are those of the dense layer.

    Zeros are left out of the sums: an infinite or NaN element of the input changes only the outputs
    whose weight for it is not zero, while in a dense layer 0 * inf makes NaN of a token's outputs.
    """

    def __init__(self, layer: nn.Module):
        """Takes over a linear layer or Conv1D: its bias, hooks and mode are the same objects."""
        super().__init__()
        self.__dict__.update(vars(layer))
        self._parameters = {name: p for name, p in layer._parameters.items() if name != "weight"}
        self._buffers, self._non_persistent_buffers_set = dict(layer._buffers), set()
        self.transposed = _is_conv1d(layer)
        self.out_features, self.in_features = _rows_and_columns(layer)
        self._keep(layer.weight.detach())

    def _keep(self, weight: Tensor) -> None:
        parts = compress(weight.T if self.transposed else weight)
        for name, part in parts._asdict().items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies tokens (..., in_features) float32 to (..., out_features)."""
        for tensor in (x, self.values, self.values if self.bias is None else self.bias):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise RuntimeError(
                    "a sparse layer multiplies float32 on the CPU, but was given "
                    f"{tensor.dtype} on {tensor.device}: convert the model before `sparsify_`, and "
                    "use no autocast"
                )
        return multiply(x, self.in_features, self.starts, self.offsets, self.values, self.bias)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight: writing into it changes nothing."""
        weight = decompress(self.starts, self.offsets, self.values, self.in_features)
        return weight.T if self.transposed else weight

    def extra_repr(self) -> str:
        """The layer's part of `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={len(self.values)}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.contiguous()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, why):
        others = dict(state_dict)
        weight = others.pop(f"{prefix}weight", None)
        expected = (self.out_features, self.in_features)[:: -1 if self.transposed else 1]
        if weight is None:
            missing.append(f"{prefix}weight")
        elif tuple(weight.shape) != expected:
            why.append(f"{prefix}weight has shape {tuple(weight.shape)}, the layer's is {expected}")
        else:
            self._keep(weight.detach().to("cpu", torch.float32))
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, why)


@dataclass
class LayerReport:
    """Whether a linear layer is sparse."""

    elements: int  # of the weight
    nonzeros: int | None  # None: not counted, because the layer cannot be sparse
    why_dense: str = ""
    before: bool = False  # whether it was sparse before the call


@dataclass
class SparsifyReport:
    """Result of `sparsify_`, by layer name in the model's order."""

    layers: dict[str, LayerReport]
    bytes_before: int  # of all parameters and buffers of the model
    bytes_after: int

    @property
    def sparse(self) -> list[str]:
        """Names of the sparse layers."""
        return [name for name, layer in self.layers.items() if not layer.why_dense]

    def __str__(self) -> str:
        """A line on the sparse layers, and one for each reason why others stayed dense."""
        changed = [self.layers[name] for name in self.sparse]
        line = f"{len(changed)} of {len(self.layers)} linear layers are sparse"
        if changed:
            share = sum(c.nonzeros for c in changed) / sum(c.elements for c in changed)
            before = sum(c.before for c in changed)
            line += (f" ({before} were before)" if before else "") + (
                f", {share:.1%} of their weights are nonzero: {self.bytes_before / 1e6:.0f} MB to "
                f"{self.bytes_after / 1e6:.0f} MB. The first call compiles kernels (about two "
                "seconds), which Numba keeps for later runs"
            )
        reasons = Counter(layer.why_dense for layer in self.layers.values() if layer.why_dense)
        return "\n".join([line, *(f"{n} dense: {reason}" for reason, n in reasons.items())])


def sparsify_(model: nn.Module) -> SparsifyReport:
    """Makes linear layers `SparseLinear` in place where that makes them faster.

    A layer stays dense if it gains nothing (see `gains`), is not float32 on the CPU, shares its
    weight, or if its class, its owner, a pre-hook or a replaced `forward` may use the weight
    itself. All stay dense under autocast, or where Numba has no compiler. If any layer is sparse,
    no parameter of the model requires a gradient any more.

    Args:
        model: with its final weights. Layers stay the same objects, with their hooks; their class
            changes.
    """
    before, obstacle = _bytes(model), _obstacle()
    modules = dict(model.named_modules())
    owners = Counter(id(p) for module in modules.values() for p in module._parameters.values())
    layers = {}
    for name, layer in modules.items():
        if isinstance(layer, SparseLinear):
            elements = layer.in_features * layer.out_features
            layers[name] = LayerReport(elements, len(layer.values), before=True)
        elif _is_linear(layer):
            (rows, columns), nonzeros = _rows_and_columns(layer), None
            why_dense = obstacle or _unfit(name, modules, owners)
            if not why_dense:
                nonzeros = int(layer.weight.count_nonzero())
                if gains(rows, columns, nonzeros):
                    layer.__dict__ = vars(SparseLinear(layer))
                    layer.__class__ = SparseLinear
                else:
                    why_dense = "too few zeros to gain"
            layers[name] = LayerReport(rows * columns, nonzeros, why_dense)
    report = SparsifyReport(layers, before, _bytes(model))
    if report.sparse:
        model.requires_grad_(False)
        if platform.libc_ver()[0] == "glibc":  # which may keep what was freed
            ctypes.CDLL(None).malloc_trim(0)
    return report


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _rows_and_columns(layer: nn.Module) -> tuple[int, int]:
    if _is_conv1d(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any library; no wrapper, and none whose weight is a buffer.

    (CLIP's momentum copy has such weights.)
    """
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return "weight" not in module._buffers
    features = (getattr(module, f"{side}_features", None) for side in ("in", "out"))
    return all(isinstance(count, int) for count in features) and not any(
        _is_linear(child) for child in module.children()
    )


def _obstacle() -> str:
    """Why no layer at all can be sparse, or nothing."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, sparse layers multiply float32 alone"
    try:
        compiled(TILES[0])
    except Exception as error:  # a missing package, an unknown processor, a broken linker
        why = str(error).strip().partition("\n")[0]
        return f"Numba compiles no kernel here ({type(error).__name__}: {why})"
    return ""


def _unfit(name: str, modules: dict[str, nn.Module], owners: Counter) -> str:
    """Why a layer cannot be sparse whatever its zeros, or nothing.

    `owners` counts the modules of each parameter, by its id.
    """
    layer = modules[name]
    owner, _, attribute = name.rpartition(".")
    if type(layer) is not nn.Linear and not _is_conv1d(layer):
        return f"{layer._get_name()}, a class that may use its weight in another way"
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return (
            f"the weight is a {type(weight).__name__} ({weight.layout}) and no dense parameter: "
            "make it one (after torch.nn.utils.prune: prune.remove)"
        )
    if "forward" in vars(layer) or layer._forward_pre_hooks:
        return "its forward was replaced, or a pre-hook of it may use the weight itself"
    if name and _reads_weight(type(modules[owner]), attribute):
        return f"{type(modules[owner]).__name__} reads the weight itself"
    if owners[id(weight)] > 1:
        return "the weight is shared with another module"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"the weight is {weight.dtype} on {weight.device.type}, not float32 on the CPU"
    if weight.numel() < SMALLEST:
        return f"fewer than {SMALLEST} elements, too small to gain"
    return ""


@lru_cache
def _reads_weight(owner: type, attribute: str) -> bool:
    """Whether a class reads `attribute.weight`, but for its type or to initialise it.

    A reader that is not seen gets the right values from `SparseLinear.weight`, slowly.
    """
    read = re.compile(rf"\b{attribute} weight (?!dtype|device|shape|size|ndim)")
    for cls in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, function in vars(cls).items():
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is not None and not re.search("init|reset", name):
                words = [f"{instruction.argval} " for instruction in dis.get_instructions(code)]
                if read.search("".join(words)):
                    return True
    return False


def gains(rows: int, columns: int, nonzeros: int) -> bool:
    """Whether a matrix is multiplied faster by its nonzeros than as it is, for any tokens."""
    segments = rows * math.ceil(columns / PANEL)
    cost = NONZERO * nonzeros + SEGMENT * segments + ELEMENT * (rows + columns)
    return cost < rows * columns


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
