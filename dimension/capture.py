"""Distances between the samples in the representations of layers, within a memory budget.

The same batches give the same bits, whatever the budget and however layers are shared among
processes with the same number of threads: each operation is on the same segment, whose size and
alignment depend on neither.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import NamedTuple

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
from dimension.twonn import full_float32, has_float64, roots_, squared_distances
from models.layers import sees_image
from models.stages import Stage
from utils import UserError

TEXT = "attention_mask"  # name of the mask of a model's texts
ROWS_ELEMENTS = 2**20  # squared at a time: 4 MB stay in cache


class LayerDistances(NamedTuple):
    """A layer's name, the elements in a sample's representation, distances (n, n) float64."""

    name: str
    features: int
    distances: Tensor


class Accumulator:
    """Distances between samples, from the outputs of layers that arrive batch by batch.

    A pass begins with `hold`; `add` takes the batches' outputs and `finished` ends the pass. Kept
    of an output is its difference from the first batch's mean: no distance changes, and products of
    the differences keep their digits.
    """

    def __init__(self, plan: CapturePlan, device: torch.device, bar: tqdm):
        self.plan, self.bar = plan, bar
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)
        self.held: dict[LayerShape, list[tuple[Segment, Tensor]]] = {}
        self.missing = Counter(segment.layer.name for segment in plan.segments)
        self.sums: dict[str, LayerDistances] = {}
        self.variances: dict[str, Tensor] = {}  # by layer, (channels,) float64

    def hold(self, planned: StagePlan, segments: list[Segment]) -> None:
        """Makes room for the segments of a pass: (n + 1, tokens, width), the last row the centre.

        Memory is slow when first touched, so a new buffer is made large enough for all stages, as
        far as the plan's peak allows.
        """
        plan, rows, start = self.plan, self.plan.n + 1, 0
        needed = planned.captured() * rows
        most = max(stage.captured() for stage in plan.stages) * rows
        allowed = (plan.peak - plan.fixed - planned.carried) // FLOAT32
        self.held = {}
        if not needed <= self.buffer.numel() <= allowed:
            self.buffer = self.buffer.new_empty(0)  # frees the old one first
            self.buffer = self.buffer.new_empty(min(most, allowed))
        for segment in segments:
            shape = (rows, segment.stop - segment.start, segment.layer.width)
            view = self.buffer[start : start + rows * segment.elements].view(shape)
            self.held.setdefault(segment.layer, []).append((segment, view))
            start += rows * segment.room

    def add(self, layer: LayerShape, rows: slice, output: Tensor, padding: Tensor | None) -> None:
        """Takes a batch's output (B, tokens, width); `padding` (B, tokens, 1) bool becomes zero."""
        for segment, kept in self.held[layer]:
            tokens = slice(segment.start, segment.stop)
            values = output[:, tokens]
            if padding is not None:
                values = values.masked_fill(padding[:, tokens], 0)
            centre = kept[-1]
            if rows.start == 0:  # the first batch's mean is near enough to the mean of all samples
                torch.mean(values, 0, dtype=torch.float32, out=centre)
            torch.sub(values, centre, out=kept[rows])

    def drop(self, name: str) -> None:
        """Forgets what is held of a layer."""
        self.held = {layer: kept for layer, kept in self.held.items() if layer.name != name}
        self.sums.pop(name, None)
        self.variances.pop(name, None)

    def finished(self, n: int) -> Iterator[LayerDistances]:
        """Adds up the pass's squared distances; yields the layers that are complete."""
        for segment, kept in [pair for pairs in self.held.values() for pair in pairs]:
            name = segment.layer.name
            try:
                squared = squared_distances(kept[:n].flatten(1), centred=True)
            except UserError as error:
                raise UserError(f"layer {name}: {error}") from error
            _, features, before = self.sums.pop(name, (name, 0, None))
            squared = squared if before is None else before.add_(squared)
            variance = _channel_variances(kept[:n])
            self.variances[name] = self.variances.get(name, 0) + variance
            layer = LayerDistances(name, features + segment.elements, squared)
            self.bar.update(n * (n + 1) * segment.elements)
            self.missing[name] -= 1
            if self.missing[name]:
                self.sums[name] = layer
            else:
                yield layer._replace(distances=roots_(squared))


def _channel_variances(values: Tensor) -> Tensor:
    """Variances over samples, summed over tokens, (width,) float64, of values (n, L, width)."""
    squares = torch.zeros_like(values[0])
    for rows in values.split(max(1, ROWS_ELEMENTS // squares.numel())):  # which stay in cache
        squares += rows.square().sum(0)
    found = squares.div_(len(values)).sub_(values.mean(0).square_())
    return (found if has_float64(found.device) else found.cpu()).sum(0, dtype=torch.float64)


class NotBySample(ValueError):
    """An output that is no representation of the batch's samples."""


def by_sample(output, samples: int) -> Tensor:
    """A module's output as (B, L, width), all dimensions after the second in one.

    The first tensor of the output counts. If its first dimension has k rows for each of the
    `samples`, such as windows or tokens, they become the second. NotBySample says what is wrong.
    """
    tensor = _first_tensor(output)
    if tensor is None or tensor.is_meta:
        raise NotBySample("its output holds no tensor" if tensor is None else "its output is meta")
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        raise NotBySample(f"its output is of {str(tensor.dtype).removeprefix('torch.')}")
    if len(shape) < 2 or tensor.numel() == 0:
        raise NotBySample(f"its output {shape} has fewer than two dimensions, or no values")
    if shape[0] % samples:
        raise NotBySample(f"its output {shape} does not divide into {samples} samples")
    if shape[0] != samples:
        tensor = tensor.unflatten(0, (samples, -1))
    return tensor[:, None] if tensor.dim() == 2 else tensor.flatten(2)


def _first_tensor(output) -> Tensor | None:
    """The first tensor in a tensor, sequence, mapping or dataclass."""
    if isinstance(output, Tensor):
        return output
    values = vars(output).values() if is_dataclass(output) else ()
    if isinstance(output, Mapping | tuple | list):
        values = output.values() if isinstance(output, Mapping) else output
    return next((x for x in map(_first_tensor, values) if x is not None), None)


@dataclass
class Samples:
    """The inputs of a captioner, an NLVR2 model or CLIP: n texts and the images of each.

    `tensors` (n, ...) are in memory; images (3, S, S) are read when needed, in `num_workers`
    processes. `text` (n, L) bool are the positions that belong to a representation.
    """

    tensors: dict[str, Tensor]
    images: dict[str, Sequence[Tensor]]
    text: Tensor
    batch_size: int = 8
    num_workers: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.text)

    def loader(self, name: str, device: torch.device) -> Iterator[Tensor]:
        """Batches (B, 3, S, S) of an image input, in order."""
        images = self.images[name]
        for batch in DataLoader(images, self.batch_size, num_workers=self.num_workers):
            yield batch.to(device)

    def count(self, batch: tuple[Tensor, ...]) -> int:
        """B, the samples in what a stage reads."""
        return len(batch[0])

    def counted(self, mask: str, rows: slice) -> Tensor:
        """(B, L) bool, the text positions that belong to a representation, on the CPU."""
        return self.text[rows]

    def lengths(self, mask: str) -> Tensor:
        """(n,), the tokens of each text."""
        return self.tensors[TEXT].sum(1)


def counted_positions(attention_mask: Tensor, batch_size: int, keep_padding: bool) -> Tensor:
    """Text positions that belong to a sample's representation (n, L) bool: a text's own tokens.

    `keep_padding` counts a batch's padding up to its longest text, too, as the original code does.
    """
    batches = attention_mask.bool().split(batch_size)
    return torch.cat([x.any(0).expand_as(x) if keep_padding else x for x in batches])


@torch.no_grad()
def trace_stages(
    stages: Sequence[Stage], layers: dict[str, nn.Module], samples: Samples, device: torch.device
) -> list[StageShape]:
    """Runs one sample through the stages of a model in eval mode to learn what they compute.

    A layer that several stages call (one vision encoder on two images) belongs to the first.
    """
    states = {name: values[:1].to(device) for name, values in samples.tensors.items()}
    states |= {name: images[0][None].to(device) for name, images in samples.images.items()}
    shapes: list[StageShape] = []
    seen: set[str] = set()
    for stage in stages:
        called: dict[str, LayerShape] = {}
        counter = FlopCounterMode(display=False)

        def note(name, counter, called, module, args, output):
            mask = "" if sees_image(name) else TEXT
            shape = LayerShape(name, *output.shape[1:], counter.get_total_flops(), mask=mask)
            called.setdefault(name, shape)

        with ExitStack() as hooks:
            for name, module in layers.items():
                if name not in seen:
                    hook = partial(note, name, counter, called)
                    hooks.enter_context(module.register_forward_hook(hook))
            # fused attention is not counted everywhere
            with sdpa_kernel(SDPBackend.MATH), counter:
                output = stage.run(*(states[name] for name in stage.reads))
        seen |= called.keys()
        states[stage.writes] = output
        flops = counter.get_total_flops()
        shapes.append(StageShape(stage, tuple(called.values()), tuple(output.shape[1:]), flops))
    return shapes


class LastOutputKept(BaseException):
    """Leaves a forward early; no `Exception`, lest a model take it for a failure of its own."""


class Capture:
    """Carries out a plan: iterating yields each layer once, with its distances.

    States, activations and matrices live on `device`, the model's. The model is in eval mode.
    `left_out` has the reason by layer name, for layers that in some batch are not called as often,
    or give no rows of the same size, as in the batch that was traced. `n`, the number of samples,
    is known after the first pass.
    """

    def __init__(self, plan: CapturePlan, layers: dict, inputs, device, progress: bool = True):
        self.plan, self.layers, self.inputs, self.device = plan, layers, inputs, device
        self.left_out: dict[str, str] = {}
        self.masks = {segment.layer.name: segment.layer.mask for segment in plan.segments}
        self.n = 0
        split = {k: x.to(device).split(inputs.batch_size) for k, x in inputs.tensors.items()}
        self.states = {name: list(batches) for name, batches in split.items()}
        total = plan.n * sum(sum(stage.pass_flops()) for stage in plan.stages)
        total += plan.n * (plan.n + 1) * sum(segment.elements for segment in plan.segments)
        shown = "{l_bar}{bar}| {n:.0f}/{total:.0f} samples [{elapsed}<{remaining}]"
        scale = plan.n / max(1, total)  # FLOPs count, because steps differ; shown as samples
        self.bar = tqdm(total=total, disable=not progress, bar_format=shown, unit_scale=scale)
        self.distances = Accumulator(plan, device, self.bar)

    def __iter__(self) -> Iterator[LayerDistances]:
        """Runs the stages in order."""
        chain = [planned.shape.stage for planned in self.plan.stages]
        with self.bar:
            for index, planned in enumerate(self.plan.stages):
                self.bar.set_description(planned.shape.stage.name)
                flops = planned.pass_flops()
                for number, segments in enumerate(planned.passes):
                    whole = planned.to_the_end and number + 1 == len(planned.passes)
                    wanted = [x for x in segments if x.layer.name not in self.left_out]
                    self.distances.hold(planned, wanted)
                    if wanted or whole:
                        self._forward(planned.shape, flops[number], whole)
                    yield from self.distances.finished(self.n)
                alive = live_states(chain, index + 1)
                self.states = {k: v for k, v in self.states.items() if k in alive}

    def beside(self, name: str, distances: Tensor) -> dict[str, float]:
        """What makes a layer's ID doubtful, as fields of `LayerID`; after it was yielded, once."""
        variances, found = self.distances.variances.pop(name), {}
        if variances.sum() > 0:
            found["largest_channel"] = (variances.max() / variances.sum()).item()
        lengths = self.inputs.lengths(self.masks[name])
        if lengths is not None:
            lengths, pairs = lengths.to(distances.device), self.n * (self.n - 1)
            nearest = distances.clone().fill_diagonal_(math.inf).argmin(1)
            found["same_length"] = (lengths[nearest] == lengths).double().mean().item()
            found["by_chance"] = ((lengths == lengths[:, None]).sum().item() - self.n) / pairs
        return found

    @torch.no_grad()
    def _forward(self, shape: StageShape, flops: int, whole: bool) -> None:
        """One pass over all samples; not `whole`, it ends at the last output that is kept."""
        stage, self.rows, self.whole = shape.stage, slice(0, 0), whole
        written = self.states.setdefault(stage.writes, [])
        expected = Counter(layer.name for layer in shape.layers)
        with ExitStack() as hooks:
            hooks.enter_context(full_float32())
            for name in expected:
                hook = self.layers[name].register_forward_hook(partial(self._keep, name))
                hooks.enter_context(hook)
            sources = [
                self.states[name] if name in self.states else self.inputs.loader(name, self.device)
                for name in stage.reads
            ]
            for self.number, batch in enumerate(zip(*sources, strict=True)):
                self.samples, self.calls = self.inputs.count(batch), Counter()
                stop = min(self.rows.stop + self.samples, self.plan.n)
                self.rows = slice(self.rows.stop, stop)
                self.pending = {(x.name, x.call): x for x in self.distances.held}
                self.padding: dict[str, Tensor | None] = {"": None}
                with suppress(LastOutputKept):
                    written[self.number : self.number + 1] = [stage.run(*batch)]
                    for name, count in expected.items():
                        if self.calls[name] != count:
                            times = f"called {self.calls[name]} times in batch {self.number}"
                            self._leave_out(name, f"{times}, {count} in the first")
                self.bar.update(flops * (stop - self.rows.start))
                if stop == self.plan.n:
                    break
        if self.n not in (0, self.rows.stop):
            raise UserError(
                f"batches: there were {self.n} samples in the first pass and now {self.rows.stop}; "
                "every pass must see the same"
            )
        self.n = self.rows.stop

    def _keep(self, name: str, module, args, output) -> None:
        """Keeps the output of a call; ends the forward if no other is to be kept."""
        layer = self.pending.pop((name, self.calls[name]), None)
        self.calls[name] += 1
        if layer is None:
            return
        try:
            values = by_sample(output, self.samples)
            size, wanted = tuple(values.shape[1:]), (layer.tokens, layer.width)
            if size != wanted:
                raise NotBySample(
                    f"its output has {size} values a sample in batch {self.number} and {wanted} in "
                    "the first; pad all texts to one length, bring all pictures to one size"
                )
            if layer.mask not in self.padding:  # made once for all layers of the batch
                counted = self.inputs.counted(layer.mask, self.rows)
                self.padding[layer.mask] = ~counted[..., None].to(values.device)
            values = values[: self.rows.stop - self.rows.start]
            self.distances.add(layer, self.rows, values, self.padding[layer.mask])
        except NotBySample as error:
            self._leave_out(name, str(error))
        if not self.whole and not self.pending:
            raise LastOutputKept

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out.setdefault(name, why)
        self.distances.drop(name)
        self.pending = {key: layer for key, layer in self.pending.items() if key[0] != name}
