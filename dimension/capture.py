"""Distances between the samples in the representations of layers, within a memory budget.

The model runs as a chain of stages (`models.stages`): the states of all samples are carried from
stage to stage, and the outputs of a stage's layers live only until their distances are known.
Nothing goes to disk. What is kept of an output is its difference from the first batch's mean: that
changes no distance, and products of the differences keep their digits.

The same batches give the same bits, whatever the budget and however the layers are shared among
processes that have the same number of threads: every operation is on the same segment, whose size
and alignment do not depend on them.
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
    CapturePlan,
    LayerShape,
    Segment,
    StagePlan,
    StageShape,
    live_states,
)
from dimension.twonn import full_float32, roots_, squared_distances
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

    A layer that several stages call (one vision encoder on two images) belongs to the first.

    Args:
        stages: of a model in eval mode.
        layers: name to module of those that are wanted.
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


class LastOutputKept(BaseException):
    """Leaves a forward early: this pass keeps no output after the present one.

    It is no `Exception`, so that no model takes it for a failure of its own.
    """


class Capture:
    """Carries out a plan: iterating yields each layer once, with its distances (n, n) float64."""

    def __init__(
        self,
        plan: CapturePlan,
        layers: dict[str, nn.Module],
        samples: Samples,
        device: torch.device,
        progress: bool = True,
    ):
        """Holds what the plan needs; the model first runs when iteration begins.

        Args:
            plan: of `plan_capture`, for these samples.
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
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)
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
                for number, segments in enumerate(planned.passes):
                    last = number + 1 == len(planned.passes)
                    held = self._views(segments)
                    self._forward(planned, held, flops[number], planned.advances and last)
                    for segment, values in held:
                        yield from self._add(segment, values)
                alive = live_states(chain, index + 1)
                self.states = {k: v for k, v in self.states.items() if k in alive}

    def _make_room(self, planned: StagePlan) -> None:
        """Sizes the buffer of all captured outputs; one that is large enough stays as it is.

        Memory is slow when it is touched first, so a new buffer is made large enough for all
        stages, as far as the plan's peak allows.
        """
        plan, rows = self.plan, self.plan.n + 1
        needed = planned.captured() * rows
        most = max(stage.captured() for stage in plan.stages) * rows
        allowed = (plan.peak - plan.fixed - planned.carried) // FLOAT32
        if not needed <= self.buffer.numel() <= allowed:
            self.buffer = self.buffer.new_empty(0)  # frees the old one first
            self.buffer = self.buffer.new_empty(min(most, allowed))

    def _views(self, segments: list[Segment]) -> list[tuple[Segment, Tensor]]:
        """A view (n + 1, tokens, width) of the buffer for each segment; the last row: centre."""
        held, start = [], 0
        rows = self.plan.n + 1
        for segment in segments:
            shape = (rows, segment.stop - segment.start, segment.layer.width)
            view = self.buffer[start : start + rows * segment.elements].view(shape)
            held.append((segment, view))
            start += rows * segment.room
        return held

    @torch.no_grad()
    def _forward(
        self, planned: StagePlan, held: list[tuple[Segment, Tensor]], flops: int, advance: bool
    ) -> None:
        """One pass of a stage over all samples.

        Args:
            planned: the stage.
            held: views of the buffer, which are filled.
            flops: floating-point operations for one sample, for the bar.
            advance: whether to move the stage's state on.
        """
        if not held and not advance:
            return
        stage = planned.shape.stage
        written = self.states.setdefault(stage.writes, [])
        rows = slice(0, 0)

        def keep(segment: Segment, values: Tensor, final: bool, module, args, output: Tensor):
            output = output[:, segment.start : segment.stop]
            if not sees_image(segment.layer.name):
                padding = ~self.counted[rows, segment.start : segment.stop, None]
                output = output.masked_fill(padding, 0)
            centre = values[-1]
            if rows.start == 0:  # the first batch's mean is near enough to that of all samples
                torch.mean(output, 0, out=centre)
            torch.sub(output, centre, out=values[rows])
            if final:
                raise LastOutputKept

        with ExitStack() as hooks:
            hooks.enter_context(full_float32())
            for number, (segment, values) in enumerate(held):
                final = not advance and number + 1 == len(held)
                module = self.layers[segment.layer.name]
                hook = partial(keep, segment, values, final)
                hooks.enter_context(module.register_forward_hook(hook))
            batches = zip(*(self._batches(name) for name in stage.reads), strict=True)
            for number, batch in enumerate(batches):
                rows = slice(rows.stop, rows.stop + len(batch[0]))
                with suppress(LastOutputKept):
                    written[number : number + 1] = [stage.run(*batch)]
                self.bar.update(flops * len(batch[0]))

    def _batches(self, name: str) -> Iterator[Tensor]:
        """A state or input in batches (B, ...) on the device."""
        if name in self.samples.images:
            for images in self.samples.loader(name):
                yield images.to(self.device)
        else:
            yield from self.states[name]

    def _add(self, segment: Segment, values: Tensor) -> Iterator[tuple[LayerShape, Tensor]]:
        """Adds a segment's squared distances; yields the layer when it is complete."""
        layer = segment.layer
        try:
            squared = squared_distances(values[:-1].flatten(1), centred=True)
        except UserError as error:
            raise UserError(f"layer {layer.name}: {error}") from error
        if layer.name in self.sums:
            self.sums[layer.name] += squared
        else:
            self.sums[layer.name] = squared
        self.bar.update(self.plan.n * (self.plan.n + 1) * segment.elements)
        if segment.stop == layer.tokens:
            yield layer, roots_(self.sums.pop(layer.name))
