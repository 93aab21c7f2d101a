"""Zeroing the parameters of low score, and proof that all processes zeroed the same."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from pruners.score import PIECE_ON_CPU


def mask_(scores: Iterable[tuple[Tensor, Tensor]], threshold: float) -> None:
    """Zeroes in place every parameter whose score is below a threshold; overwrites the scores."""
    for p, score in scores:
        bits = getattr(torch, f"int{8 * p.element_size()}")  # infinity times 0. would be NaN
        p.view(bits).mul_(score.ge_(threshold).to(bits))  # times 1 or 0: all zeros are positive


def mask_checksums(parameters: Iterable[Tensor]) -> Tensor:
    """A number (tensors,) int64 for each tensor that depends on where its zeros are.

    The zeros' positions within a piece have random weights, times 1 in the first piece, 2 in the
    second, and so on.
    """
    parameters = list(parameters)
    device, length = parameters[0].device, PIECE_ON_CPU
    heaviest = (1 << 24) // length  # so that float32 holds a piece's sum exactly
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, heaviest + 1, (length,), generator=generator)
    weights = weights.to(device, torch.float32)
    buffer = torch.empty_like(weights)
    checksums = torch.zeros(len(parameters), dtype=torch.int64, device=device)
    for checksum, parameter in zip(checksums, parameters, strict=True):
        for i, piece in enumerate(parameter.detach().view(-1).split(length)):
            zeros = torch.eq(piece, 0, out=buffer[: piece.numel()])
            checksum.add_(zeros.dot(weights[: piece.numel()]).long(), alpha=i + 1)
    return checksums


def check_masks_equal(parameters: dict[str, Tensor]) -> None:
    """Raises RuntimeError on all processes, which must all call it, if their masks differ."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    lowest = mask_checksums(parameters.values())
    highest = lowest.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    equal = dict(zip(parameters, (lowest == highest).tolist(), strict=True))
    if differ := [name for name, same in equal.items() if not same]:
        raise RuntimeError(
            f"the processes have pruned different weights ({len(differ)} parameters, first "
            f"{differ[0]}): they no longer train one model. Resume from an earlier checkpoint, and "
            "check that all processes run on the same kind of device with the same libraries"
        )
