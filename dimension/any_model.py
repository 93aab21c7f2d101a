"""IDs of any model: its forward runs over all samples, as often as the memory budget asks for.

`dimension.capture` does the same, with less repeated work, for models that come as a chain of
stages. Distances, estimates, plan, profile and figures are the same.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import NamedTuple

import compat  # noqa: F401

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from dimension.budget import (
    CapturePlan,
    LayerShape,
    Segment,
    StageShape,
    cut,
    default_budget,
    plan_capture,
)
from dimension.capture import LastOutputKept
from dimension.inputs import (
    Batches,
    call,
    count_samples,
    first_samples,
    padding_mask,
    shorter_texts,
)
from dimension.profile import (
    IDProfile,
    TooFewPoints,
    block_permutations,
    make_remarks,
    measure_layer,
)
from dimension.twonn import ENOUGH_POINTS, FEWEST_POINTS, full_float32, roots_, squared_distances
from models.stages import Stage
from utils import UserError

FORWARD = Stage("the model", call, (), "")  # the only stage; nothing is carried from it
Call = tuple[str, int]  # a layer, and which of its calls in a forward, from 0


class NotBySample(UserError):
    """An output that is no representation of the batch's samples."""


def measure(
    model: nn.Module,
    batches: Iterable,
    layers: str | Iterable[str] | None = None,
    memory_gb: float | None = None,
    n: int = 2000,
    fraction: float = 1.0,
    seed: int = 0,
) -> IDProfile:
    """Measures the intrinsic dimension of what a model's layers represent.

    The model runs in eval mode and without gradients; its modes are restored. A first forward of
    one batch tells which layers run and what they give, and those of its first two samples whether
    the rows of an output are samples, and which are as long as the texts. Then come as few passes
    over all samples as the memory budget allows. The first keeps the last layers and runs to the
    end, to see whether a layer is called more often than in the first batch; the others stop a
    forward at the last output that they keep. The plan is printed.

    A layer's representation of a sample is its output, flattened; of several outputs the first
    tensor. All calls of a layer that a forward calls several times are one representation. Shorter
    samples are padded with zeros, and where batches are mappings with an "attention_mask", the
    padding inside a batch counts as zero in all layers whose outputs are as long as it in every
    batch, and become shorter with it.

    Args:
        model: any, on its device. The first dimension of its inputs is samples, or all batches
            are of one sample.
        batches: iterable anew for each pass, with the same samples in the same order: tensors,
            tuples of the model's arguments, or mappings of them. Moved to the model's device.
        layers: names of modules; or patterns such as "encoder.*", where `*` stands for anything,
            which choose among the usual layers. Those are, if None: all linear layers, and
            transformers' `Conv1D`, which is GPT-2's name for one. The output of torch's
            `MultiheadAttention` stands for its `out_proj`, which is never called.
        memory_gb: for activations and matrices; None: a share of what is free.
        n: samples at most, and 3 at least: the first ones. Memory is planned for `n`, or for as
            many as a list or what else has a length holds; so for a generator give their number.
        fraction: of the points, in (0, 1], see `twonn.estimate_id`.
        seed: of the blocks, see `twonn.block_analysis`, and of what the model draws.

    Returns:
        The IDs of the layers in forward order, by the last call of each. Its remarks name layers
        that are left out since they do not run in the first batch, give no floating-point tensor
        with a row a sample, or the same for nearly all samples.

    Raises:
        UserError: `n` or `fraction` is out of range, no layer is left, a pattern fits none, the
            budget is too small, batches differ between passes or can be iterated only once though
            several passes are needed, a layer is not called as often in each batch, or gives values
            that are not finite; the message names what.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction} is not in (0, 1]")
    modules = choose_layers(model, layers)
    device = next(chain(model.parameters(), model.buffers())).device
    budget = default_budget(device) if memory_gb is None else int(memory_gb * 1e9)
    inputs = Batches(batches, device)
    n = min(n, inputs.most_samples() or n)
    if n < FEWEST_POINTS:
        raise UserError(f"n: an ID needs {FEWEST_POINTS} samples at least, not {n}")
    found = {}
    with prepared(model):
        with seeded(device, seed, 0):
            shape, texts, remarks = trace_forward(model, modules, inputs.first)
        names = list(dict.fromkeys(layer.name for layer in shape.layers))
        latest_first = shape._replace(layers=shape.layers[::-1])
        plan = plan_capture([latest_first], set(names), {}, n, inputs.batch_size, budget)
        print(f"{n} samples, {len(names)} layers\n{plan}", flush=True)
        for sentence in remarks:
            print(sentence, flush=True)
        for name, features, distances in ForwardCapture(model, modules, inputs, plan, texts, seed):
            permutations = block_permutations(len(distances), seed)
            try:
                layer = measure_layer(name, features, distances, fraction, permutations)
            except TooFewPoints as error:
                remarks.append(f"left out: {error}")
                continue
            found[name] = replace(layer, kind="other")
    if not found:
        raise UserError(f"no layer is left to measure ({'; '.join(remarks)})")
    count = len(distances)
    settings = {
        "model": type(model).__name__,
        "nsamples": count,
        "seed": seed,
        "fraction": fraction,
        "enough_points": ENOUGH_POINTS,
        "device": device.type,
    }
    ordered = {name: found[name] for name in names if name in found}
    return IDProfile(settings, ordered, make_remarks(count, ordered) + remarks)


def choose_layers(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """The layers to measure: name to the module whose output stands for it.

    Args:
        model: any.
        layers: see `measure`.

    Raises:
        UserError: nothing has such a name.
    """
    modules = dict(model.named_modules())
    usual = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    chosen = usual if layers is None else []
    for wanted in [layers] if isinstance(layers, str) else layers or []:
        fitting = [name for name in usual if fnmatchcase(name, wanted)]
        if wanted in modules:
            fitting = [wanted]
        if not fitting:
            raise UserError(f"layers: {wanted!r} fits no layer, such as {', '.join(usual[:3])}")
        chosen = chosen + fitting

    def stand_in(name: str) -> nn.Module:
        parent = modules.get(name.rpartition(".")[0])
        attention = isinstance(parent, nn.MultiheadAttention) and name.endswith("out_proj")
        return parent if attention else modules[name]

    return {name: stand_in(name) for name in chosen}


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, float32 proper, and all modules called; then all as it was."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nested tensors in torch's own encoder
    model.eval()
    try:
        with torch.no_grad(), full_float32():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(device: torch.device, *parts: int) -> Iterator[None]:
    """Random numbers on the CPU and a device that depend on `parts`; then those as before."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        torch.default_generator.manual_seed(hash(parts))
        for accelerator in accelerators:
            torch.get_device_module(accelerator).manual_seed(hash(parts))
        yield


def first_tensor(output) -> Tensor | None:
    """The first tensor in what a module returned: a tensor, sequence, mapping or dataclass."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, tuple | list):
        values = output
    else:
        values = vars(output).values() if is_dataclass(output) else ()
    tensors = (first_tensor(value) for value in values)
    return next((tensor for tensor in tensors if tensor is not None), None)


def by_sample(output, samples: int) -> Tensor:
    """A module's output as (B, L, width), all dimensions after the second in one.

    Windows or tokens that stand in the first dimension, k for each sample, become the second.

    Args:
        output: what a module returned.
        samples: B, of the batch.

    Raises:
        NotBySample: it cannot be done; the message says why.
    """
    tensor = first_tensor(output)
    if tensor is None:
        raise NotBySample("its output holds no tensor")
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


class _Output(NamedTuple):
    """What a call of a layer gave."""

    tensor: Tensor | None  # without values
    flops: int  # from the start of the forward to here


def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], batch
) -> tuple[dict[Call, _Output], int]:
    """Runs a batch; the outputs by layer and call, in the order of the calls, and all FLOPs."""
    found: dict[Call, _Output] = {}
    called = dict.fromkeys(modules, 0)
    counter = FlopCounterMode(display=False)

    def note(name: str, module, args, output) -> None:
        tensor = first_tensor(output)
        tensor = None if tensor is None else tensor.to("meta")
        found[name, called[name]] = _Output(tensor, counter.get_total_flops())
        called[name] += 1

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        with counter:
            call(model, batch)
    return found, counter.get_total_flops()


def _outputs_of_few(
    model: nn.Module, modules: dict[str, nn.Module], batch, few: int
) -> dict[Call, _Output]:
    """The outputs for the batch's first samples alone.

    Raises:
        UserError: the model does not take them alone.
    """
    try:
        return _outputs(model, modules, first_samples(batch, few))[0]
    except Exception as error:  # of whatever kind a model finds
        raise UserError(
            f"batches: the model does not take {few} of the first batch's {count_samples(batch)} "
            f"samples alone ({type(error).__name__}: {error}); where the first dimension of its "
            "inputs is not samples, give batches of one sample"
        ) from error


def _as_long_as_texts(
    model: nn.Module, modules: dict[str, nn.Module], batch, outputs: dict[Call, _Output]
) -> set[Call]:
    """Those of the batch's outputs that become shorter when its texts do."""
    if padding_mask(batch) is None:
        return set()
    shorter, _ = _outputs(model, modules, shorter_texts(batch))
    known = {key: output.tensor for key, output in outputs.items() if output.tensor is not None}
    return {key for key in known.keys() & shorter if shorter[key].tensor.shape != known[key].shape}


def trace_forward(
    model: nn.Module, modules: dict[str, nn.Module], batch
) -> tuple[StageShape, set[Call], list[str]]:
    """Runs one batch to learn which layers run, in what order, and what they give.

    Then runs its first samples alone. Rows of an output that are no samples, such as the tokens of
    a layer that works in (L, B, D), do not become fewer with them. Of a batch of one sample every
    row belongs to it. In the end runs these samples with a column of their texts less: where an
    image has as many tokens as a text, this tells their layers apart.

    Args:
        model: as `prepared` leaves it.
        modules: of `choose_layers`.
        batch: on the model's device.

    Returns:
        The forward as a stage; all calls of a layer stand together where its last one is. The
        calls whose outputs are as long as the texts. And sentences for the profile's reader.

    Raises:
        UserError: no layer is left, or the model does not take fewer samples.
    """
    samples = count_samples(batch)
    outputs, flops = _outputs(model, modules, batch)
    few = min(2, samples // 2) or 1
    fewer = outputs if few == samples else _outputs_of_few(model, modules, batch, few)
    calls: dict[str, list[LayerShape]] = {}
    problems: dict[str, str] = {}
    for (name, number), output in outputs.items():
        calls[name] = calls.pop(name, [])  # in the order of the last calls
        try:
            _, tokens, width = by_sample(output.tensor, samples).shape
            _require_rows_of_samples(output.tensor, samples, fewer.get((name, number)), few)
        except NotBySample as error:
            problems.setdefault(name, str(error))
            continue
        shape = LayerShape(name, tokens, width, output.flops // samples, call=number)
        calls[name].append(shape)
    silent = [name for name in modules if name not in calls]
    remarks = [f"left out: {name}, for {why}" for name, why in problems.items()]
    if silent:
        remarks.append(f"left out, for they did not run in the first batch: {', '.join(silent)}")
    shapes = tuple(shape for name in calls if name not in problems for shape in calls[name])
    if not shapes:
        raise UserError(f"no layer is left to measure ({'; '.join(remarks)})")
    try:
        texts = _as_long_as_texts(model, modules, first_samples(batch, few), fewer)
    except Exception as error:  # of whatever kind a model finds
        texts = set(outputs)
        remarks.append(
            f"the model does not take shorter texts ({type(error).__name__}: {error}), so padding "
            "counts as zero in every layer as long as the texts"
        )
    flops = max(1, flops // samples)
    to_the_end = shapes[-1]._replace(flops=flops)  # for the pass that keeps it stops nowhere
    return StageShape(FORWARD, (*shapes[:-1], to_the_end), (0,), flops), texts, remarks


def _require_rows_of_samples(tensor: Tensor, samples: int, fewer: _Output | None, few: int) -> None:
    """Compares an output for some samples with that for a few of them.

    Raises:
        NotBySample: its rows are not as many times fewer as the samples.
    """
    rows, *others = tensor.shape
    then = None if fewer is None or fewer.tensor is None else tuple(fewer.tensor.shape)
    if then is None or (rows * few, others) != (then[0] * samples, [*then[1:]]):
        raise NotBySample(
            f"its output {tuple(tensor.shape)} for {samples} samples is {then or 'nothing'} for "
            f"{few}, so its rows are no samples; give batches of one sample to measure it"
        )


class ForwardCapture:
    """Carries out a plan of one stage, the whole forward.

    Iterating yields each layer once: its name, the elements of a representation, and the distances
    (n, n) float64. Where a batch is longer than all before, more segments are kept, and what no
    longer fits the budget is left to a further pass.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        inputs: Batches,
        plan: CapturePlan,
        texts: set[Call],
        seed: int,
    ):
        """Holds what the plan needs; the model first runs when iteration begins.

        Args:
            model: as `prepared` leaves it, also while this is iterated.
            modules: of `choose_layers`.
            inputs: of which the plan's `n` samples are taken, or fewer if there are fewer.
            plan: of `plan_capture`, for `trace_forward`'s stage with its last layers first.
            texts: of `trace_forward`.
            seed: with a batch's number, of what the model draws for it.

        Raises:
            UserError: the plan needs several passes and the inputs allow one.
        """
        self.model, self.modules, self.inputs, self.plan = model, modules, inputs, plan
        self.texts, self.seed = texts, seed
        (self.stage,) = plan.stages
        self.shapes = {(x.name, x.call): x for x in self.stage.shape.layers}
        self.expected = Counter(name for name, _ in reversed(self.shapes))  # calls in a forward
        self.pending = [segment for kept in self.stage.passes for segment in kept]
        self._require_one_pass(self.stage.passes)
        self.count = 0  # samples, known after the first pass
        self.sums: dict[str, Tensor] = {}
        self.held: dict[Segment, Tensor] = {}  # (n + 1, tokens, width); the last row: centre
        self.bar = tqdm(unit="FLOP", unit_scale=True, smoothing=0.05)

    def __iter__(self) -> Iterator[tuple[str, int, Tensor]]:
        """Runs pass after pass."""
        with self.bar:
            while self.pending:
                self._run()
                self.pending = self.pending[len(self.held) :]
                while self.held:  # earlier layers first: there begins what is not finite
                    name = next(reversed(self.held)).layer.name
                    for segment in [x for x in self.held if x.layer.name == name]:
                        yield from self._add(segment)

    def _require_one_pass(self, passes: list[list[Segment]]) -> None:
        if self.inputs.once and len(passes) > 1:
            raise UserError(
                f"batches can be iterated only once, but {len(passes)} passes are needed within "
                f"{self.plan.budget / 1e9:g} GB: give a list or a DataLoader, or more memory_gb"
            )

    def _hold(self, make) -> None:
        """Makes room for as many of the pending segments, in order, as the budget allows.

        Args:
            make: `torch.empty`, or in the midst of a pass `torch.zeros`: samples that were before
                have no tokens where a new segment begins.
        """
        passes = self.plan.fill(self.stage, self.pending)
        self._require_one_pass(passes)
        self.held = {segment: self.held[segment] for segment in passes[0] if segment in self.held}
        device = self.inputs.device
        for segment in passes[0]:
            if segment not in self.held:
                size = self.plan.n + 1, segment.stop - segment.start, segment.layer.width
                self.held[segment] = make(size, dtype=torch.float32, device=device)
        self.held = {segment: self.held[segment] for segment in passes[0]}  # in order
        self.by_call: dict[Call, list[Segment]] = {}
        for segment in self.held:
            self.by_call.setdefault((segment.layer.name, segment.layer.call), []).append(segment)
        forward = [max(x.layer.flops for x in kept) for kept in passes]
        products = sum(segment.elements for segment in self.pending)
        left = self.plan.n * (sum(forward) + (self.plan.n + 1) * products)
        self.flops = forward[0]  # for one sample
        self.bar.total = self.bar.n + left
        shown = f"{len(passes)} passes left" if passes[1:] else "last pass"
        self.bar.set_description(shown, refresh=False)

    def _run(self) -> None:
        """One pass over all samples."""
        self._hold(torch.empty)
        self.rows = slice(0, 0)
        self.masks: list[tuple[slice, Tensor]] = []
        self.unmasked: set[Call] = set()
        with ExitStack() as hooks:
            for name in self.expected:
                hook = partial(self._keep, name)
                hooks.enter_context(self.modules[name].register_forward_hook(hook))
            for number, batch in enumerate(self.inputs):
                if self.rows.stop == self.plan.n:
                    break
                self._batch(number, batch)
        if self.count not in (0, self.rows.stop):
            raise UserError(
                f"batches: there were {self.count} samples in the first pass and now "
                f"{self.rows.stop}; every pass must see the same"
            )
        self.count = self.rows.stop
        for key in set(self.by_call) & self.texts - self.unmasked:
            self._blank_padding(key)

    def _batch(self, number: int, batch) -> None:
        """Runs the model on a batch; after the first pass, until all that it keeps is kept."""
        self.samples = count_samples(batch)
        stop = self.rows.stop + self.samples
        if stop > self.plan.n == self.inputs.most_samples():
            raise UserError(
                f"batches: batch {number} is larger than the first, from which follow {stop} "
                f"samples where there seemed to be {self.plan.n}: give n, or a list"
            )
        if self.samples > self.inputs.batch_size == 1:
            raise UserError(
                f"batches: batch {number} has {self.samples} samples and the first only one, which "
                "does not tell whose the rows of an output are: give batches of one size"
            )
        stop = min(stop, self.plan.n)
        self.rows = slice(self.rows.stop, stop)
        self.mask = padding_mask(batch)
        if self.mask is not None:
            self.masks.append((self.rows, self.mask[: stop - self.rows.start]))
        self.called = dict.fromkeys(self.modules, 0)
        self.missing = set(self.by_call)
        with suppress(LastOutputKept), seeded(self.inputs.device, self.seed, number):
            call(self.model, batch)
            self._require_as_many_calls(number)
        self.bar.update(self.flops * (stop - self.rows.start))

    def _require_as_many_calls(self, number: int) -> None:
        """After a whole forward: each layer was called as often as in the first batch."""
        others = [name for name, count in self.expected.items() if self.called[name] != count]
        if others:
            raise UserError(
                f"layers {', '.join(others)}: not called as often in batch {number} as in the "
                "first; leave them out (layers)"
            )

    def _keep(self, name: str, module, args, output) -> None:
        """Keeps an output; ends the forward if it was the last one, but not in the first pass."""
        key = name, self.called[name]
        self.called[name] += 1
        if key not in self.missing:
            return
        try:
            values = by_sample(output, self.samples)[: self.rows.stop - self.rows.start]
        except NotBySample as error:
            raise UserError(f"layer {name}: {error}; leave it out (layers)") from None
        _, tokens, width = values.shape
        shape = self.shapes[key]
        if width != shape.width:
            raise UserError(
                f"layer {name}: {width} values at each of {tokens} places, where another batch has "
                f"{shape.width}; samples may differ in the second dimension of an output only"
            )
        if self.mask is None or tokens != self.mask.shape[1]:
            self.unmasked.add(key)
        if tokens > shape.tokens:
            self._lengthen(key, tokens)
        for segment in self.by_call.get(key, ()):
            self._write(self.held[segment], values[:, segment.start : segment.stop])
        self.missing.discard(key)
        if self.count and not self.missing:
            raise LastOutputKept

    def _lengthen(self, key: Call, tokens: int) -> None:
        """Adds segments for tokens that no batch before had; the last held ones may have to go."""
        before = self.shapes[key]
        self.shapes[key] = before._replace(tokens=tokens)
        place = max(i for i, x in enumerate(self.pending) if (x.layer.name, x.layer.call) == key)
        more = cut(self.shapes[key], self.plan.n, first=before.tokens)
        self.pending[place + 1 : place + 1] = more
        self._hold(torch.zeros)
        self.missing &= set(self.by_call)

    def _write(self, kept: Tensor, values: Tensor) -> None:
        """Writes a batch's values (B, L, width), less the centre; missing tokens count as zero."""
        centre, length = kept[-1], values.shape[1]
        if self.rows.start == 0:  # the first batch's mean is near enough to that of all samples
            centre[:length] = values.mean(0, dtype=torch.float32)
            centre[length:] = 0
        torch.sub(values, centre[:length], out=kept[self.rows, :length])
        kept[self.rows, length:] = -centre[length:]

    def _blank_padding(self, key: Call) -> None:
        """Makes zero what a call gave for padding."""
        for segment in self.by_call[key]:
            kept = self.held[segment]
            for rows, mask in self.masks:
                own = mask[:, segment.start : segment.stop, None]
                part = kept[rows, : own.shape[1]]
                part.copy_(torch.where(own, part, -kept[-1, : own.shape[1]]))

    def _add(self, segment: Segment) -> Iterator[tuple[str, int, Tensor]]:
        """Adds a held segment's squared distances; yields the layer when it is complete."""
        name = segment.layer.name
        values = self.held.pop(segment)[: self.count].flatten(1)
        try:
            squared = squared_distances(values, centred=True)
        except UserError as error:
            raise UserError(f"layer {name}: {error}") from error
        self.sums[name] = self.sums[name] + squared if name in self.sums else squared
        self.bar.update(self.count * (self.count + 1) * segment.elements)
        if not any(x.layer.name == name for x in chain(self.held, self.pending)):
            features = sum(x.features for x in self.shapes.values() if x.name == name)
            yield name, features, roots_(self.sums.pop(name))
