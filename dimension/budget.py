"""The plan of a capture: what it holds and runs within a memory budget.

Where a stage's outputs do not fit together, the stage runs in several passes; all but the last stop
at the last output they keep. A pass keeps segments: runs of a layer's tokens, over which squared
distances add up. Segments, and so the sums, do not depend on the budget.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.processes import free_memory
from models.stages import Stage
from utils import UserError

FLOAT32 = 4  # bytes
ALIGNMENT = 16  # elements: 64 bytes, at which every segment starts; see `Segment.room`
SEGMENT_ELEMENTS = 2**26  # of all samples: 256 MB
WORKSPACE = 2**27  # bytes for chunks of features and their products
MATRICES = 4  # (n, n) in float64: a layer's sum, a segment's term, and what the estimate needs
BATCH_OUTPUTS = 4  # of the widest layer, alive at a time within a stage
SHARE_ON_CPU, SHARE_ON_ACCELERATOR = 0.5, 0.8  # of the free memory


def default_budget(device: torch.device) -> int:
    """Bytes that a capture may hold without --memory_gb: a share of the free memory."""
    share = SHARE_ON_CPU if device.type == "cpu" else SHARE_ON_ACCELERATOR
    return int(share * free_memory(device))


class LayerShape(NamedTuple):
    """A layer of a stage, or one of its calls where a forward calls it several times.

    Its output is (B, tokens, width). `flops` are floating-point operations for one sample, from the
    stage's start to this output. `mask` names the text mask that blanks the output's padding.
    """

    name: str
    tokens: int
    width: int
    flops: int
    call: int = 0
    mask: str = ""

    @property
    def features(self) -> int:
        """Elements in the representation of one sample."""
        return self.tokens * self.width


class StageShape(NamedTuple):
    """What one run of a stage computes: layers, in the order of their last calls, and a new state.

    `state` is the shape for one sample, `flops` are its floating-point operations.
    """

    stage: Stage
    layers: tuple[LayerShape, ...]
    state: tuple[int, ...]
    flops: int


class Segment(NamedTuple):
    """Tokens `start` to `stop` of a layer's output."""

    layer: LayerShape
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Elements in the segment of one sample."""
        return (self.stop - self.start) * self.layer.width

    @property
    def room(self) -> int:
        """The elements rounded up, so that the next segment in a buffer is aligned, too.

        A product's last bits may depend on the alignment of its factors, and what a pass keeps
        beside a segment depends on the budget and on the other processes.
        """
        return -(-self.elements // ALIGNMENT) * ALIGNMENT


@dataclass
class StagePlan:
    """A stage and the passes over all samples that it takes.

    `carried` are the bytes of all states that are alive while it runs. A pass keeps segments; an
    empty one only moves the state on. `to_the_end` says whether the last pass runs to the stage's
    end, because a later stage needs its state, or calls are counted.
    """

    shape: StageShape
    carried: int
    passes: list[list[Segment]]
    to_the_end: bool

    def captured(self) -> int:
        """Elements of one sample kept in the largest pass."""
        return max(sum(segment.room for segment in kept) for kept in self.passes)

    def pass_flops(self) -> list[int]:
        """Floating-point operations of each pass for one sample."""
        flops = [max((x.layer.flops for x in kept), default=0) for kept in self.passes]
        return [*flops[:-1], self.shape.flops] if self.to_the_end else flops


@dataclass
class CapturePlan:
    """The stages up to the last one with a wanted layer, and their passes, for n samples.

    `plain_flops` are those of one sample in a plain forward of the model; `fixed` are the bytes for
    matrices, work space and the outputs of one batch.
    """

    n: int
    budget: int
    plain_flops: int
    fixed: int
    stages: list[StagePlan]

    @property
    def work(self) -> float:
        """Forward work as a multiple of one plain forward."""
        return sum(sum(stage.pass_flops()) for stage in self.stages) / self.plain_flops

    def held(self, stage: StagePlan) -> int:
        """Bytes held while a stage runs."""
        return self.fixed + stage.carried + stage.captured() * FLOAT32 * (self.n + 1)

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return max((self.held(stage) for stage in self.stages), default=0)

    @property
    def segments(self) -> list[Segment]:
        """The segments of all passes."""
        return [x for stage in self.stages for kept in stage.passes for x in kept]

    def fill(self, stage: StagePlan, segments: list[Segment]) -> list[list[Segment]]:
        """Puts a stage's segments into passes, in order; one empty pass if there are none.

        The last passes are full, since they run furthest, and the first holds what is left.
        """
        held, row = self.fixed + stage.carried, FLOAT32 * (self.n + 1)  # which has the centre
        room = (self.budget - held) // row  # elements of one sample
        needed = max((segment.room for segment in segments), default=0)
        if needed > room:
            least = (held + needed * row) / 1e9
            raise UserError(
                f"--memory_gb {self.budget / 1e9:g} is too little: {stage.shape.stage.name} needs "
                f"{least:.2f} GB for {self.n} samples; allow that, or take fewer samples"
            )
        passes, free = [[]], room
        for segment in reversed(segments):
            if segment.room > free:
                passes.insert(0, [])
                free = room
            passes[0].insert(0, segment)
            free -= segment.room
        return passes

    def __str__(self) -> str:
        """A table; stages whose names differ in a number only share a row, with their maximum."""
        kinds: dict[str, list[StagePlan]] = {}
        for stage in self.stages:
            kinds.setdefault(re.sub(r"\d+", "*", stage.shape.stage.name), []).append(stage)
        lines = [f"{'stages':46}{'passes':>8}{'held, GB':>10}"]
        for kind, stages in kinds.items():
            name = f"{len(stages)} x {kind}" if "*" in kind else kind
            passes, held = max(len(s.passes) for s in stages), max(map(self.held, stages))
            lines.append(f"{name:46}{passes:8}{held / 1e9:10.2f}")
        lines.append(
            f"forward work {self.work:.2f} plain forwards; at most {self.peak / 1e9:.2f} of "
            f"{self.budget / 1e9:.2f} GB held"
        )
        return "\n".join(lines)


def plan_capture(
    shapes: list[StageShape], layers: set[str], inputs, n: int, budget: int, to_the_end=False
) -> CapturePlan:
    """Plans the capture of the layers that are named, in all stages of a model.

    `inputs` are `capture.Samples` or `any_model.Batches`; `budget` are the bytes for activations,
    states and matrices together. `to_the_end`: the last stage's last pass runs to its end.
    """
    wanted = [x._replace(layers=tuple(y for y in x.layers if y.name in layers)) for x in shapes]
    while wanted and not wanted[-1].layers:
        wanted.pop()
    widest = max((x.features for shape in wanted for x in shape.layers), default=0)
    outputs = BATCH_OUTPUTS * min(inputs.batch_size, n) * widest * FLOAT32
    fixed = MATRICES * n * n * 8 + WORKSPACE + outputs
    plan = CapturePlan(n, budget, sum(shape.flops for shape in shapes), fixed, [])
    sizes = {name: values[0].nbytes for name, values in inputs.tensors.items()}
    for index, shape in enumerate(wanted):
        sizes[shape.stage.writes] = FLOAT32 * math.prod(shape.state)
        alive = live_states([x.stage for x in wanted], index) | {shape.stage.writes}
        carried = n * sum(size for name, size in sizes.items() if name in alive)
        segments = [segment for layer in shape.layers for segment in cut(layer, n)]
        stage = StagePlan(shape, carried, [segments], to_the_end or index + 1 < len(wanted))
        plan.stages.append(stage)
        stage.passes = plan.fill(stage, segments)
    return plan


def cut(layer: LayerShape, n: int) -> list[Segment]:
    """A layer's output in segments of `SEGMENT_ELEMENTS` elements of n samples, or of one token."""
    step = max(1, SEGMENT_ELEMENTS // (n * layer.width))
    starts = range(0, layer.tokens, step)
    return [Segment(layer, start, min(start + step, layer.tokens)) for start in starts]


def live_states(stages: list[Stage], index: int) -> set[str]:
    """Names of states that a stage or a later one reads before they are written anew."""
    alive: set[str] = set()
    for stage in reversed(stages[index:]):
        alive = (alive - {stage.writes}) | set(stage.reads)
    return alive


def share_layers(shapes: list[StageShape], layers: set[str], processes: int) -> list[set[str]]:
    """Divides layers among processes: a layer goes to the process with the fewest elements so far.

    Every process runs all stages; divided are the further passes, the distances and the estimates.
    """
    shares, loads = [set() for _ in range(processes)], [0] * processes
    for layer in [layer for shape in shapes for layer in shape.layers if layer.name in layers]:
        least = loads.index(min(loads))
        shares[least].add(layer.name)
        loads[least] += layer.features
    return shares
