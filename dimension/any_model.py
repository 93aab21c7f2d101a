"""IDs of any model, whose whole forward is the only stage of `dimension.capture`'s chain."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import NamedTuple

import compat  # noqa: F401

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from dimension.budget import LayerShape, StageShape, default_budget, plan_capture
from dimension.capture import Capture, NotBySample, by_sample
from dimension.profile import Estimation, IDProfile, LayerID, TooFewPoints, make_remarks
from dimension.twonn import FEWEST_POINTS, full_float32
from models.stages import Stage
from utils import UserError

# Hugging Face's masks: 1 for a text's own tokens, 0 for padding
MASKS = ("attention_mask", "decoder_attention_mask")
LABELS = "labels"  # whose texts these are, a model alone knows
PRINT_SIZE = 2**16  # elements of a sample's representation that are compared
ALIKE = 0.01  # of two samples' difference, below which two representations are of one sample
Call = tuple[str, int]  # a layer, and the number of its call in a forward, from 0


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

    Forwards of two samples of the first batch, alone and in another batch, show what the layers do;
    then the model runs over all samples as often as the memory budget asks for. The plan is
    printed. The model runs in eval mode and without gradients; its modes are restored.

    A layer is measured if its output has one row a sample, the same one in any batch, or k rows in
    a row for each; and the same number of values in all batches. Every other layer is left out, and
    a remark names it with the reason. A sample's representation is its output, flattened; of
    several outputs the first tensor. All calls of a layer are one representation.

    Args:
        model: any model, on its device.
        batches: iterable anew for each pass, with the same samples in the same order: tensors,
            tuples of the model's arguments, or mappings of them. All tensors have the samples in
            their first dimension, or every batch is one sample; no batch is larger than the first;
            texts are padded to one length. Where mappings hold an "attention_mask", its padding
            counts as zero in layers whose outputs are as long as the texts.
        layers: names of modules, or patterns such as "encoder.*" of linear layers; None: all linear
            layers and transformers' `Conv1D`. The output of torch's `MultiheadAttention` stands for
            its `out_proj`, which is never called.
        memory_gb: budget for activations and matrices; None: a share of the free memory.
        n: number of samples at most, and 3 at least: the first ones. Memory is planned for `n`, or
            for as many as batches with a length hold; so give a generator's number.
        fraction: share of the points, in (0, 1], see `twonn.estimate_id`.
        seed: seed of the blocks, see `twonn.block_analysis`, and of what the model draws.

    Returns:
        The IDs of the layers in forward order, by the last call of each.

    Raises:
        UserError: an argument is out of range, no layer is left, a pattern fits none, the budget is
            too small, batches do not keep to the above, or values are not finite.
    """
    modules = choose_layers(model, layers)
    inputs = Batches(model, batches, n, seed)
    estimation = Estimation(fraction, seed)
    budget = default_budget(inputs.device) if memory_gb is None else int(memory_gb * 1e9)
    found: dict[str, LayerID] = {}
    with prepared(model, inputs.device):
        shape, left_out, remarks = trace_forward(model, modules, inputs)
        names = list(dict.fromkeys(layer.name for layer in shape.layers))
        size = inputs.n, inputs.batch_size
        plan = plan_capture([shape], set(names), {}, *size, budget, to_the_end=True)
        print(f"{inputs.n} samples, {len(names)} layers\n{plan}", flush=True)
        for sentence in [*remarks, *left_out_remarks(left_out)]:
            print(sentence, flush=True)
        inputs.require_passes(len(plan.stages[0].passes))
        capture = Capture(plan, modules, inputs, inputs.device)
        for name, features, distances in capture:
            try:
                layer = estimation.measure(name, features, distances)
                found[name] = replace(layer, kind="other")
            except TooFewPoints as error:
                left_out[name] = str(error)
    left_out |= capture.left_out
    ordered = {name: found[name] for name in names if name in found and name not in left_out}
    remarks += left_out_remarks(left_out)
    if not ordered:
        raise UserError(f"no layer is left to measure ({'; '.join(remarks)})")
    settings = {"model": type(model).__name__, "nsamples": capture.n, "device": inputs.device.type}
    settings |= estimation.settings
    return IDProfile(settings, ordered, make_remarks(capture.n, ordered) + remarks)


def left_out_remarks(left_out: dict[str, str]) -> list[str]:
    """Sentences on the layers that are not measured; one names all layers of the same reason."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return [f"left out: {', '.join(those)}: {why}" for why, those in names.items()]


def choose_layers(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """The layers to measure: name to the module whose output stands for it.

    Args:
        model: any model.
        layers: see `measure`.

    Raises:
        UserError: nothing has such a name, or the model is compiled by TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "model: TorchScript shows no outputs of layers; give the model it is made of"
        )
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
    if not chosen:
        raise UserError("model: it has no linear layer; name modules of it (layers)")

    def stand_in(name: str) -> nn.Module:
        parent = modules.get(name.rpartition(".")[0])
        attention = isinstance(parent, nn.MultiheadAttention) and name.endswith("out_proj")
        return parent if attention else modules[name]

    return {name: stand_in(name) for name in chosen}


@contextmanager
def prepared(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, random numbers for free, all modules called; then all as it was."""
    modes = [(module, module.training) for module in model.modules()]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nested tensors in torch's own encoder
    model.eval().requires_grad_(False)  # torch's count of FLOPs fails at a learned input
    on_cpu = device.type == "cpu"
    forked = [] if on_cpu else range(torch.accelerator.device_count())
    try:
        with (
            torch.no_grad(),
            full_float32(),
            torch.random.fork_rng(forked, device_type=device.type),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode
        for parameter in learned:
            parameter.requires_grad_(True)


def reseed(device: torch.device, *parts: int) -> None:
    """Random numbers that depend on `parts`, on the CPU and, for a model there, on accelerators."""
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seed(hash(parts))


class Batches:
    """A model's batches as `dimension.capture.Inputs`, the same in every pass.

    Attributes:
        device: the model's device.
        first: the first batch, on the device.
        batch_size: the number of its samples.
        n: number of samples to measure with, at most.
        tensors: inputs that stay in memory: none.
    """

    def __init__(self, model: nn.Module, batches: Iterable, n: int, seed: int):
        """Takes the first batch.

        Args:
            model: the model.
            batches: see `measure`.
            n: number of samples at most.
            seed: seed of what the model draws.

        Raises:
            UserError: there is no batch, it is none, or the samples are too few.
        """
        if isinstance(batches, Tensor | Mapping):
            raise UserError(
                f"batches: a {type(batches).__name__} is one batch; give a list of them, "
                "for instance tensor.split(8)"
            )
        self.batches, self.seed, self.tensors = batches, seed, {}
        self.iterator = iter(batches)
        self.once = self.iterator is batches  # a generator
        self.marks: list[int] = []  # checksums of the first pass's batches
        try:
            self.untouched = next(self.iterator)
        except StopIteration:
            raise UserError("batches: there are none to measure with") from None
        self.batch_size = count_samples(self.untouched)
        places = [x.device for x in chain(model.parameters(), model.buffers()) if not x.is_meta]
        places += [x.device for x in _tensors(self.untouched)]
        self.device = places[0]
        self.first = _to(self.untouched, self.device)
        if isinstance(batches, list | tuple):
            n = min(n, sum(count_samples(batch) for batch in batches))
        elif hasattr(batches, "__len__"):
            n = min(n, len(batches) * self.batch_size)
        if n < FEWEST_POINTS:
            raise UserError(f"n: an ID needs {FEWEST_POINTS} samples at least, not {n}")
        self.n = n

    def require_passes(self, passes: int) -> None:
        """Raises UserError if the batches cannot be iterated as often."""
        if self.once and passes > 1:
            raise UserError(
                f"batches can be iterated only once, but {passes} passes are needed within the "
                "memory budget: give a list or a DataLoader, or more memory_gb"
            )

    def loader(self, name: str, device: torch.device) -> Iterator:
        """One pass; the model's random numbers depend on the batch's number alone.

        Raises:
            UserError: a batch is larger than the first, or not what it was in the first pass.
        """
        begun, self.iterator = self.iterator, None
        source = iter(self.batches) if begun is None else chain([self.untouched], begun)
        for number, batch in enumerate(source):
            samples, mark = count_samples(batch), _mark(batch)
            if samples > self.batch_size:
                raise UserError(
                    f"batches: batch {number} has {samples} samples and the first only "
                    f"{self.batch_size}; no batch may be larger than the first"
                )
            if begun is not None:
                self.marks.append(mark)
            elif self.marks[number : number + 1] != [mark]:
                raise UserError(
                    f"batches: batch {number} is not what it was in the first pass; every pass "
                    "must see the same samples in the same order (shuffle=False, no augmentation)"
                )
            self.present = _to(batch, device)
            reseed(device, self.seed, number)
            yield self.present

    def count(self, batch: tuple) -> int:
        """B, of what the stage reads: one batch."""
        return count_samples(batch[0])

    def counted(self, mask: str, rows: slice) -> Tensor | None:
        """(B, L) bool, the tokens that are no padding, of the first samples of the batch."""
        return self.present[mask][: rows.stop - rows.start].bool() if mask else None


def count_samples(batch) -> int:
    """B, the length of a batch's first tensor.

    Raises:
        UserError: it holds no tensor or no sample, a sparse tensor, or tensors of different length.
    """
    tensors = [value for value in _tensors(batch) if value.dim()]
    lengths = list(dict.fromkeys(map(len, tensors)))
    if not lengths or not lengths[0]:
        raise UserError(
            f"batches: {type(batch).__name__} is no batch; give tensors, or tuples or mappings "
            "that hold some, with samples in the first dimension"
        )
    if any(value.layout != torch.strided for value in tensors):
        raise UserError("batches: a tensor is sparse; give dense ones (to_dense())")
    if lengths[0] > 1 and lengths[1:]:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
        raise UserError(
            f"batches: the first dimension of all tensors must be the samples, but here are "
            f"{shapes}; give batches of one sample where that cannot be"
        )
    return lengths[0]


def run_batch(model: nn.Module, batch) -> None:
    """Runs a model on a batch: a tensor, a tuple or list of arguments, or a mapping of them."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _values(batch) -> list:
    """A batch's arguments."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, tuple | list) else [batch]


def _tensors(batch) -> list[Tensor]:
    return [value for value in _values(batch) if isinstance(value, Tensor)]


def _changed(batch, change: Callable):
    """The batch, each of whose arguments is what `change` makes of it."""
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [change(value) for value in batch]
    return change(batch)


def _to(batch, device: torch.device):
    return _changed(batch, lambda x: x.to(device) if isinstance(x, Tensor) else x)


def _take(batch, samples: list[int]):
    """Some samples of a batch, in this order, from tensors and lists with a row for each."""
    count = count_samples(batch)

    def rows(value):
        if isinstance(value, Tensor):
            return value[samples] if value.dim() and len(value) == count else value
        listed = isinstance(value, list | tuple) and len(value) == count
        return [value[i] for i in samples] if listed else value

    return _changed(batch, rows)


def _mark(batch) -> int:
    """A checksum of the batch's tensors."""
    mark = 0
    for value in _tensors(batch):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        mark = zlib.crc32(data, mark)
    return mark


class _Output(NamedTuple):
    """What a call of a layer gave for a few samples.

    Attributes:
        size: tokens and width of a sample's representation.
        flops: floating-point operations of all samples from the start of the forward.
        prints: (B, at most PRINT_SIZE) elements of the representations.
        problem: why the output has no representations; "" where it has.
    """

    size: tuple[int, int] | None
    flops: int
    prints: Tensor | None
    problem: str = ""


def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], batch, device: torch.device, *seed: int
) -> tuple[dict[Call, _Output], int]:
    """Runs a batch; the outputs by layer and call, in the order of the calls, and all FLOPs."""
    found: dict[Call, _Output] = {}
    calls: Counter[str] = Counter()
    counter = FlopCounterMode(display=False)

    def note(name: str, module, args, output) -> None:
        key, flops = (name, calls[name]), counter.get_total_flops()
        calls[name] += 1
        try:
            values = by_sample(output, count_samples(batch)).flatten(1)
        except NotBySample as error:
            found[key] = _Output(None, flops, None, str(error))
            return
        size = tuple(by_sample(output, count_samples(batch)).shape[1:])
        prints = values[:, :: -(-values.shape[1] // PRINT_SIZE)].clone()
        found[key] = _Output(size, flops, prints)

    reseed(device, *seed)
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        with counter:
            run_batch(model, batch)
    return found, counter.get_total_flops()


def trace_forward(
    model: nn.Module, modules: dict[str, nn.Module], inputs: Batches
) -> tuple[StageShape, dict[str, str], list[str]]:
    """Runs two samples to learn which layers run, in what order, and what they give.

    Args:
        model: as `prepared` leaves it.
        modules: layers of `choose_layers`.
        inputs: of which the first batch's samples are run.

    Returns:
        The forward as a stage, in which all calls of a layer stand where its last one is. Layer
        name to reason of those that are left out. Sentences for the profile's reader.

    Raises:
        UserError: no layer is left, or the model does not take the samples.
    """
    batch, samples = inputs.first, min(2, inputs.batch_size)
    pair = _take(batch, [0, 1][:samples])

    def run(batch, seed: int = 0) -> dict[Call, _Output]:
        return _outputs(model, modules, batch, inputs.device, inputs.seed, seed)[0]

    try:
        outputs, flops = _outputs(model, modules, pair, inputs.device, inputs.seed, 0)
        left_out = {name: x.problem for (name, _), x in outputs.items() if x.problem}
        if samples == 2:
            left_out = _rows_of_no_samples(outputs, batch, run) | left_out
    except Exception as error:  # of whatever kind a model finds
        raise UserError(
            f"batches: the model does not take {samples} of the first batch's {inputs.batch_size} "
            f"samples ({type(error).__name__}: {error}); give its arguments, with samples in the "
            "first dimension, or batches of one sample"
        ) from error
    masks, remarks = _masks(outputs, pair, run)
    calls: dict[str, list[LayerShape]] = {}
    for (name, number), output in outputs.items():
        calls[name] = calls.pop(name, [])  # in the order of the last calls
        if name not in left_out:
            mask, done = masks.get((name, number), ""), output.flops // samples
            calls[name].append(LayerShape(name, *output.size, done, number, mask))
    left_out |= dict.fromkeys([x for x in modules if x not in calls], "no call in the first batch")
    shapes = tuple(shape for of_name in calls.values() for shape in of_name)
    if not shapes:
        reasons = "; ".join(left_out_remarks(left_out))
        raise UserError(f"no layer is left to measure ({reasons})")
    stage = Stage("the model", partial(run_batch, model), ("batch",), "")
    return StageShape(stage, shapes, (0,), max(1, flops // samples)), left_out, remarks


def _rows_of_no_samples(
    outputs: dict[Call, _Output], batch, run: Callable[..., dict[Call, _Output]]
) -> dict[str, str]:
    """Layer name to reason, of layers whose rows are not the batch's samples.

    The second sample must have the same representation as the first one of another batch. Where a
    model draws random numbers, it must have the same beside another sample in its own place.

    Args:
        outputs: outputs for the first two samples.
        batch: two samples or more.
        run: from a batch, and the seed of what the model draws, to outputs.
    """
    others = run(_take(batch, [1, 2 % count_samples(batch)]))
    doubtful = [key for key, x in outputs.items() if not _same_sample(x, others.get(key), 0)]
    if doubtful:
        redrawn, beside = run(_take(batch, [0, 1]), seed=-1), run(_take(batch, [1, 1]))
        doubtful = [
            key
            for key in doubtful
            if _same_sample(outputs[key], redrawn.get(key), 1)
            or not _same_sample(outputs[key], beside.get(key), 1)
        ]
    why = "its rows are not the samples, for a sample's row differs in another batch"
    return {name: f"{why}; give batches of one sample" for name, _ in doubtful}


def _same_sample(output: _Output, other: _Output | None, row: int) -> bool:
    """Whether the second sample of `output` is the one in a row of `other`, but for rounding."""
    if other is None or output.size is None or output.size != other.size:
        return False
    first, second, found = (x.double() for x in (*output.prints[:2], other.prints[row]))
    rounding = 16 * torch.finfo(output.prints.dtype).eps * second.norm()
    moved = (found - second).norm()
    return not moved.isfinite() or bool(moved <= max(ALIKE * (second - first).norm(), rounding))


def _masks(
    outputs: dict[Call, _Output], batch, run: Callable[..., dict[Call, _Output]]
) -> tuple[dict[Call, str], list[str]]:
    """The calls whose outputs have padding, with the name of its mask; and sentences.

    These are the outputs that are as long as a mask and become shorter when its texts do.

    Args:
        outputs: outputs for the batch.
        batch: the batch, a mapping if there are masks.
        run: from a batch to outputs.
    """
    found: dict[Call, str] = {}
    remarks = []
    for name in MASKS:
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        length = mask.shape[1]
        as_long = {key: name for key, x in outputs.items() if x.size and x.size[0] == length}
        shorter = None
        for labels in (False, True):  # of the decoder, or of the texts themselves
            with suppress(Exception):  # of whatever kind a model finds
                shorter = run(_shorter(batch, name, labels))
                break
        if shorter is None:
            remarks.append(
                f"the model does not take shorter texts, so padding ({name}) counts as zero in "
                "every layer as long as the texts"
            )
        found |= {
            key: name
            for key in as_long
            if shorter is None or (key in shorter and (shorter[key].size or [0])[0] == length - 1)
        }
    return found, remarks


def _shorter(batch: Mapping, mask: str, labels: bool) -> dict:
    """The batch without the last column of a mask and of what belongs to its tokens.

    These are the arguments of whole numbers, such as ids or boxes, that begin with the mask's
    (B, L), for floating-point ones may belong to as many regions of an image; and embedded tokens.

    Args:
        batch: the batch.
        mask: name of the mask. To the decoder's belong the arguments of a decoder.
        labels: whether labels belong to it, too.
    """

    def of_tokens(name: str, value) -> bool:
        if not isinstance(value, Tensor) or value.shape[:2] != batch[mask].shape:
            return False
        if name.startswith("decoder_") != mask.startswith("decoder_"):
            return False
        if name == LABELS and not labels:
            return False
        return name.endswith(("attention_mask", "inputs_embeds")) or not value.is_floating_point()

    return {name: x[:, :-1] if of_tokens(name, x) else x for name, x in batch.items()}
