"""Iterative pruning during training: after every optimizer step score, and at times mask."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pruners.layers import check_profile, choose_layers, tied
from pruners.mask import check_masks_equal, mask_
from pruners.schedule import CubicSchedule
from pruners.score import METHODS
from pruners.sparsity import off_target, sparsity_report
from pruners.threshold import kth_smallest
from utils import UserError


class NonFiniteScores(FloatingPointError):
    """A score is NaN: weights or gradients became infinite or NaN. The message names where."""


class Pruner:
    """Prunes weights and biases of linear layers by one global threshold, during a whole run.

    Weights are not frozen: a later update may revive a pruned one. Layers that share their weights
    are left out, with a warning that names them.

    Args:
        model: on its final device; plain or in DistributedDataParallel. Changed in place.
        layers: names of its linear layers to prune; None takes `models.prunable_layers`.
        method: score by "PLATON", "Taylor" or "Magnitude".
        delta_t: steps in PLATON's window, and between mask events.
        beta1: decay of PLATON's importance, in (0, 1).
        beta2: decay of PLATON's uncertainty, in [0, 1).
        layer_id: intrinsic dimension by layer name, which multiplies scores; None: unweighted.
        schedule: `total_steps`, `final_threshold` and the other fields of `CubicSchedule`.

    Source: PLATON (Zhang et al., ICML 2022), and the ID weighting of Wang et al. (ICML 2024).
    Unlike the original code, all averages last for the whole run, and IDs go by layer name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None = None,
        method: str = "PLATON",
        *,
        delta_t: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.95,
        layer_id: dict[str, float] | None = None,
        **schedule,
    ):
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        self.method = method
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        self.layers, self.left_out = choose_layers(model, layers)
        if layer_id is not None:
            check_profile(layer_id, self.layers, self.left_out)
        self.parameters = {
            f"{layer}.{kind}": parameter
            for layer, module in self.layers.items()
            for kind, parameter in module.named_parameters()
        }
        self.numel = sum(parameter.numel() for parameter in self.parameters.values())
        self.score = METHODS[method](self.parameters, layer_id, delta_t, beta1, beta2)
        first = self.score.first_scored
        self.schedule = CubicSchedule(delta_t=delta_t, first_scored=first, **schedule)
        self.last_step = 0  # the newest that `step` was called with
        self.tied = 0  # scores equal to the threshold of the last mask event
        self._found: tuple[int, tuple[float, int]] | None = None  # rank, threshold of these scores
        self._order = _Order(self.parameters.values())
        if self.left_out:
            warnings.warn(tied(self.left_out), stacklevel=2)

    def step(self, global_step: int) -> tuple[float, float | None]:
        """Updates the scores and, where the schedule says so, masks the parameters in place.

        After the last step a warning says if the share of zeros is not the one asked for.

        Args:
            global_step: from 1. The optimizer has stepped; the gradients are still in place.

        Returns:
            The share of the parameters that should remain; and the score below which parameters
            were zeroed, None without a mask event.

        Raises:
            UserError: a gradient is missing, all are zero, the optimizer has not stepped, or
                `global_step` has not risen.
            NonFiniteScores: a score is NaN.
            RuntimeError: the masks of the processes differ.
        """
        if global_step <= self.last_step:
            rule = "global_step counts the optimizer steps of all epochs from 1"
            raise UserError(f"{rule}, got {global_step} after {self.last_step}")
        self.last_step = global_step
        if self.score.update_(global_step):
            self._found = None
        ratio, threshold = self.schedule.remaining_ratio(global_step), None
        rank = int(self.numel * (1 - ratio))
        if rank >= 1 and self.schedule.masks_at(global_step):
            self._order.check()
            threshold, self.tied = self.threshold(rank)
            if self.tied == self.numel and global_step >= self.schedule.first_scored:
                raise UserError(
                    f"nothing can be pruned: all scores are {threshold:g}, because gradients or "
                    "weights are zero. Call the pruner after backward() and before zero_grad()"
                )
            mask_(self.score, threshold)
            if self.schedule.in_cubic_phase(global_step):
                self.check_masks_equal()
        if global_step == self.schedule.total_steps and (note := self.note()):
            warnings.warn(note, stacklevel=2)
        self._order.see("after step")
        return ratio, threshold

    def threshold(self, rank: int) -> tuple[float, int]:
        """The rank-th smallest score, and how many equal it; found anew when scores change."""
        if self._found is None or self._found[0] != rank:
            found = kth_smallest(self.score, rank)
            if math.isnan(found[0]):
                scores = ((name, s) for name in self.parameters for _, s in self.score.scores(name))
                broken = next(name for name, piece in scores if piece.isnan().any())
                raise NonFiniteScores(
                    f"the scores of {broken} are not numbers: its weights or gradients became "
                    "infinite or NaN. Resume from an earlier checkpoint with a lower learning rate"
                )
            self._found = rank, found
        return self._found[1]

    def check_masks_equal(self) -> None:
        """Raises RuntimeError if the masks of the processes differ; call it before a checkpoint."""
        check_masks_equal(self.parameters)

    def report(self) -> dict:
        """The zeros of the layers, as `sparsity_report` gives them, and which were left out."""
        return sparsity_report(self.layers) | {"left_out": list(self.left_out)}

    def note(self) -> str | None:
        """What to say if the share of zeros is not the final one (`off_target`)."""
        zeros = self.numel - int(sum(p.count_nonzero() for p in self.parameters.values()))
        counts = {"prunable": self.numel, "pruned": zeros}
        return off_target(counts, self.schedule.final_threshold, self.tied)

    def state_dict(self) -> dict:
        """All that the rest of the run depends on; the averages are not copied."""
        return {"method": self.method, "score": self.score.state, "tied": self.tied}

    def load_state_dict(self, state: dict) -> None:
        """Continues from a state, copied to the parameters' devices."""
        if state["method"] != self.method:
            raise UserError(
                f"the state is of method {state['method']}: resume with it, not with {self.method}"
            )
        for kind, own in self.score.state.items():
            saved = state["score"][kind]
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
                raise UserError(
                    f"the pruner's state {kind!r} is of another model: names or shapes differ, "
                    f"for instance {sorted(saved.keys() ^ own.keys())[:3]}"
                )
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.tied = state.get("tied", 0)  # not in states of earlier versions
        self.last_step, self._found = 0, None


class _Order:
    """Refuses a pruner that steps before the optimizer, which then revives what was zeroed.

    In that order a parameter changes between the pruner's step and the next backward(), and not
    between backward() and the pruner's step. The smallest one is watched, to the first check.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        trained = (p for p in parameters if p.requires_grad)
        self.watched = min(trained, key=Tensor.numel, default=None)
        self.seen: dict[str, Tensor] = {}  # its values, by moment
        if self.watched is not None:
            see = self.watched.register_post_accumulate_grad_hook
            self.hook = see(lambda _: self.see("at backward"))

    def see(self, moment: str) -> None:
        if self.watched is not None:
            self.seen[moment] = self.watched.detach().clone()

    def check(self) -> None:
        if self.watched is None or len(self.seen) < 2:
            return
        at_backward = self.seen["at backward"]
        changed_before = not torch.equal(self.seen["after step"], at_backward)
        if changed_before and torch.equal(at_backward, self.watched):
            raise UserError(
                "the optimizer has not stepped since backward(): call pruner.step after "
                "optimizer.step() and before zero_grad(), else the optimizer revives what is zeroed"
            )
        self.hook.remove()
        self.watched = None
