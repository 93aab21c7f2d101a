"""How long a run is, and the learning rate of its epochs. All steps are optimizer steps."""

import argparse
import math
from dataclasses import dataclass

from utils import UserError


@dataclass(frozen=True)
class StepPlan:
    """The run's length, in optimizer steps."""

    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch, from 0; `total_steps` may end the last one early."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)


def plan_steps(
    args: argparse.Namespace, samples: int, samples_per_step: int, max_epoch: int
) -> StepPlan:
    """Counts the steps.

    Args:
        args: `max_steps` and `warmup_steps` are read.
        samples: in the training set.
        samples_per_step: over all processes and accumulated batches.
        max_epoch: epochs, unless `max_steps` is set.
    """
    steps_per_epoch = samples // samples_per_step
    if steps_per_epoch < 1:
        raise UserError(
            f"an optimizer step takes {samples_per_step} samples (batch size x processes x "
            f"accumulation), but the training set has {samples}: lower one of them"
        )
    total = args.max_steps or max_epoch * steps_per_epoch
    warmup = steps_per_epoch if args.warmup_steps is None else args.warmup_steps
    return StepPlan(steps_per_epoch, math.ceil(total / steps_per_epoch), total, warmup)


def learning_rate(epoch: int, epochs: int, init_lr: float, min_lr: float) -> float:
    """Cosine from `init_lr` at epoch 0 towards `min_lr` at epoch `epochs`, constant in an epoch."""
    return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
