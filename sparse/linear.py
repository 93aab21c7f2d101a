"""Linear layers that keep only the nonzeros of their weights, and the rule that chooses them."""

import ctypes
import math
import platform
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse.product import (
    PANEL,
    TILES,
    SparseMatrix,
    compiled,
    compress,
    decompress,
    multiply,
)

# Costs of a product of many tokens, in units of a dense multiply-add. `python -m benchmarks.sparse`
# prints what they are on a machine; these are the largest that were seen.
NONZERO = 2.0
SEGMENT = 8.0  # a row of a panel
ELEMENT = 12.0  # of the input or the output, which are transposed
SMALLEST = 1 << 14  # elements of a weight; below, the call itself takes longer than the product


class SparseLinear(nn.Module):
    """A linear layer whose weight is mostly zeros: y = x @ weight.T + bias, in float32 on the CPU.

    Of the weight it keeps the nonzeros alone, five bytes each. `state_dict` gives the dense weight
    all the same, and `load_state_dict` takes one, so that checkpoints do not know of it.

    It is for inference: no gradient goes through it. Zeros are left out of the sums, so that an
    infinite or NaN element of the input changes only those outputs whose weight for it is not
    zero; in a dense layer 0 * inf makes NaN of all outputs of that token.
    """

    def __init__(self, layer: nn.Linear):
        """Takes the nonzeros and the bias of a layer, which stays as it is."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)
        for name, part in compress(layer.weight.detach())._asdict().items():
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies tokens (..., in_features) float32 to (..., out_features).

        Raises:
            RuntimeError: a gradient is asked for, or operands are not float32 in the CPU's memory.
        """
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(
                "a sparse layer has no gradient: train the model before `sparsify_`, and call "
                "`eval()` or use `torch.no_grad()` after it"
            )
        sparse = self.matrix()
        for tensor in (x, sparse.values):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise RuntimeError(
                    "a sparse layer multiplies float32 on the CPU, but was given "
                    f"{tensor.dtype} on {tensor.device}: move or convert the model before "
                    "`sparsify_`, and use no autocast"
                )
        y = multiply(x.reshape(-1, self.in_features).contiguous(), sparse, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def matrix(self) -> SparseMatrix:
        """The nonzeros of the weight."""
        return SparseMatrix(self.starts, self.offsets, self.values)

    @property
    def weight(self) -> Tensor:
        """What libraries ask of a layer: its weight's shape and type. `dense_weight` has values."""
        size = self.out_features, self.in_features
        return torch.empty(size, dtype=self.values.dtype, device="meta")

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) with its zeros, made anew."""
        return decompress(self.matrix(), self.in_features)

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={len(self.values)}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.dense_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, why):
        weight = state_dict.get(f"{prefix}weight")
        expected = (self.out_features, self.in_features)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif tuple(weight.shape) != expected:
            why.append(f"{prefix}weight has shape {tuple(weight.shape)}, the layer's is {expected}")
        else:
            self.starts, self.offsets, self.values = compress(weight.detach().float())
        others = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, why)


@dataclass
class LayerReport:
    """What became of a linear layer: sparse, or dense and why."""

    elements: int  # of the weight
    nonzeros: int | None  # None where they were not counted, since the layer could not be sparse
    why_dense: str = ""


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
            lines[0] += (
                f", {share:.1%} of their weights are nonzero: {sizes}. The first call compiles "
                "kernels (about two seconds), which Numba keeps for later runs"
            )
        reasons = Counter(layer.why_dense for layer in self.layers.values() if layer.why_dense)
        lines += [f"{count} dense: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def sparsify_(model: nn.Module) -> SparsifyReport:
    """Replaces linear layers in place by `SparseLinear` where that makes them faster.

    A layer stays dense where it gains nothing (see `gains`), is not float32 in the CPU's memory,
    shares its weight with another module, or is of a class derived from nn.Linear, whose owner may
    use the weight itself. All do under autocast, and where Numba has no compiler. If any layer
    becomes sparse, no parameter of the model asks for a gradient any more.

    Args:
        model: with its final weights; its linear layers are replaced, not the model if it is one.

    Returns:
        What became of each layer.
    """
    before = _bytes(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    obstacle = _obstacle()
    layers = {}
    # Names, not modules: a layer that nobody refers to is freed as soon as it is replaced.
    names = [name for name, m in model.named_modules() if name and _is_linear(m)]
    for name in names:
        layer = model.get_submodule(name)
        why_dense = obstacle or _unfit(layer, shared=owners[id(layer.weight)] > 1)
        nonzeros = None if why_dense else int(layer.weight.count_nonzero())
        if not why_dense and not gains(*layer.weight.shape, nonzeros):
            why_dense = "too few zeros to gain"
        layers[name] = LayerReport(layer.weight.numel(), nonzeros, why_dense)
        if not why_dense:
            model.set_submodule(name, SparseLinear(layer).train(layer.training))
    report = SparsifyReport(layers, before, _bytes(model))
    if report.sparse:
        model.requires_grad_(False)
        return_freed_memory()
    return report


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer with parameters; those of CLIP's momentum copy are buffers."""
    return isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter)


def _obstacle() -> str:
    """Why no layer at all can be sparse, or nothing."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, sparse layers multiply float32 alone"
    try:
        compiled(TILES[0])
    except Exception as error:  # a missing package, an unknown processor, a broken linker
        return f"Numba compiles no kernel here ({type(error).__name__}: {error})"
    return ""


def _unfit(layer: nn.Linear, shared: bool) -> str:
    """Why a layer cannot be sparse whatever its zeros, or nothing."""
    weight = layer.weight
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__}, whose weight its owner may use directly"
    if shared:
        return "the weight is shared with another module"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"the weight is {weight.dtype} on {weight.device.type}, not float32 on the CPU"
    if weight.numel() < SMALLEST:
        return f"fewer than {SMALLEST} elements, too small to gain"
    return ""


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
