"""Which samples each process sees, in which order."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from utils import UserError


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from non-negative integers, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class TrainBatchSampler(Sampler):
    """Yields batches of `(index, epoch)` from a permutation that depends on seed and epoch only.

    Global batch g of an epoch is `permutation[g*B*W : (g+1)*B*W]`, of which each of the W processes
    takes its slice of B = `batch_size`. So one process with batch 2B sees what two with B see, and
    a run can resume in the middle of an epoch. An incomplete last global batch is dropped.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        if n < batch_size * world_size:
            raise UserError(
                f"{n} training samples do not fill one batch of {batch_size} on each of "
                f"{world_size} processes: use a smaller batch size or fewer processes"
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the epoch, and how many of its batches the next iteration leaves out."""
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """This process's batches of the epoch, from `start_batch` on."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        permutation = torch.randperm(self.n, generator=generator).tolist()
        for batch in range(self.start_batch, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(index, self.epoch) for index in permutation[first : first + self.batch_size]]

    def __len__(self) -> int:
        """Batches in a whole epoch, those left out by `start_batch` included."""
        return self.n // (self.batch_size * self.world_size)


class EvalSampler(list):
    """The indices of one process's share, in ascending order; shares may differ in length.

    Process r of W takes batches r, r + W, ... of the whole set. So a batch has the same members,
    and its results the same last bits, with any number of processes.
    """

    def __init__(self, n: int, rank: int = 0, world_size: int = 1, batch_size: int = 1):
        firsts = range(rank * batch_size, n, world_size * batch_size)
        super().__init__(i for first in firsts for i in range(first, min(first + batch_size, n)))
