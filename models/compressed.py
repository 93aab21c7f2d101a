"""The compressed file of a pruned model: bitmasks and the values that are not zero.

It is safetensors. Its metadata has `format` "bitmask", `format_version` "1", and `shapes`, a JSON
object from the name of each compressed tensor to its shape. Such a tensor NAME is stored as two,
all others as they are:

    NAME.bitmask   uint8, ceil(n / 8): bit i % 8 (from the lowest) of byte i // 8 tells whether
                   element i, in row-major order, is stored
    NAME.values    the stored elements in their order
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from utils import UserError, atomic_write

FORMAT, VERSION = "bitmask", "1"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # element size to integer
_ENTRIES = 200  # bytes that a compressed tensor adds to the header, about


def _bits(tensor: Tensor) -> Tensor:
    """The elements in row-major order as integers: NumPy has no bfloat16, and -0.0 is kept."""
    return tensor.detach().cpu().contiguous().view(-1).view(_BITS[tensor.element_size()])


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask and the values of a tensor: all elements whose bits are not zero."""
    bits = _bits(tensor)
    stored = bits != 0
    mask = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
    return mask, bits[stored].view(tensor.dtype)


def unpack(
    shape: tuple[int, ...], bitmask: Tensor, values: Tensor, target: Tensor | None = None
) -> Tensor:
    """The tensor that `pack` took apart; `target` itself where it can be written directly.

    Raises:
        ValueError: bitmask and values do not fit each other.
    """
    packed, n = bitmask.numpy(), math.prod(shape)
    if n % 8 and packed[-1] >> n % 8:
        raise ValueError(f"the bitmask has bits beyond the last of {n} elements")
    places = np.flatnonzero(np.unpackbits(packed, count=n, bitorder="little").view(bool))
    if len(places) != len(values):
        raise ValueError(f"{len(values)} values do not fit the bitmask's {len(places)}")
    direct = target is not None and target.is_contiguous() and target.device.type == "cpu"
    if direct and target.dtype == values.dtype and target.shape == shape:
        dense = target.detach().zero_()  # fresh memory and a copy would take as long again
    else:
        dense = torch.zeros(shape, dtype=values.dtype)
    _bits(dense).numpy()[places] = _bits(values).numpy()
    return dense


def packed_bytes(elements: int, stored: int, size: int) -> float:
    """Bytes of a compressed tensor: a bit an element, `size` bytes for each that is stored."""
    return elements / 8 + stored * size + _ENTRIES


def _parts(name: str) -> tuple[str, str]:
    return f"{name}.bitmask", f"{name}.values"


def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a compressed file atomically, packing tensor by tensor."""
    stored, shapes = {}, {}
    for name, tensor in tensors:
        nonzeros = int(_bits(tensor).count_nonzero())
        if packed_bytes(tensor.numel(), nonzeros, tensor.element_size()) < tensor.nbytes:
            shapes[name] = list(tensor.shape)
            stored |= zip(_parts(name), pack(tensor), strict=True)
        else:
            stored[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": FORMAT, "format_version": VERSION, "shapes": json.dumps(shapes)}
    with atomic_write(path, "wb") as file:
        file.write(save(stored, metadata))


class Packed(NamedTuple):
    """A tensor of a compressed file, which is unpacked where it is wanted."""

    where: str  # file and name, for messages
    shape: tuple[int, ...]
    bitmask: Tensor
    values: Tensor

    def dense(self, target: Tensor | None = None) -> Tensor:
        """The tensor, in `target` where that fits; a UserError if the file is damaged."""
        try:
            return unpack(self.shape, self.bitmask, self.values, target)
        except ValueError as error:
            raise UserError(f"the compressed file {self.where}: {error}") from error


def joined(
    path: Path, metadata: dict[str, str], weights: dict[str, Tensor]
) -> dict[str, Tensor | Packed]:
    """The tensors of a safetensors file; where it is a compressed one, two parts become one."""
    if metadata.get("format") != FORMAT:
        return weights
    if (version := metadata.get("format_version")) != VERSION:
        raise UserError(
            f"{path} is a compressed file of version {version!r}, this program reads {VERSION!r}: "
            "export it again"
        )
    try:
        for name, shape in json.loads(metadata["shapes"]).items():
            bitmask, values = (weights.pop(part) for part in _parts(name))
            if bitmask.shape != (-(-math.prod(shape) // 8),) or values.ndim != 1 or name in weights:
                raise ValueError(f"the parts of {name} do not fit its shape {shape}")
            weights[name] = Packed(f"{path} is damaged: {name}", tuple(shape), bitmask, values)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the compressed file {path} is damaged: {error!r}") from error
    return weights
