"""Zeroing the weights of low score, and proof that all processes zeroed the same."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from pruners import kernels
from pruners.score import Score

BLOCK = 9 << 15  # numbers of a checksum that stay in the cache


def mask_(score: Score, threshold: float) -> None:
    """Zeroes, in place, every number whose score is strictly below a threshold.

    One pass over the parameters and the factors of their scores.
    """
    kernels.mask([(*piece, threshold) for piece in score.pieces()])


def mask_checksums(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """One number a tensor that tells where its zeros are.

    Every position of a block has a small random weight; the checksum adds up those of the zeros.

    Returns:
        (tensors,) float64, integers.
    """
    parameters = list(parameters)
    device = parameters[0].device
    generator = torch.Generator().manual_seed(0)
    # Integers up to 28, so that the sum over a block is below 2^24 and exact in float32.
    weights = torch.randint(1, 29, (BLOCK,), generator=generator).to(device, torch.float32)
    buffer = torch.empty(BLOCK, device=device)
    checksums = torch.zeros(len(parameters), dtype=torch.float64, device=device)
    for checksum, parameter in zip(checksums, parameters, strict=True):
        for i, block in enumerate(parameter.detach().view(-1).split(BLOCK)):
            zeros = torch.eq(block, 0, out=buffer[: block.numel()])
            checksum.add_(zeros.dot(weights[: block.numel()]), alpha=i + 1)
    return checksums


def check_masks_equal(parameters: dict[str, torch.Tensor]) -> None:
    """Stops every process if their masks differ. All processes must call it.

    Raises:
        RuntimeError: names the first parameter that differs; on all processes alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    lowest = mask_checksums(parameters.values())
    highest = lowest.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    differ = [
        name
        for name, same in zip(parameters, (lowest == highest).tolist(), strict=True)
        if not same
    ]
    if differ:
        raise RuntimeError(
            f"the processes have pruned different weights ({len(differ)} parameters, first "
            f"{differ[0]}): they no longer train one model. Resume from an earlier checkpoint, and "
            "check that all processes run on the same kind of device with the same libraries"
        )
