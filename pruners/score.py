"""How important each prunable number is: PLATON, Taylor and magnitude scores."""

from collections.abc import Iterator

import torch
from torch import nn

from pruners import kernels
from utils import UserError

# Numbers of a piece: on the CPU few enough for threads to share the work evenly, on a GPU, where
# calls are dear, BLIP base's largest matrix.
BLOCK = {"cpu": 9 << 15, "cuda": 9 << 18}


def split(*tensors: torch.Tensor, stride: int = 1) -> Iterator[tuple[torch.Tensor, ...]]:
    """Walks through tensors of one shape together.

    Args:
        tensors: contiguous, of the same shape.
        stride: takes every stride-th number.

    Yields:
        Flat views of at most BLOCK numbers, nearly equally long, one of each tensor.
    """
    flat = [tensor.detach().view(-1)[::stride] for tensor in tensors]
    pieces = -(-flat[0].numel() // BLOCK[flat[0].device.type])
    return zip(*(tensor.chunk(pieces) for tensor in flat), strict=True)


class Score:
    """Scores of a set of parameters; the higher, the more important.

    Every score is |a * b| times the layer's weight, where a and b are the parameter's two factors.

    Args:
        parameters: by name `<layer>.weight` or `<layer>.bias`.
        layer_id: intrinsic dimension by layer name, which multiplies every score of the layer
            (Wang et al., ICML 2024); None weighs all layers alike.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], layer_id: dict[str, float] | None = None
    ):
        self.parameters = parameters
        self.layer_id = layer_id
        self.state: dict[str, dict[str, torch.Tensor]] = {}  # averages, by parameter name

    def update_(self, step: int) -> bool:
        """Takes in the gradients of an optimizer step, in place.

        Args:
            step: global step, from 1; the optimizer has stepped, the gradients are in place.

        Returns:
            Whether scores may have changed.
        """
        return True

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The two tensors whose product, number by number, makes the parameter's scores."""
        raise NotImplementedError

    def pieces_of(self, name: str, stride: int = 1) -> Iterator[tuple]:
        """Cuts a parameter into pieces of at most BLOCK numbers.

        Args:
            name: of the parameter.
            stride: takes every stride-th number.

        Yields:
            A piece of the parameter and of both factors, all flat, and the layer's weight.
        """
        weight = 1.0 if self.layer_id is None else self.layer_id[name.rpartition(".")[0]]
        for piece in split(self.parameters[name], *self.factors(name), stride=stride):
            yield *piece, weight

    def pieces(self, stride: int = 1) -> Iterator[tuple]:
        """The pieces of all parameters, as `pieces_of` gives them."""
        for name in self.parameters:
            yield from self.pieces_of(name, stride)

    def blocks(self, stride: int = 1) -> Iterator[torch.Tensor]:
        """Streams the scores of all pieces."""
        for _, *factors in self.pieces(stride):
            yield kernels.scores_of(*factors)

    def first_nan(self) -> str | None:
        """Name of the first parameter that has a score that is NaN."""
        for name in self.parameters:
            for _, *factors in self.pieces_of(name):
                if kernels.scores_of(*factors).isnan().any():
                    return name
        return None


class Magnitude(Score):
    """The magnitude of a weight, |p|."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameter and 1."""
        parameter = self.parameters[name]
        return parameter, torch.ones((), device=parameter.device).expand_as(parameter)


class Taylor(Score):
    """The first-order change of the loss if a weight were removed, |p * grad| of this step."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameter and its gradient.

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


class Platon(Taylor):
    """PLATON: smoothed sensitivity times its uncertainty.

    Within a window of `delta_t` steps the sensitivity |p * grad| is averaged (`ipt`). The first
    step of the next window folds it into the exponential averages of the sensitivity (`avg`) and of
    its deviation from that average (`unc`); the score is their product. Between folds the scores
    stand still. Zhang et al., ICML 2022 (arXiv 2206.12562), section 3.

    Args:
        parameters: as in Score.
        layer_id: as in Score.
        delta_t: steps in a window.
        beta1: decay of `avg`, in [0, 1).
        beta2: decay of `unc`, in [0, 1).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        layer_id: dict[str, float] | None,
        delta_t: int,
        beta1: float,
        beta2: float,
    ):
        super().__init__(parameters, layer_id)
        for name, beta in [("beta1", beta1), ("beta2", beta2)]:
            if not 0 <= beta < 1:
                raise UserError(f"{name} is the decay of an average: choose 0 <= {beta} < 1")
        self.delta_t, self.beta1, self.beta2 = delta_t, beta1, beta2
        self.state = {
            kind: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
            for kind in ("ipt", "avg", "unc")
        }

    def update_(self, step: int) -> bool:
        """Averages this step's sensitivity into the window; the first of a window folds the last.

        Averages are written as interpolations: x + weight * (new - x). Touches p, grad and ipt; a
        folding step also avg and unc.
        """
        position = step % self.delta_t
        if position:
            kernel, kinds, weights = kernels.average, ["ipt"], [1 / (position + 1)]
        else:
            kernel, kinds = kernels.fold, ["ipt", "avg", "unc"]
            weights = [1 - self.beta1, 1 - self.beta2]
        pieces = []
        for name in self.parameters:
            averages = [self.state[kind][name] for kind in kinds]
            pieces += [(*p, *weights) for p in split(*super().factors(name), *averages)]
        kernel(pieces)
        return position == 0

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Averages of the sensitivity and of its deviation."""
        return self.state["avg"][name], self.state["unc"][name]
