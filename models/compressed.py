"""The compressed file of a pruned model: bitmasks and the values that are not zero.

It is safetensors. Its metadata has `format` "bitmask", `format_version` "1", and `shapes`, a JSON
object from the name of each compressed tensor to its shape. Such a tensor NAME is stored as two:

    NAME.bitmask   uint8, ceil(n / 8): bit i % 8 (from the lowest) of byte i // 8 tells whether
                   element i, in row-major order, is stored
    NAME.values    the stored elements in their order

All others are stored as they are.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from utils import UserError, atomic_write

FORMAT, VERSION = "bitmask", "1"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # element size to integer
_ENTRIES = 200  # bytes that a compressed tensor adds to the header, about
_CHUNK = 1 << 18  # elements that are unpacked together, a multiple of 8: they stay in the cache


def _bits(tensor: Tensor) -> Tensor:
    """The elements in row-major order as integers: NumPy knows no bfloat16, and -0.0 is kept."""
    return tensor.detach().cpu().contiguous().view(-1).view(_BITS[tensor.element_size()])


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask (ceil(n / 8),) and the stored elements of a tensor of n elements.

    All whose bits are not zero are stored, so that reading gives the same bits.
    """
    bits = _bits(tensor)
    stored = bits != 0
    mask = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
    return mask, bits[stored].view(tensor.dtype)


def unpack_into(target: Tensor, bitmask: Tensor, values: Tensor) -> None:
    """Writes the tensor that `pack` took apart into `target`, of its shape but any type and device.

    Raises:
        ValueError: the bitmask does not have as many bits as there are values, or has some beyond
            the last element.
    """
    source, packed, n = _bits(values).numpy(), bitmask.numpy(), target.numel()
    if n % 8 and packed[-1] >> n % 8:
        raise ValueError(f"the bitmask has bits beyond the last of {n} elements")
    stored = int(np.bitwise_count(packed).sum())
    if stored != len(source):
        raise ValueError(f"{len(source)} values do not fit the bitmask's {stored}")
    fits = target.device.type == "cpu" and target.is_contiguous()
    direct = fits and target.dtype == values.dtype
    dense = target.detach() if direct else torch.empty(target.shape, dtype=values.dtype)
    flat, first = _bits(dense).numpy(), 0
    for start in range(0, n, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        bits = np.unpackbits(packed[start // 8 :], count=len(chunk), bitorder="little")
        places = np.flatnonzero(bits.view(bool))
        chunk[:] = 0
        chunk[places] = source[first : first + len(places)]
        first += len(places)
    if not direct:
        target.copy_(dense)


def packed_bytes(elements: int, stored: int, size: int) -> float:
    """Bytes of a compressed tensor: a bit an element, `size` bytes for each that is stored."""
    return elements / 8 + stored * size + _ENTRIES


def gains(tensor: Tensor) -> bool:
    """Whether a tensor takes less of a file as a bitmask and values."""
    if not tensor.is_floating_point():
        return False
    elements, size = tensor.numel(), tensor.element_size()
    return packed_bytes(elements, int(_bits(tensor).count_nonzero()), size) < elements * size


def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a compressed file, atomically; `tensors` need not exist all at once."""
    stored, shapes = {}, {}
    for name, tensor in tensors:
        if gains(tensor):
            shapes[name] = list(tensor.shape)
            stored |= zip(parts(name), pack(tensor), strict=True)
        else:
            stored[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": FORMAT, "format_version": VERSION, "shapes": json.dumps(shapes)}
    with atomic_write(path, "wb") as file:
        file.write(save(stored, metadata))


def claims(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file says by its metadata that it is a compressed one."""
    return metadata.get("format") == FORMAT


def parts(name: str) -> tuple[str, str]:
    """Under which names the two parts of a compressed tensor stand."""
    return f"{name}.bitmask", f"{name}.values"


Shapes = dict[str, tuple[int, ...]]  # by tensor name


def shapes(path: Path, metadata: dict[str, str], stored: Shapes) -> Shapes:
    """The compressed tensors of a file, of which `stored` is what safetensors finds in it."""
    version = metadata.get("format_version")
    if version != VERSION:
        raise UserError(
            f"{path} is a compressed file of version {version!r}, this program reads {VERSION!r}: "
            "export it again"
        )
    try:
        found = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        for name, shape in found.items():
            bitmask, values = (stored[part] for part in parts(name))
            if bitmask != (-(-math.prod(shape) // 8),) or len(values) != 1 or name in stored:
                raise ValueError(f"the parts of {name} do not fit its shape {shape}")
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the compressed file {path} is damaged: {error!r}") from error
    return found
