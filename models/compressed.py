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
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from sparse.compiling import thread_pool
from utils import UserError, atomic_write

FORMAT, VERSION = "bitmask", "1"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # element size to integer
_ENTRIES = 200  # bytes that a compressed tensor adds to the header, about
_WORD = 64  # elements whose bits are looked at together
_LEAST, _CHUNK = 1 << 6, 1 << 12  # words of a bitmask that a thread expands together


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask (ceil(n / 8),) and the stored elements of a tensor of n elements.

    What is stored is decided by bits: a negative zero is, so that `unpack` gives the same bits.
    """
    flat = tensor.detach().cpu().contiguous().flatten()
    stored = flat.view(_BITS[flat.element_size()]) != 0
    return torch.from_numpy(np.packbits(stored.numpy(), bitorder="little")), flat[stored]


def unpack(bitmask: Tensor, values: Tensor, target: Tensor) -> None:
    """Writes the tensor that `pack` took apart into `target`.

    Args:
        bitmask: uint8, of as many bits as `target` has elements, rounded up to bytes.
        values: the stored elements.
        target: changed in place; contiguous, on the CPU, of the values' type.

    Raises:
        ValueError: the bitmask does not have as many bits as there are values, or has some beyond
            the last element.
    """
    from models.bit_loop import expand  # Numba takes half a second to import

    # NumPy knows no bfloat16, but bits of any kind can be put in place
    source = values.view(_BITS[values.element_size()]).numpy()
    flat = target.view(-1).view(_BITS[values.element_size()]).numpy()
    packed = bitmask.numpy()
    if len(flat) % 8 and packed[-1] >> len(flat) % 8:
        raise ValueError(f"the bitmask has bits beyond the last of {len(flat)} elements")
    words = np.zeros(-(-len(flat) // _WORD), np.uint64)
    words.view(np.uint8)[: len(packed)] = packed
    threads = torch.get_num_threads()
    size = min(_CHUNK, max(_LEAST, -(-len(words) // threads)))
    starts = range(0, len(words), size)
    counts = [int(np.bitwise_count(words[start : start + size]).sum()) for start in starts]
    if sum(counts) != len(source):
        raise ValueError(f"{len(source)} values do not fit the bitmask's {sum(counts)}")

    def expand_chunk(start: int, first: int) -> None:
        elements = slice(start * _WORD, (start + size) * _WORD)
        expand(words[start : start + size], source, first, flat[elements])

    spread = thread_pool(threads).map if len(starts) > 1 else map
    for _ in spread(expand_chunk, starts, accumulate(counts, initial=0)):
        pass  # raises here what was raised there


def packed_bytes(elements: int, stored: int, size: int) -> float:
    """Bytes of a compressed tensor: a bit an element, `size` bytes for each that is stored."""
    return elements / 8 + stored * size + _ENTRIES


def gains(tensor: Tensor) -> bool:
    """Whether a tensor takes less of a file as a bitmask and values."""
    elements, size = tensor.numel(), tensor.element_size()
    if not tensor.is_floating_point():
        return False
    stored = int(tensor.detach().contiguous().view(-1).view(_BITS[size]).count_nonzero())
    return packed_bytes(elements, stored, size) < elements * size


def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a compressed file, atomically.

    Args:
        path: of the file.
        tensors: names and tensors, one at a time, so that they need not exist all at once.
    """
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


def shapes(
    path: Path, metadata: dict[str, str], stored: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the compressed tensors of a file.

    Args:
        path: of the file.
        metadata: its metadata.
        stored: names and shapes of what safetensors finds in it.

    Raises:
        UserError: the file is of another version, or its parts do not belong together.
    """
    if metadata.get("format_version") != VERSION:
        raise UserError(
            f"{path} is a compressed file of version {metadata.get('format_version')!r}, this "
            f"program reads {VERSION!r}: export it again"
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


def unpack_into(target: Tensor, bitmask: Tensor, values: Tensor) -> None:
    """As `unpack`, but `target` may be of any type, on any device."""
    fits = target.device.type == "cpu" and target.is_contiguous()
    direct = fits and target.dtype == values.dtype
    dense = target if direct else torch.empty(target.shape, dtype=values.dtype)
    unpack(bitmask, values, dense)
    if not direct:
        target.copy_(dense)
