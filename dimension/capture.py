"""Distances between the samples in the representations of layers, within a memory budget.

The model runs as a chain of stages (`models.stages`): the states of all samples are carried from
stage to stage, and the outputs of a stage's layers live only until their distances are known.
Nothing goes to disk. What is kept of an output is its difference from the first batch's mean:
no distance changes, and products of the differences keep their digits.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dimension.budget import (
    FLOAT32,
    LayerShape,
    Piece,
    Plan,
    StagePlan,
    StageShape,
    live_states,
    segment_tokens,
)
from dimension.twonn import squared_distances
from models.layers import sees_image
from models.stages import Stage
from utils import UserError


@dataclass
class Samples:
    """The model's inputs.

    Attributes:
        tensors: input name to values (n, ...) in memory.
        images: input name to a sequence of n images (3, S, S), which are read when needed.
        counted: (n, L) bool, the text positions that belong to a representation; others are zero.
        batch_size: in samples.
        num_workers: processes that read images.
    """

    tensors: dict[str, Tensor]
    images: dict[str, Sequence[Tensor]]
    counted: Tensor
    batch_size: int = 8
    num_workers: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.counted)

    def loader(self, name: str) -> DataLoader:
        """Batches (B, 3, S, S) of an image input, in order."""
        return DataLoader(self.images[name], self.batch_size, num_workers=self.num_workers)

    def sizes(self) -> dict[str, int]:
        """Bytes of one sample of each input in memory."""
        return {name: values[0].nbytes for name, values in self.tensors.items()}


def counted_positions(attention_mask: Tensor, batch_size: int, keep_padding: bool) -> Tensor:
    """Which text positions belong to a sample's representation.

    Args:
        attention_mask: (n, L), 1 for a text's own tokens.
        batch_size: in samples.
        keep_padding: as the original code, count a batch's padding too, up to its longest text.

    Returns:
        (n, L) bool.
    """
    if not keep_padding:
        return attention_mask.bool()
    longest = [batch.any(0).expand_as(batch) for batch in attention_mask.bool().split(batch_size)]
    return torch.cat(longest)


@torch.no_grad()
def trace_stages(
    stages: Sequence[Stage], layers: dict[str, nn.Module], samples: Samples, device: torch.device
) -> list[StageShape]:
    """Runs one sample through the stages to learn what they compute.

    A layer that several stages call (one vision encoder on two images), belongs to the first.

    Args:
        stages: of a model in eval mode.
        layers: name to module of those of interest.
        samples: of which the first is run.
        device: the model's.
    """
    states = {name: values[:1].to(device) for name, values in samples.tensors.items()}
    states |= {name: images[0][None].to(device) for name, images in samples.images.items()}
    shapes, seen = [], set()
    for stage in stages:
        called: list[LayerShape] = []
        counter = FlopCounterMode(display=False)

        def note(name, counter, called, module, args, output):
            if name not in seen:
                seen.add(name)
                flops = counter.get_total_flops()
                called.append(LayerShape(name, output.shape[1], output.shape[2], flops))

        with ExitStack() as hooks:
            for name, module in layers.items():
                hook = partial(note, name, counter, called)
                hooks.enter_context(module.register_forward_hook(hook))
            # fused attention is not counted everywhere
            with sdpa_kernel(SDPBackend.MATH), counter:
                output = stage.run(*(states[name] for name in stage.reads))
        states[stage.writes] = output
        shape = tuple(output.shape[1:])
        shapes.append(StageShape(stage, tuple(called), shape, counter.get_total_flops()))
    return shapes


class _Captured(Exception):
    """A pass has what it wants; the rest of the stage need not run."""


class Capture:
    """Runs a plan. Iterate over it for `(layer, distances (n, n) float64)`, each layer once."""

    def __init__(
        self,
        plan: Plan,
        layers: dict[str, nn.Module],
        samples: Samples,
        device: torch.device,
        progress: bool = True,
    ):
        """Prepares.

        Args:
            plan: of `make_plan`, for these samples.
            layers: name to module, in a model in eval mode.
            samples: what the model sees.
            device: the model's; states, activations and matrices live there too.
            progress: whether to show a bar, in floating-point operations.
        """
        self.plan, self.layers, self.samples, self.device = plan, layers, samples, device
        self.states = {  # in batches
            name: list(values.to(device).split(samples.batch_size))
            for name, values in samples.tensors.items()
        }
        self.counted = samples.counted.to(device)
        self.arena = torch.empty(0, device=device)
        self.sums: dict[str, Tensor] = {}
        forward = sum(sum(stage.pass_flops()) for stage in plan.stages) * plan.n
        self.bar = tqdm(
            total=forward + plan.product_flops,
            unit="FLOP",
            unit_scale=True,
            smoothing=0.05,
            disable=not progress,
        )

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]:
        """Runs the stages in order."""
        chain = [planned.shape.stage for planned in self.plan.stages]
        with self.bar:
            for index, planned in enumerate(self.plan.stages):
                self.bar.set_description(planned.shape.stage.name)
                self._make_room(planned)
                flops = planned.pass_flops()
                for number, pieces in enumerate(planned.passes):
                    last = number + 1 == len(planned.passes)
                    held = self._views(pieces)
                    self._forward(planned, held, flops[number], planned.advances and last)
                    for piece, numbers in held:
                        yield from self._add(piece, numbers)
                alive = live_states(chain, index + 1)
                self.states = {k: v for k, v in self.states.items() if k in alive}

    def _make_room(self, planned: StagePlan) -> None:
        """Sizes the one buffer of all captured outputs; kept from stage to stage if it fits.

        Memory is slow when it is touched first, so a new one is already large enough for all
        stages, as far as the plan's peak allows.
        """
        plan, numbers = self.plan, self.plan.n + 1
        needed = planned.captured() * numbers
        most = max(stage.captured() for stage in plan.stages) * numbers
        allowed = (plan.peak - plan.fixed - planned.carried) // FLOAT32
        if not needed <= self.arena.numel() <= allowed:
            self.arena = torch.empty(0, device=self.device)  # frees the old one first
            self.arena = torch.empty(min(most, allowed), device=self.device)

    def _views(self, pieces: list[Piece]) -> list[tuple[Piece, Tensor]]:
        """A part (n + 1, tokens, width) of the buffer for each piece; the last row: the centre."""
        held, start = [], 0
        rows = self.plan.n + 1
        for piece in pieces:
            stop = start + piece.numbers * rows
            shape = (rows, piece.stop - piece.start, piece.layer.width)
            held.append((piece, self.arena[start:stop].view(shape)))
            start = stop
        return held

    @torch.no_grad()
    def _forward(
        self, planned: StagePlan, held: list[tuple[Piece, Tensor]], flops: int, advance: bool
    ) -> None:
        """One pass of a stage over all samples: fills the held pieces, and moves the state on."""
        if not held and not advance:
            return
        stage = planned.shape.stage
        written = self.states.setdefault(stage.writes, [])
        rows = slice(0, 0)

        def keep(piece: Piece, numbers: Tensor, final: bool, module, args, output: Tensor) -> None:
            output = output[:, piece.start : piece.stop]
            if not sees_image(piece.layer.name):
                padding = ~self.counted[rows, piece.start : piece.stop, None]
                output = output.masked_fill(padding, 0)
            centre = numbers[-1]
            if rows.start == 0:
                torch.mean(output, 0, out=centre)  # of the first batch: near enough
            torch.sub(output, centre, out=numbers[rows])
            if final:
                raise _Captured

        with ExitStack() as hooks:
            for number, (piece, numbers) in enumerate(held):
                final = not advance and number + 1 == len(held)
                module = self.layers[piece.layer.name]
                hook = partial(keep, piece, numbers, final)
                hooks.enter_context(module.register_forward_hook(hook))
            batches = zip(*(self._batches(name) for name in stage.reads), strict=True)
            for number, batch in enumerate(batches):
                rows = slice(rows.stop, rows.stop + len(batch[0]))
                with suppress(_Captured):
                    written[number : number + 1] = [stage.run(*batch)]
                self.bar.update(flops * len(batch[0]))

    def _batches(self, name: str) -> Iterator[Tensor]:
        """A state or input in batches (B, ...) on the device."""
        if name in self.samples.images:
            for images in self.samples.loader(name):
                yield images.to(self.device)
        else:
            yield from self.states[name]

    def _add(self, piece: Piece, numbers: Tensor) -> Iterator[tuple[LayerShape, Tensor]]:
        """Adds a piece's squared distances; yields the layer when it is complete."""
        layer = piece.layer
        for segment in numbers[:-1].split(segment_tokens(layer, self.plan.n), dim=1):
            try:
                squared = squared_distances(segment.flatten(1), centred=True)
            except ValueError as error:
                raise UserError(f"layer {layer.name}: {error}") from error
            if layer.name in self.sums:
                self.sums[layer.name] += squared
            else:
                self.sums[layer.name] = squared
            self.bar.update(self.plan.n * (self.plan.n + 1) * segment[0].numel())
        if piece.stop == layer.tokens:
            yield layer, self.sums.pop(layer.name).sqrt_()
