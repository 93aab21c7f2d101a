"""What the capture of activations will hold and run, within a memory budget.

A stage (`models.stages.Stage`) is run over all samples; its layers' outputs are kept, turned into
distances and dropped. Where they do not fit together, the stage runs in several passes; all but
the last of them stop at the last output they keep. A layer that does not fit alone is cut by
tokens into pieces of whole segments. Segments do not depend on the budget, and so neither do the
sums over them.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from models.stages import Stage
from utils import UserError

FLOAT32 = 4  # bytes
SEGMENT_NUMBERS = 2**26  # of all samples, whose distances are computed at a time: 256 MB
WORKSPACE = 2**27  # bytes for chunks of features and their products
MATRICES = 4  # (n, n) in float64: a layer's sum, a segment's term, and what the estimate needs
BATCH_OUTPUTS = 4  # of the widest layer, alive at a time within a stage


class LayerShape(NamedTuple):
    """A layer of a stage.

    Attributes:
        name: of the module.
        tokens: L of its output (B, L, width).
        width: numbers of a token.
        flops: of one sample, from the stage's start to this output.
    """

    name: str
    tokens: int
    width: int
    flops: int


class StageShape(NamedTuple):
    """What one run of a stage computes.

    Attributes:
        stage: which.
        layers: to be captured, in the order in which it calls them.
        state: shape of one sample's new state.
        flops: of one sample.
    """

    stage: Stage
    layers: tuple[LayerShape, ...]
    state: tuple[int, ...]
    flops: int


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a layer's output."""

    layer: LayerShape
    start: int
    stop: int

    @property
    def numbers(self) -> int:
        """Of one sample."""
        return (self.stop - self.start) * self.layer.width


@dataclass
class StagePlan:
    """A stage and the passes over all samples that it takes.

    Attributes:
        shape: the stage.
        carried: bytes of all states that are alive while it runs.
        passes: what each keeps; empty passes only move the states on.
        advances: whether a later stage needs its state, so that the last pass runs to the end.
    """

    shape: StageShape
    carried: int
    passes: list[list[Piece]]
    advances: bool

    def captured(self) -> int:
        """Numbers of one sample kept in the largest pass."""
        return max(sum(piece.numbers for piece in kept) for kept in self.passes)

    def pass_flops(self) -> list[int]:
        """Of one sample, for each pass."""
        flops = [kept[-1].layer.flops if kept else 0 for kept in self.passes]
        return [*flops[:-1], self.shape.flops] if self.advances else flops


@dataclass
class Plan:
    """All that is to be done for some layers.

    Attributes:
        n: samples.
        budget: bytes.
        plain_flops: of one sample in one forward of the model.
        fixed: bytes for matrices, work space and the outputs of one batch.
        stages: those up to the last one with a layer of interest.
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
        return self.fixed + stage.carried + stage.captured() * (self.n + 1) * FLOAT32

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return max((self.held(stage) for stage in self.stages), default=0)

    @property
    def product_flops(self) -> int:
        """Of all distances."""
        pieces = [piece for stage in self.stages for kept in stage.passes for piece in kept]
        return self.n * (self.n + 1) * sum(piece.numbers for piece in pieces)

    def __str__(self) -> str:
        """A table; stages that differ in a number of their name only, share a row."""
        rows = [
            (re.sub(r"\d+", "*", s.shape.stage.name), len(s.passes), round(self.held(s) / 1e9, 2))
            for s in self.stages
        ]
        lines = [f"{'stages':46}{'passes':>8}{'held, GB':>10}"]
        for (name, passes, held), group in groupby(sorted(rows, key=rows.index)):
            count = f"{len(list(group))} x " if "*" in name else ""
            lines.append(f"{count + name:46}{passes:8}{held:10.2f}")
        lines.append(
            f"forward work {self.work:.2f} plain forwards; at most {self.peak / 1e9:.2f} of "
            f"{self.budget / 1e9:.2f} GB held"
        )
        return "\n".join(lines)


def make_plan(
    shapes: list[StageShape],
    layers: set[str],
    inputs: dict[str, int],
    n: int,
    batch_size: int,
    budget: int,
) -> Plan:
    """Plans the capture of some layers.

    Args:
        shapes: the model's stages, in order.
        layers: names of those to capture.
        inputs: bytes of one sample of each input that stays in memory.
        n: samples.
        batch_size: in samples.
        budget: bytes for activations, states and matrices together.

    Raises:
        ValueError: the budget is too small for one segment of a layer.
    """
    wanted = [
        shape._replace(layers=tuple(layer for layer in shape.layers if layer.name in layers))
        for shape in shapes
    ]
    plain_flops = sum(shape.flops for shape in shapes)
    while wanted and not wanted[-1].layers:
        wanted.pop()
    widest = max((x.tokens * x.width for shape in wanted for x in shape.layers), default=0)
    outputs = BATCH_OUTPUTS * min(batch_size, n) * widest * FLOAT32
    fixed = MATRICES * n * n * 8 + WORKSPACE + outputs
    stages = []
    for index, shape in enumerate(wanted):
        carried = n * _carried(wanted, index, inputs)
        room = (budget - fixed - carried) // ((n + 1) * FLOAT32)  # samples and their centre
        needed = max((segment_tokens(x, n) * x.width for x in shape.layers), default=0)
        if needed > room:
            least = (fixed + carried + needed * (n + 1) * FLOAT32) / 1e9
            raise UserError(
                f"--memory_gb {budget / 1e9:g} is too little: {shape.stage.name} needs "
                f"{least:.2f} GB for {n} samples; allow that, or take fewer samples"
            )
        passes = _fill(shape.layers, n, room)
        stages.append(StagePlan(shape, carried, passes, advances=index + 1 < len(wanted)))
    return Plan(n, budget, plain_flops, fixed, stages)


def segment_tokens(layer: LayerShape, n: int) -> int:
    """Tokens of a layer whose distances are computed at a time."""
    return min(layer.tokens, max(1, SEGMENT_NUMBERS // (n * layer.width)))


def _carried(shapes: list[StageShape], index: int, inputs: dict[str, int]) -> int:
    """Bytes of one sample's states that exist while a stage runs, its new state included."""
    states = dict(inputs)
    for shape in shapes[: index + 1]:
        size = FLOAT32
        for extent in shape.state:
            size *= extent
        states[shape.stage.writes] = size
    alive = live_states([shape.stage for shape in shapes], index) | {shapes[index].stage.writes}
    return sum(size for name, size in states.items() if name in alive)


def live_states(stages: list[Stage], index: int) -> set[str]:
    """Names of states that a stage or a later one reads before they are written anew."""
    alive: set[str] = set()
    for stage in reversed(stages[index:]):
        alive = (alive - {stage.writes}) | set(stage.reads)
    return alive


def _fill(layers: tuple[LayerShape, ...], n: int, room: int) -> list[list[Piece]]:
    """Puts layers, or runs of their segments, into passes in order; one empty pass if none."""
    passes: list[list[Piece]] = [[]]
    free = room  # numbers of one sample
    for layer in layers:
        step, start = segment_tokens(layer, n), 0
        while start < layer.tokens:
            segments = free // (step * layer.width)
            rest = (layer.tokens - start) * layer.width
            if segments == 0 and rest > free:
                passes.append([])
                free = room
                continue
            stop = layer.tokens if rest <= free else start + segments * step
            piece = Piece(layer, start, stop)
            passes[-1].append(piece)
            free -= piece.numbers
            start = stop
    return passes


def share_layers(shapes: list[StageShape], layers: set[str], processes: int) -> list[set[str]]:
    """Divides layers among processes, each in turn to the one with the fewest numbers so far.

    Every process runs all stages; passes beyond each stage's first, distances and estimates are
    what is divided.
    """
    shares: list[set[str]] = [set() for _ in range(processes)]
    loads = [0] * processes
    for layer in (layer for shape in shapes for layer in shape.layers if layer.name in layers):
        least = loads.index(min(loads))
        shares[least].add(layer.name)
        loads[least] += layer.tokens * layer.width
    return shares
