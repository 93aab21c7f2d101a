"""When to prune, and how much: the cubic ramp of PLATON."""

from dataclasses import dataclass

from utils import UserError


@dataclass(frozen=True)
class CubicSchedule:
    """The share of the prunable numbers that remains after each optimizer step.

    Steps count from 1 to `total_steps`. Up to `initial_warmup * warmup_steps` nothing is masked.
    During the last `final_warmup * warmup_steps` steps the share is final and every step masks.
    Between them the share falls as a cubic, at first steeply.

    Args:
        total_steps: optimizer steps of the whole run.
        initial_threshold: share that remains at first, in (0, 1].
        final_threshold: share that remains at the end, in (0, initial_threshold].
        initial_warmup: length of the initial phase, in units of `warmup_steps`.
        final_warmup: length of the final phase, in units of `warmup_steps`.
        warmup_steps: optimizer steps in a unit.
        delta_t: optimizer steps between mask events of the cubic phase.
        steps_per_epoch: the cubic phase also masks after the last step of an epoch; None does not.

    Raises:
        ValueError: an argument is out of its range, or the warm-ups are longer than the run.

    The ramp is that of Zhu and Gupta (arXiv 1710.01878), equation 1, with the phases of PLATON
    (Zhang et al., ICML 2022).
    """

    total_steps: int
    initial_threshold: float
    final_threshold: float
    initial_warmup: int
    final_warmup: int
    warmup_steps: int
    delta_t: int = 10
    steps_per_epoch: int | None = None

    def __post_init__(self):
        """Checks the ranges."""
        if not 0 < self.final_threshold <= self.initial_threshold <= 1:
            raise UserError(
                f"the thresholds are shares that remain: choose 0 < final_threshold "
                f"({self.final_threshold}) <= initial_threshold ({self.initial_threshold}) <= 1"
            )
        if min(self.initial_warmup, self.final_warmup, self.warmup_steps) < 0:
            raise UserError("initial_warmup, final_warmup and warmup_steps must not be negative")
        if self.delta_t < 1 or (self.steps_per_epoch or 1) < 1:
            raise UserError("delta_t and steps_per_epoch must be at least 1")
        if self.ramp_start > self.ramp_end:
            raise UserError(
                f"the schedule is longer than the run: ({self.initial_warmup} + "
                f"{self.final_warmup}) x {self.warmup_steps} warm-up steps, but {self.total_steps} "
                "steps in all. Lower warmup_steps or train longer"
            )

    @property
    def ramp_start(self) -> int:
        """The last step of the initial phase."""
        return self.initial_warmup * self.warmup_steps

    @property
    def ramp_end(self) -> int:
        """The last step of the cubic phase."""
        return self.total_steps - self.final_warmup * self.warmup_steps

    def remaining_ratio(self, step: int) -> float:
        """The share that remains after this step, from initial_threshold to final_threshold."""
        if step <= self.ramp_start:
            return self.initial_threshold
        if step > self.ramp_end:
            return self.final_threshold
        to_go = 1 - (step - self.ramp_start) / (self.ramp_end - self.ramp_start)
        return self.final_threshold + (self.initial_threshold - self.final_threshold) * to_go**3

    def in_cubic_phase(self, step: int) -> bool:
        """Whether the share is still falling at this step."""
        return self.ramp_start < step <= self.ramp_end

    def masks_at(self, step: int) -> bool:
        """Whether this step ends in a mask event."""
        if not self.in_cubic_phase(step):
            return step > self.ramp_end
        ends_epoch = self.steps_per_epoch is not None and step % self.steps_per_epoch == 0
        return step % self.delta_t == 0 or ends_epoch
