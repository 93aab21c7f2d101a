"""How important each prunable number is: PLATON, Taylor and magnitude scores.

Memory traffic bounds this work, so everything goes block by block: each operation of a block finds
its operands still in the cache, and a step reads and writes every tensor once.
"""

from collections.abc import Iterator

import torch
from torch import nn

# Numbers that are worked on together. On two cores half a 768 x 768 matrix is quicker than a whole
# or a third; on a GPU, where every operation costs a launch, a block is a whole one.
BLOCK = {"cpu": 9 << 15, "cuda": 9 << 16}
STREAM_BLOCK = 9 << 18  # four 768 x 768 matrices: every block costs its reader some calls


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

    def buffer(self, size: int | None = None) -> torch.Tensor:
        """Uninitialised float32 numbers where the parameters are, room for a block by default."""
        device = next(iter(self.parameters.values())).device
        return torch.empty(size or BLOCK[device.type], device=device)

    def update_(self, step: int) -> bool:
        """Takes in the gradients of an optimizer step, in place.

        Args:
            step: global step, from 1; the optimizer has stepped, the gradients are in place.

        Returns:
            Whether scores may have changed.
        """
        return True

    def operands(self, name: str) -> tuple[torch.Tensor, ...]:
        """The tensors from which `combine` makes the parameter's scores, number by number."""
        raise NotImplementedError

    def combine(self, *operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the unweighted scores of a block into `out`."""
        raise NotImplementedError

    def of_block(self, name: str, operands: tuple, buffer: torch.Tensor) -> torch.Tensor:
        """Weighted scores of a block of a parameter.

        Args:
            name: of the parameter.
            operands: the block of each operand.
            buffer: float32, at least as long as the block; its beginning is overwritten.

        Returns:
            View of the buffer that holds the scores.
        """
        scores = self.combine(*operands, out=buffer[: operands[0].numel()])
        if self.layer_id is not None:
            scores.mul_(self.layer_id[name.rpartition(".")[0]])
        return scores

    def blocks(self, stride: int = 1) -> Iterator[torch.Tensor]:
        """Streams the scores of all parameters, small parameters together.

        Args:
            stride: takes every stride-th score of each parameter.

        Yields:
            At most STREAM_BLOCK scores, float32, which may be changed. The next block overwrites
            them.
        """
        buffer = self.buffer(STREAM_BLOCK)
        end = 0
        for name in self.parameters:
            for operands in split(*self.operands(name), stride=stride):
                if end + operands[0].numel() > STREAM_BLOCK:
                    yield buffer[:end]
                    end = 0
                end += self.of_block(name, operands, buffer[end:]).numel()
        if end:
            yield buffer[:end]

    def first_nan(self) -> str | None:
        """Name of the first parameter that has a score that is NaN."""
        buffer = self.buffer()
        for name in self.parameters:
            for operands in split(*self.operands(name)):
                if self.of_block(name, operands, buffer).isnan().any():
                    return name
        return None


class Magnitude(Score):
    """The magnitude of a weight, |p|."""

    def operands(self, name: str) -> tuple[torch.Tensor, ...]:
        """The parameter."""
        return (self.parameters[name],)

    def combine(self, *operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """|p|."""
        return torch.abs(*operands, out=out)


class Taylor(Score):
    """The first-order change of the loss if a weight were removed, |p * grad| of this step."""

    def operands(self, name: str) -> tuple[torch.Tensor, ...]:
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

    def combine(self, *operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """|p * grad|."""
        return torch.mul(*operands, out=out).abs_()


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
                raise ValueError(f"{name} is the decay of an average: choose 0 <= {beta} < 1")
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
        buffer = self.buffer()
        for name in self.parameters:
            averages = [self.state["ipt"][name]]
            if position == 0:
                averages += [self.state["avg"][name], self.state["unc"][name]]
            for p, grad, ipt, *long_term in split(*super().operands(name), *averages):
                work = buffer[: p.numel()]
                if position == 0:
                    self._fold_(*long_term, ipt, work)
                    super().combine(p, grad, out=ipt)
                else:
                    ipt.lerp_(super().combine(p, grad, out=work), 1 / (position + 1))
        return position == 0

    def _fold_(self, avg: torch.Tensor, unc: torch.Tensor, ipt: torch.Tensor, work: torch.Tensor):
        avg.lerp_(ipt, 1 - self.beta1)
        deviation = torch.sub(ipt, avg, out=work).abs_()  # from the new average
        unc.lerp_(deviation, 1 - self.beta2)

    def operands(self, name: str) -> tuple[torch.Tensor, ...]:
        """Averages of the sensitivity and of its deviation."""
        return self.state["avg"][name], self.state["unc"][name]

    def combine(self, *operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The product avg * unc."""
        return torch.mul(*operands, out=out)
