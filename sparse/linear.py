"""Linear layers that keep only the nonzeros of their weights, and the rule that chooses them."""

import ctypes
import dis
import inspect
import math
import platform
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sparse.matrix import PANEL, compress, decompress
from sparse.product import TILES, compiled, multiply

# Costs of a product of many tokens, in units of a dense multiply-add. `python -m benchmarks.sparse`
# prints what they are on a machine; these are the largest that were seen.
NONZERO = 2.0
SEGMENT = 8.0  # a row of a panel
ELEMENT = 12.0  # of the input or the output, which are transposed
SMALLEST = 1 << 14  # elements of a weight; below, the call itself takes longer than the product
_METADATA = ("dtype", "device", "shape", "size", "ndim")


class SparseLinear(nn.Module):
    """A linear layer whose weight is mostly zeros: y = x @ weight.T + bias, in float32 on the CPU.

    Of the weight it keeps the nonzeros alone, five bytes each. `state_dict` gives the dense weight
    all the same, and `load_state_dict` takes one, so that checkpoints do not know of it.

    It is for inference: no gradient goes through it. Zeros are left out of the sums, so that an
    infinite or NaN element of the input changes only those outputs whose weight for it is not
    zero; in a dense layer 0 * inf makes NaN of all outputs of that token.
    """

    def __init__(self, layer: nn.Module):
        """Takes over a linear layer or Conv1D: its bias, hooks and mode are the same objects."""
        super().__init__()
        self.__dict__.update(vars(layer))
        self._parameters = {name: p for name, p in layer._parameters.items() if name != "weight"}
        self._buffers, self._non_persistent_buffers_set = dict(layer._buffers), set()
        self.transposed = _is_conv1d(layer)
        self._keep(layer.weight.detach())
        self.out_features = self.starts.shape[1] - 1
        self.in_features = layer.weight.numel() // self.out_features

    def _keep(self, weight: Tensor) -> None:
        parts = compress(weight.T if self.transposed else weight)
        for name, part in parts._asdict().items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies tokens (..., in_features) float32 to (..., out_features).

        Raises:
            RuntimeError: operands are not float32 in the CPU's memory, or do not fit.
        """
        for tensor in (x, self.values, self.values if self.bias is None else self.bias):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise RuntimeError(
                    "a sparse layer multiplies float32 on the CPU, but was given "
                    f"{tensor.dtype} on {tensor.device}: move or convert the model before "
                    "`sparsify_`, and use no autocast"
                )
        return multiply(x, self.in_features, self.starts, self.offsets, self.values, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew: what is written into it is lost."""
        weight = decompress(self.starts, self.offsets, self.values, self.in_features)
        return weight.T if self.transposed else weight

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={len(self.values)}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.contiguous()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, why):
        weight = state_dict.get(f"{prefix}weight")
        expected = (self.out_features, self.in_features)[:: -1 if self.transposed else 1]
        if weight is None:
            missing.append(f"{prefix}weight")
        elif tuple(weight.shape) != expected:
            why.append(f"{prefix}weight has shape {tuple(weight.shape)}, the layer's is {expected}")
        else:
            self._keep(weight.detach().to("cpu", torch.float32))
        others = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, why)


@dataclass
class LayerReport:
    """What became of a linear layer: sparse, or dense and why."""

    elements: int  # of the weight
    nonzeros: int | None  # None where they were not counted, since the layer could not be sparse
    why_dense: str = ""
    before: bool = False  # whether it was sparse already


@dataclass
class SparsifyReport:
    """What `sparsify_` did, by layer name in the model's order."""

    layers: dict[str, LayerReport]
    bytes_before: int  # of all parameters and buffers of the model
    bytes_after: int

    @property
    def sparse(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [name for name, layer in self.layers.items() if not layer.why_dense]

    def __str__(self) -> str:
        """A line of what was gained, and one for each reason why layers stayed dense."""
        changed = [self.layers[name] for name in self.sparse]
        lines = [f"{len(changed)} of {len(self.layers)} linear layers are sparse"]
        if changed:
            share = sum(c.nonzeros for c in changed) / sum(c.elements for c in changed)
            sizes = f"{self.bytes_before / 1e6:.0f} MB to {self.bytes_after / 1e6:.0f} MB"
            before = sum(c.before for c in changed)
            lines[0] += f" ({before} were before)" if before else ""
            lines[0] += (
                f", {share:.1%} of their weights are nonzero: {sizes}. The first call compiles "
                "kernels (about two seconds), which Numba keeps for later runs"
            )
        reasons = Counter(layer.why_dense for layer in self.layers.values() if layer.why_dense)
        lines += [f"{count} dense: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def sparsify_(model: nn.Module) -> SparsifyReport:
    """Makes linear layers `SparseLinear` in place where that makes them faster.

    A layer stays dense where it gains nothing (see `gains`), is not float32 in the CPU's memory,
    shares its weight with another module, or where its class, its owner or whoever replaced its
    `forward` may use the weight itself. All do under autocast, and where Numba has no compiler. If
    any layer becomes sparse, no parameter of the model asks for a gradient any more.

    Args:
        model: with its final weights; its linear layers stay the objects that they are, with their
            hooks, and change their class.

    Returns:
        What became of each layer.
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
            layers[name] = _sparsify_layer_(layer, obstacle or _unfit(name, modules, owners))
    report = SparsifyReport(layers, before, _bytes(model))
    if report.sparse:
        model.requires_grad_(False)
        return_freed_memory()
    return report


def _sparsify_layer_(layer: nn.Module, why_dense: str) -> LayerReport:
    """Makes a layer sparse unless there is a reason against it, or too little to gain."""
    if why_dense:
        conv1d = _is_conv1d(layer)
        elements = layer.weight.numel() if conv1d else layer.in_features * layer.out_features
        return LayerReport(elements, None, why_dense)
    rows, columns = (layer.weight.T if _is_conv1d(layer) else layer.weight).shape
    nonzeros = int(layer.weight.count_nonzero())
    if not gains(rows, columns, nonzeros):
        return LayerReport(rows * columns, nonzeros, "too few zeros to gain")
    sparse = SparseLinear(layer)
    layer.__class__, layer.__dict__ = SparseLinear, vars(sparse)
    return LayerReport(rows * columns, nonzeros)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any library, though none whose weight is a buffer.

    (CLIP's momentum copy has such.) A wrapper around a layer is none, its layer is.
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

    Args:
        name: of the layer.
        modules: of the model, by name.
        owners: how many modules have a parameter, by its id.
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
    if "forward" in vars(layer):
        return "its forward was replaced, by one that may use the weight itself"
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

    Where this does not see it, `SparseLinear.weight` is right but slow.
    """
    for cls in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, function in vars(cls).items():
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is None or "init" in name or "reset" in name:
                continue
            words = [instruction.argval for instruction in dis.get_instructions(code)] + [""]
            for first, second, third in zip(words, words[1:], words[2:], strict=False):
                if (first, second) == (attribute, "weight") and third not in _METADATA:
                    return True
    return False


def gains(rows: int, columns: int, nonzeros: int) -> bool:
    """Whether a matrix is multiplied faster by its nonzeros than as it is, for any tokens."""
    segments = rows * math.ceil(columns / PANEL)
    cost = NONZERO * nonzeros + SEGMENT * segments + ELEMENT * (rows + columns)
    return cost < rows * columns


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def return_freed_memory() -> None:
    """Gives the operating system back what was freed, which glibc may keep."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
