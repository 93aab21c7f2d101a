"""When to prune, and how much: the cubic ramp of PLATON."""

from dataclasses import dataclass

from utils import UserError


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """The share of the prunable parameters that remains after each optimizer step, from 1.

    In the initial phase nothing is masked. In the final one the share is final and every step
    masks. Between them the share falls as a cubic, at first steeply.

    Raises:
        UserError: a value is out of its range, or the run would not end at `final_threshold`.

    Source: Zhu and Gupta (arXiv 1710.01878), equation 1, with the phases of PLATON (Zhang et al.,
    ICML 2022).
    """

    total_steps: int  # optimizer steps of the whole run
    initial_threshold: float = 1.0  # share that remains at first, in (0, 1]
    final_threshold: float  # share at the end, in (0, initial_threshold]; 1: any run, no pruning
    initial_warmup: int  # length of the initial phase, in units of `warmup_steps`
    final_warmup: int  # length of the final phase, in units of `warmup_steps`
    warmup_steps: int  # optimizer steps in a unit
    delta_t: int = 10  # steps between mask events of the cubic phase
    steps_per_epoch: int | None = None  # given, the cubic phase also masks at the ends of epochs
    first_scored: int = 1  # the first step at whose end there are scores

    def __post_init__(self):
        """Checks the ranges, and that the run ends at the final threshold."""
        if not 0 < self.final_threshold <= self.initial_threshold <= 1:
            raise UserError(
                "thresholds are fractions that remain, 0 < final <= initial <= 1; got "
                f"final_threshold {self.final_threshold}, "
                f"initial_threshold {self.initial_threshold}"
            )
        least = {"initial_warmup": 0, "final_warmup": 0, "warmup_steps": 0, "delta_t": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.final_threshold == 1:
            return
        longer = "take more steps (total_steps)"
        warmups = (self.initial_warmup + self.final_warmup) * self.warmup_steps
        if warmups >= self.total_steps:
            raise UserError(
                f"the pruning schedule is longer than the run: ({self.initial_warmup} initial + "
                f"{self.final_warmup} final) x {self.warmup_steps} warm-up steps = {warmups}, but "
                f"the run has {self.total_steps} steps, and some must lie between for the share "
                f"that remains to fall: lower warmup_steps or {longer}"
            )
        if self.total_steps < self.first_scored:
            raise UserError(
                f"nothing would be pruned: all scores are zero until step {self.first_scored}, "
                f"where the first window of delta_t {self.delta_t} steps ends, but the run has "
                f"{self.total_steps} steps: lower delta_t or {longer}"
            )
        if not self.masks_at(self.total_steps):
            raise UserError(
                f"the run would end above final_threshold {self.final_threshold}: without a "
                f"final phase, its last step {self.total_steps} masks only if it is a multiple of "
                f"delta_t {self.delta_t} or ends an epoch: choose final_warmup and warmup_steps of "
                "at least 1, or such a number of total_steps"
            )

    @property
    def ramp(self) -> tuple[int, int]:
        """The last step of the initial phase, and of the cubic phase."""
        final = self.final_warmup * self.warmup_steps
        return self.initial_warmup * self.warmup_steps, self.total_steps - final

    def remaining_ratio(self, step: int) -> float:
        """The share that remains after this step, from initial_threshold to final_threshold."""
        start, end = self.ramp
        if step <= start:
            return self.initial_threshold
        if step > end:
            return self.final_threshold
        to_go = 1 - (step - start) / (end - start)
        return self.final_threshold + (self.initial_threshold - self.final_threshold) * to_go**3

    def in_cubic_phase(self, step: int) -> bool:
        """Whether the share is still falling at this step."""
        return self.ramp[0] < step <= self.ramp[1]

    def masks_at(self, step: int) -> bool:
        """Whether this step ends in a mask event."""
        if not self.in_cubic_phase(step):
            return step > self.ramp[1]
        ends_epoch = self.steps_per_epoch is not None and step % self.steps_per_epoch == 0
        return step % self.delta_t == 0 or ends_epoch
