"""The equations: how important each prunable parameter is. All are computed in float32.

Memory traffic bounds them, so they take pieces of large tensors, short enough for a CPU's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils import UserError

PIECE_ON_CPU = 9 << 15  # elements: few enough to stay in the cache and to share among threads
PIECE_ON_ACCELERATOR = 9 << 18  # elements: BLIP base's largest matrix, for each call costs a launch


def sensitivity(p: Tensor, grad: Tensor) -> Tensor:
    """I = |p * grad|: to first order, how much the loss changes if p becomes zero."""
    return (p.float() * grad.float()).abs_()


def average_(ipt: Tensor, p: Tensor, grad: Tensor, position: int) -> None:
    """Takes a step's sensitivity into the running mean of its window, at position l = 1, 2, ...

    ipt <- (ipt * l + I) / (l + 1)
    """
    ipt.lerp_(sensitivity(p, grad), 1 / (position + 1))  # x.lerp_(y, w): x <- (1 - w) * x + w * y


def fold_(
    ipt: Tensor, avg: Tensor, unc: Tensor, p: Tensor, grad: Tensor, beta1: float, beta2: float
) -> None:
    """Folds the finished window into the averages, and begins a window at position 0.

    avg <- beta1 * avg + (1 - beta1) * ipt             importance
    unc <- beta2 * unc + (1 - beta2) * |ipt - avg|     uncertainty, of the new avg
    ipt <- I
    """
    avg.lerp_(ipt, 1 - beta1)
    unc.lerp_((ipt - avg).abs_(), 1 - beta2)
    ipt.copy_(sensitivity(p, grad))


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts contiguous tensors of one shape into short stretches; yields flat views of each."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    length = PIECE_ON_CPU if flat[0].device.type == "cpu" else PIECE_ON_ACCELERATOR
    return zip(*(tensor.split(length) for tensor in flat), strict=True)


class Score:
    """Scores of all prunable parameters; the higher, the more important. See `Pruner`."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        layer_id: dict[str, float] | None = None,
        delta_t: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.95,
    ):
        self.parameters, self.layer_id = parameters, layer_id
        self.delta_t, self.beta1, self.beta2 = delta_t, beta1, beta2
        self.state: dict[str, dict[str, Tensor]] = {}  # averages, by parameter name
        self.first_scored = 1  # the first step at whose end scores are not all zero

    def scores(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """S = |a * b| * ID of a parameter; yields each piece of it and the piece's scores.

        PLATON    a, b = avg, unc
        Taylor    a, b = p, grad
        magnitude a, b = p, 1
        """
        layer_id = 1.0 if self.layer_id is None else self.layer_id[name.rpartition(".")[0]]
        for p, a, b in pieces(self.parameters[name], *self.factors(name)):
            yield p, (a.float() * b.float()).abs_().mul_(layer_id)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces and scores of all parameters."""
        for name in self.parameters:
            yield from self.scores(name)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The tensors a and b of a parameter."""
        raise NotImplementedError

    def update_(self, step: int) -> bool:
        """Takes in the gradients of a step, from 1; returns whether scores may change."""
        return True

    def with_gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter and its gradient."""
        p = self.parameters[name]
        if p.grad is None:
            raise UserError(
                f"{name} has no gradient: call the pruner after backward() and before "
                "zero_grad(), and leave out layers that take no part in the loss"
            )
        return p, p.grad


class Magnitude(Score):
    """The magnitude of a parameter, |p|."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameter and 1."""
        p = self.parameters[name]
        return p, torch.ones((), device=p.device).expand_as(p)


class Taylor(Score):
    """The sensitivity |p * grad| of this step."""

    factors = Score.with_gradient

    def update_(self, step: int) -> bool:
        """Only checks that there are gradients."""
        return all(self.with_gradient(name) for name in self.parameters)


class Platon(Score):
    """Importance times its uncertainty, avg * unc (Zhang et al., ICML 2022, section 3).

    A window of `delta_t` steps averages the sensitivity (`ipt`). The first step of the next window
    folds it into the averages `avg` and `unc`. Between folds the scores stand still.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *arguments, **named):
        super().__init__(parameters, *arguments, **named)
        if not 0 < self.beta1 < 1:  # with 0, avg is ipt at each fold
            raise UserError(
                f"beta1 decays an average: choose 0 < beta1 < 1, got {self.beta1}. With 0 there is "
                "no uncertainty, and all scores are zero"
            )
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 decays an average: choose 0 <= beta2 < 1, got {self.beta2}")
        # the first fold of a window with a step: with delta_t 1, step 1 folds the one before it
        self.first_scored = max(self.delta_t, 2)
        self.state = {
            kind: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
            for kind in ("ipt", "avg", "unc")
        }

    def update_(self, step: int) -> bool:
        """Averages this step's sensitivity; the first step of a window folds the window before."""
        position = step % self.delta_t
        ipt, avg, unc = (self.state[kind] for kind in ("ipt", "avg", "unc"))
        for name in self.parameters:
            p, grad = self.with_gradient(name)
            if position == 0:
                for piece in pieces(ipt[name], avg[name], unc[name], p, grad):
                    fold_(*piece, self.beta1, self.beta2)
            else:
                for piece in pieces(ipt[name], p, grad):
                    average_(*piece, position)
        return position == 0

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Importance and uncertainty."""
        return self.state["avg"][name], self.state["unc"][name]


METHODS = {"PLATON": Platon, "Taylor": Taylor, "Magnitude": Magnitude}
