"""The equations: how important each prunable parameter is.

The functions are the equations of PLATON, Taylor, magnitude and the ID weighting, on tensors of
any device and type, computed in float32. The classes say which tensors a method puts into them and
when. On a CPU, loops in kernels.py compute `average_` and `fold_`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pruners import kernels
from utils import UserError


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


def scores(a: Tensor, b: Tensor, dimension: float) -> Tensor:
    """S = |a * b| * ID.

    PLATON    a, b = avg, unc
    Taylor    a, b = p, grad
    magnitude a, b = p, 1

    The factor ID is the intrinsic dimension of the parameter's layer, or 1 without ID weighting.
    """
    return (a.float() * b.float()).abs_().mul_(dimension)


class Score:
    """Scores of all prunable parameters; the higher, the more important.

    Args:
        parameters: by name `<layer>.weight` or `<layer>.bias`.
        layer_id: intrinsic dimension by layer name (Wang et al., ICML 2024); None weighs all
            layers alike.
        delta_t: steps in PLATON's window.
        beta1: decay of PLATON's `avg`, in (0, 1).
        beta2: decay of PLATON's `unc`, in [0, 1).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        layer_id: dict[str, float] | None,
        delta_t: int,
        beta1: float,
        beta2: float,
    ):
        self.parameters = parameters
        self.layer_id = layer_id
        self.delta_t, self.beta1, self.beta2 = delta_t, beta1, beta2
        self.state: dict[str, dict[str, Tensor]] = {}  # averages, by parameter name

    @staticmethod
    def first_scored(delta_t: int) -> int:
        """The first step at whose end scores are not all zero."""
        return 1

    def update_(self, step: int) -> bool:
        """Takes in the gradients of an optimizer step, in place.

        Args:
            step: global step, from 1; the optimizer has stepped, the gradients are in place.

        Returns:
            Whether scores may have changed.
        """
        return True

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The tensors a and b of a parameter's `scores`."""
        raise NotImplementedError

    def with_gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter and its gradient.

        Raises:
            ValueError: there is no gradient.
        """
        parameter = self.parameters[name]
        if parameter.grad is None:
            raise ValueError(
                f"{name} has no gradient: call the pruner after backward() and before "
                "zero_grad(), and leave out layers that take no part in the loss"
            )
        return parameter, parameter.grad

    def pieces_of(self, name: str, stride: int = 1) -> Iterator[tuple]:
        """Cuts a parameter into pieces (see kernels.py).

        Args:
            name: of the parameter.
            stride: takes every stride-th element.

        Yields:
            The parameter p, both factors of its scores, and the factor ID.
        """
        dimension = 1.0 if self.layer_id is None else self.layer_id[name.rpartition(".")[0]]
        for piece in kernels.cut(self.parameters[name], *self.factors(name), stride=stride):
            yield *piece, dimension

    def pieces(self, stride: int = 1) -> Iterator[tuple]:
        """The pieces of all parameters, as `pieces_of` gives them."""
        for name in self.parameters:
            yield from self.pieces_of(name, stride)

    def stream(self, stride: int = 1) -> Iterator[Tensor]:
        """The scores of all parameters, piece by piece."""
        for _, *arguments in self.pieces(stride):
            yield scores(*arguments)

    def first_nan(self) -> str | None:
        """Name of the first parameter that has a score that is NaN."""
        for name in self.parameters:
            for _, *arguments in self.pieces_of(name):
                if scores(*arguments).isnan().any():
                    return name
        return None


class Magnitude(Score):
    """The magnitude of a parameter, |p|."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameter and 1."""
        parameter = self.parameters[name]
        return parameter, torch.ones((), device=parameter.device).expand_as(parameter)


class Taylor(Score):
    """The sensitivity |p * grad| of this step."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameter and its gradient."""
        return self.with_gradient(name)


class Platon(Score):
    """PLATON: importance times its uncertainty, avg * unc.

    A window of `delta_t` steps averages the sensitivity (`ipt`). The first step of the next window
    folds it into the averages `avg` and `unc`. Between folds the scores stand still. Zhang et al.,
    ICML 2022 (arXiv 2206.12562), section 3.

    Args:
        parameters: as in Score.
        layer_id: as in Score.
        delta_t: as in Score.
        beta1: as in Score.
        beta2: as in Score.

    Raises:
        UserError: a decay is out of its range.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        layer_id: dict[str, float] | None,
        delta_t: int,
        beta1: float,
        beta2: float,
    ):
        super().__init__(parameters, layer_id, delta_t, beta1, beta2)
        if not 0 < beta1 < 1:  # with 0, avg is ipt at each fold
            raise UserError(
                f"beta1 is the decay of an average: choose 0 < --beta1 < 1, got {beta1}. With 0 "
                "there is no uncertainty, and all scores are zero"
            )
        if not 0 <= beta2 < 1:
            raise UserError(
                f"beta2 is the decay of an average: choose 0 <= --beta2 < 1, got {beta2}"
            )
        self.state = {
            kind: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
            for kind in ("ipt", "avg", "unc")
        }

    @staticmethod
    def first_scored(delta_t: int) -> int:
        """The step of the first fold of a window that has a step."""
        return max(delta_t, 2)  # with delta_t 1, step 1 folds the window before the first step

    def update_(self, step: int) -> bool:
        """Averages this step's sensitivity into its window; a window's first folds the last one."""
        position = step % self.delta_t
        folds = position == 0
        kinds = ("ipt", "avg", "unc") if folds else ("ipt",)
        scalars = (self.beta1, self.beta2) if folds else (position,)
        pieces = []
        for name in self.parameters:
            averages = [self.state[kind][name] for kind in kinds]
            for piece in kernels.cut(*averages, *self.with_gradient(name)):
                pieces.append((*piece, *scalars))
        if folds:
            kernels.on_pieces(fold_, kernels.fold_loop, pieces)
        else:
            kernels.on_pieces(average_, kernels.average_loop, pieces)
        return folds

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Importance and uncertainty."""
        return self.state["avg"][name], self.state["unc"][name]


METHODS = {"PLATON": Platon, "Taylor": Taylor, "Magnitude": Magnitude}
