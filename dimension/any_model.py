"""IDs of any model, whose whole forward is the only stage of `dimension.capture`'s chain."""

import inspect
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
PRINT_SIZE = 2**16  # elements of a sample's representation that are compared
ALIKE = 0.01  # share of two samples' difference up to which two rows are one sample's
Call = tuple[str, int]  # a layer, and the number of its call in a forward, from 0


def measure(
    model: nn.Module,
    batches: Iterable,
    layers: str | Iterable[str] | None = None,
    memory_gb: float | None = None,
    n: int = 2000,
    fraction: float = 1.0,
    seed: int = 0,
    estimator: str = "twonn",
) -> IDProfile:
    """Measures the intrinsic dimension of what a model's layers represent.

    Two samples, alone and in another batch, show what the layers do. Then the model runs over all
    samples as often as the memory budget asks, by a plan that is printed, in eval mode and without
    gradients; its modes are restored.

    A layer is measured if its output has one row a sample, or k neighbouring rows for each, which
    do not depend on the other samples, and the same number of values in all batches. A remark names
    every other layer, with the reason. A sample's representation is the first tensor of the output,
    flattened; all calls of a layer are one representation.

    Args:
        model: any model, on its device.
        batches: list, DataLoader or the like, which is read again in each pass: tensors, tuples of
            the model's arguments, or mappings of them. All tensors have the samples in their first
            dimension, or every batch is one sample; no batch is larger than the first; texts are
            padded to one length. The padding of an "attention_mask" counts as zero in layers whose
            outputs are as long as the texts.
        layers: names of modules, or patterns such as "encoder.*" for linear layers; None: all
            linear layers and transformers' `Conv1D`. The output of torch's `MultiheadAttention`
            stands for its `out_proj`, which is never called.
        memory_gb: budget for activations and matrices; None: a share of the free memory.
        n: number of samples at most, and 3 at least: the first ones.
        fraction: share of the points, in (0, 1], as in `estimate_id`.
        seed: seed of the blocks, and of what the model draws.
        estimator: "twonn", "gride" or "mle".

    Returns:
        The IDs of the layers in the order of their last calls.

    Raises:
        UserError: an argument is out of range, no layer is left, a pattern fits none, the budget is
            too small, batches do not keep to the above, or values are not finite.
    """
    modules = choose_layers(model, layers)
    estimation, inputs = Estimation(fraction, seed, estimator), Batches(model, batches, n, seed)
    budget = default_budget(inputs.device) if memory_gb is None else int(memory_gb * 1e9)
    found: dict[str, LayerID] = {}
    with prepared(model, inputs.device):
        shape, left_out, remarks, changed = trace_forward(model, modules, inputs)
        names = list(dict.fromkeys(layer.name for layer in shape.layers))
        plan = plan_capture([shape], set(names), inputs, inputs.n, budget, to_the_end=True)
        print(f"{inputs.n} samples, {len(names)} layers\n{plan}", flush=True)
        print("\n".join([*remarks, *left_out_remarks(left_out)]), flush=True)
        capture = Capture(plan, modules, inputs, inputs.device)
        for name, features, distances in capture:
            try:
                measured = estimation.measure(name, features, distances)
                found[name] = replace(measured, **capture.beside(name, distances))
            except TooFewPoints as error:
                left_out[name] = str(error)
        left_out |= capture.left_out | changed()
    kept = [name for name in names if name in found and name not in left_out]
    ordered = {name: replace(found[name], kind="other") for name in kept}
    remarks += left_out_remarks(left_out)
    require_layers(ordered, remarks)
    settings = {"model": type(model).__name__, "nsamples": capture.n, "seed": seed}
    settings |= estimation.settings | {"device": inputs.device.type}
    return IDProfile(settings, ordered, make_remarks(capture.n, ordered) + remarks)


def left_out_remarks(left_out: dict[str, str]) -> list[str]:
    """Sentences on the layers that are not measured, one for each reason."""
    reasons = dict.fromkeys(left_out.values())
    names = {why: [name for name, other in left_out.items() if other == why] for why in reasons}
    return [f"left out: {', '.join(those)}: {why}" for why, those in names.items()]


def require_layers(layers, remarks: list[str]) -> None:
    """Raises UserError, with the reasons, if there are none."""
    if not layers:
        raise UserError(f"no layer is left to measure ({'; '.join(remarks)})")


def choose_layers(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Layer name, as chosen in `measure`, to the module whose output stands for it."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("model: TorchScript shows no layer's output; give what it was made of")
    modules = dict(model.named_modules())
    usual = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    chosen = usual if layers is None else []
    for wanted in [layers] if isinstance(layers, str) else layers or []:
        fitting = [name for name in usual if fnmatchcase(name, wanted)]
        chosen = chosen + ([wanted] if wanted in modules else fitting)
        if wanted not in modules and not fitting:
            raise UserError(f"layers: {wanted!r} fits no layer, such as {', '.join(usual[:3])}")
    if not chosen:
        raise UserError("model: it has no linear layer; name some of its modules (layers)")

    stand_ins = {  # never called themselves
        f"{name}.out_proj": module
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {name: stand_ins.get(name, modules[name]) for name in chosen}


@contextmanager
def prepared(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, float32 proper, all modules called; then all as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nested tensors in torch's own encoder
    model.eval().requires_grad_(False)  # torch's count of FLOPs fails at a learned input
    forked = [] if device.type == "cpu" else range(torch.accelerator.device_count())
    random_state = torch.random.fork_rng(forked, device_type=device.type)
    try:
        with torch.no_grad(), full_float32(), random_state:
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


class Place(str):
    """An argument's name in a batch that gives it by its place."""


class Batches:
    """The inputs of any model, as `Capture` reads them: n samples at most, on the model's device.

    `first` is the first batch, of `batch_size` samples; no inputs (`tensors`) stay in memory.
    """

    def __init__(self, model: nn.Module, batches: Iterable, n: int, seed: int):
        if isinstance(batches, Tensor | Mapping):
            one = type(batches).__name__
            raise UserError(f"batches: a {one} is one batch; give a list, such as tensor.split(8)")
        if isinstance(batches, Iterator):
            raise UserError("batches: a generator is read only once; give a list or a DataLoader")
        self.batches, self.seed, self.tensors = batches, seed, {}
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
        self.marks: list[list[int]] = []  # checksums of the first pass's batches
        self.texts: dict[str, list[int]] = {}  # tokens of each text, by the name of its mask
        first = next(iter(batches), None)
        if first is None:
            raise UserError("batches: there are none to measure with")
        first = self.arguments(first)
        self.batch_size = count_samples(first)
        places = [x.device for x in chain(model.parameters(), model.buffers()) if not x.is_meta]
        self.device = [*places, *(x.device for x in _tensors(first))][0]
        self.first = _to(first, self.device)
        if isinstance(batches, list | tuple):
            n = min(n, sum(count_samples(self.arguments(batch)) for batch in batches))
        elif hasattr(batches, "__len__"):
            n = min(n, len(batches) * self.batch_size)
        if n < FEWEST_POINTS:
            raise UserError(f"n: an ID needs {FEWEST_POINTS} samples at least, not {n}")
        self.n = n

    def arguments(self, batch) -> dict:
        """A batch's values by the names of the model's arguments; `Place`s, if they have none."""
        if isinstance(batch, Mapping):
            return dict(batch)
        values = batch if isinstance(batch, tuple | list) else [batch]
        names = [*self.names, *map(str, range(len(self.names), len(values)))]
        return {Place(name): value for name, value in zip(names, values, strict=False)}

    def loader(self, name: str, device: torch.device) -> Iterator:
        """One pass; the model's random numbers depend on the batch's number alone."""
        for number, batch in enumerate(map(self.arguments, self.batches)):
            samples, mark = count_samples(batch), checksums(batch)
            if samples > self.batch_size:
                raise UserError(
                    f"batches: batch {number} has {samples} samples and the first only "
                    f"{self.batch_size}; no batch may be larger than the first"
                )
            if number == len(self.marks):
                self.marks.append(mark)
                for name, tokens in text_masks(batch).items():
                    self.texts.setdefault(name, []).extend(tokens.bool().sum(1).tolist())
            if self.marks[number] != mark:
                raise UserError(
                    f"batches: batch {number} is not what it was in the first pass; every pass "
                    "must see the same samples in the same order (shuffle=False, no augmentation)"
                )
            self.present = _to(batch, device)
            reseed(device, self.seed, number)
            yield self.present

    def count(self, batch: tuple) -> int:
        """B, the samples in what the stage reads: one batch."""
        return count_samples(batch[0])

    def counted(self, mask: str, rows: slice) -> Tensor:
        """(B, L) bool, the tokens that are no padding, for the batch's first samples."""
        return self.present[mask][: rows.stop - rows.start].bool()

    def lengths(self, mask: str) -> Tensor | None:
        """(n,), tokens of each text of a mask, or of the first mask; None without texts."""
        found = self.texts.get(mask) or next(iter(self.texts.values()), None)
        return None if found is None else torch.tensor(found[: self.n])


def text_masks(batch: dict) -> dict[str, Tensor]:
    """The masks (B, L) of a batch's texts, by name."""
    found = {name: batch[name] for name in MASKS if isinstance(batch.get(name), Tensor)}
    return {name: mask for name, mask in found.items() if mask.dim() == 2}


def count_samples(batch: dict) -> int:
    """B, the length of a batch's first tensor."""
    tensors = [value for value in _tensors(batch) if value.dim()]
    if any(value.layout != torch.strided or value.is_nested for value in tensors):
        raise UserError("batches: a tensor is sparse or nested; give dense ones")
    lengths = list(dict.fromkeys(map(len, tensors)))
    if not lengths or not lengths[0]:
        kinds = ", ".join(type(value).__name__ for value in batch.values())
        raise UserError(
            f"batches: {kinds} is no batch; give tensors, or tuples or mappings that hold some, "
            "with samples in the first dimension"
        )
    if lengths[0] > 1 and lengths[1:]:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
        raise UserError(
            f"batches: the first dimension of all tensors must be the samples, but here are "
            f"{shapes}; give batches of one sample where that cannot be"
        )
    return lengths[0]


def run_batch(model: nn.Module, batch: dict) -> None:
    """Runs a model on a batch."""
    places = [value for key, value in batch.items() if isinstance(key, Place)]
    model(*places, **{key: value for key, value in batch.items() if not isinstance(key, Place)})


def _tensors(batch: dict) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _to(batch: dict, device: torch.device) -> dict:
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def _take(batch: dict, samples: list[int]) -> dict:
    """Some samples of a batch, in this order, from tensors and lists with a row for each."""
    count = count_samples(batch)

    def rows(value):
        if isinstance(value, Tensor):
            return value[samples] if value.dim() and len(value) == count else value
        listed = isinstance(value, list | tuple) and len(value) == count
        return [value[i] for i in samples] if listed else value

    return {key: rows(value) for key, value in batch.items()}


def checksums(batch: dict) -> list[int]:
    """Checksums of the batch's tensors."""
    found = (value.detach().cpu().contiguous().view(-1) for value in _tensors(batch))
    return [zlib.crc32(value.view(torch.uint8).numpy()) for value in found]


class _Output(NamedTuple):
    """What a call of a layer gave for a few samples."""

    flops: int  # of all samples from the start of the forward
    size: tuple[int, ...] | None  # tokens and width of a sample; None where there is a problem
    prints: Tensor | None  # (B, at most PRINT_SIZE) elements of the representations
    problem: str = ""

    def same_sample(self, other: "_Output | None", row: int) -> bool:
        """Whether the last sample is the one in a row of `other`, but for rounding."""
        if other is None or self.size != other.size:
            return False
        prints = self.prints[0], self.prints[-1], other.prints[row]
        first, second, found = (x.double() for x in prints)
        rounding = 16 * torch.finfo(self.prints.dtype).eps * second.norm()
        moved = (found - second).norm()  # what is not finite, the distances will name
        return not moved.isfinite() or bool(moved <= max(ALIKE * (second - first).norm(), rounding))


Run = Callable[..., dict[Call, _Output]]  # of a batch, and the number of what the model draws
Reasons = dict[str, str]  # why layers are left out, by name


def trace_forward(
    model: nn.Module, modules: dict[str, nn.Module], inputs: Batches
) -> tuple[StageShape, Reasons, list[str], Callable[[], Reasons]]:
    """Runs two samples to learn which layers run, in what order, and what they give.

    Returns the forward as a stage, in which all calls of a layer stand where its last one is; the
    layers left out; sentences for the profile's reader; and, to call after all passes, what finds
    the layers in which these samples are no longer what they were.
    """
    counter = FlopCounterMode(display=False)
    run = partial(_record, model, modules, inputs, counter)
    batch, samples = inputs.first, min(2, inputs.batch_size)
    few = _take(batch, list(range(samples)))
    try:
        outputs, flops = run(few), counter.get_total_flops()
        left_out = {name: x.problem for (name, _), x in outputs.items() if x.problem}
        if samples == 2:
            left_out |= _rows_of_no_samples(outputs, batch, run)
    except Exception as error:  # of whatever kind a model finds
        raise UserError(
            f"batches: the model does not take {samples} of the first batch's {inputs.batch_size} "
            f"samples ({type(error).__name__}: {error}); give its arguments, with samples in the "
            "first dimension, or batches of one sample"
        ) from error
    masks, remarks = _masks(outputs, few, run)
    for why, is_so in UNSEEN.items():
        if unseen := [name for name, module in model.named_modules() if is_so(module)]:
            remarks.append(f"not looked at: {', '.join(unseen)}: {why}")
    calls: dict[str, list[LayerShape]] = {}
    for (name, number), output in outputs.items():
        calls[name] = calls.pop(name, [])  # in the order of the last calls
        if name not in left_out:
            mask, done = masks.get((name, number), ""), output.flops // samples
            calls[name].append(LayerShape(name, *output.size, done, number, mask))
    left_out |= dict.fromkeys([x for x in modules if x not in calls], "no call in the first batch")
    shapes = tuple(shape for of_name in calls.values() for shape in of_name)
    require_layers(shapes, left_out_remarks(left_out))

    def changed() -> Reasons:
        now, why = run(few), "the model keeps a state: afterwards, the same samples give other rows"
        cases = {key: x for key, x in outputs.items() if x.size}
        return {key[0]: why for key, x in cases.items() if not x.same_sample(now.get(key), -1)}

    stage = Stage("the model", partial(run_batch, model), ("batch",), "")
    return StageShape(stage, shapes, (0,), max(1, flops // samples)), left_out, remarks, changed


def _is_fused(module: nn.Module) -> bool:
    """Whether a module has matrices of several layers, such as experts, in a tensor of its own."""
    usual = nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList
    own = [] if isinstance(module, usual) else module.parameters(recurse=False)
    return any(x.dim() == 3 and min(x.shape) > 1 for x in own)


def _record(
    model: nn.Module,
    modules: dict[str, nn.Module],
    inputs: Batches,
    counter: FlopCounterMode,
    batch: dict,
    draws: int = 0,
) -> dict[Call, _Output]:
    """What each call gives in a forward, whose random numbers have the number `draws`."""
    found, calls, samples = {}, Counter(), count_samples(batch)

    def note(name: str, module, args, output) -> None:
        flops, key = counter.get_total_flops(), (name, calls[name])
        try:
            values = by_sample(output, samples)
            prints = values.flatten(1)[:, :: -(-values[0].numel() // PRINT_SIZE)].clone()
            found[key] = _Output(flops, tuple(values.shape[1:]), prints)
        except NotBySample as error:
            found[key] = _Output(flops, None, None, str(error))
        calls[name] += 1

    reseed(inputs.device, inputs.seed, draws)
    with ExitStack() as hooks, counter:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        run_batch(model, batch)
    return found


UNSEEN = {
    "a tensor holds several layers' weights": _is_fused,
    "TorchScript shows no layer's output": lambda x: isinstance(x, torch.jit.ScriptModule),
    "quantised layers are no nn.Linear": lambda x: inspect.ismethod(getattr(x, "weight", 0)),
}


def _rows_of_no_samples(outputs: dict[Call, _Output], batch, run: Run) -> dict[str, str]:
    """Layer name to reason, for layers whose rows are not the batch's samples.

    The second sample must have the same representation as the first one of another batch. Where a
    model draws random numbers, it must have the same in its own place, beside another sample.
    """
    others = run(_take(batch, [1, 2 % count_samples(batch)]))
    doubtful = {k: x for k, x in outputs.items() if x.size and not x.same_sample(others.get(k), 0)}
    if doubtful:
        redrawn, beside = run(_take(batch, [0, 1]), draws=-1), run(_take(batch, [1, 1]))
    doubtful = [
        key
        for key, output in doubtful.items()
        if output.same_sample(redrawn.get(key), 1) or not output.same_sample(beside.get(key), 1)
    ]
    why = "its rows are not the samples: in another batch, a sample's row differs"
    return {name: f"{why}; give batches of one sample" for name, _ in doubtful}


def _masks(outputs: dict[Call, _Output], batch, run: Run) -> tuple[dict[Call, str], list[str]]:
    """The calls whose outputs have padding, with the name of its mask; and sentences.

    These outputs are as long as a mask and become shorter when its texts do.
    """
    found, remarks = {}, []
    for name, mask in text_masks(batch).items():
        length, shorter = mask.shape[1], None
        for labels in (False, True):  # of the decoder, or of the texts themselves
            with suppress(Exception):  # of whatever kind a model finds
                shorter = run(_shorter(batch, name, labels))
                break
        if shorter is None:
            remarks.append(
                f"the model does not take shorter texts, so padding ({name}) counts as zero in "
                "every layer as long as the texts"
            )
        for key in [key for key, x in outputs.items() if x.size and x.size[0] == length]:
            then = shorter[key].size if shorter and key in shorter else None
            if shorter is None or (then and then[0] == length - 1):
                found[key] = name
    return found, remarks


def _shorter(batch: dict, mask: str, labels: bool) -> dict:
    """The batch without the last column of a mask and of what belongs to its tokens.

    These are the arguments of whole numbers, such as ids or boxes, that begin with the mask's (B,
    L), because floating-point ones may belong to regions of an image; and embedded tokens. A
    decoder's arguments belong to its mask, labels where `labels` says so.
    """

    def of_tokens(name: str, value) -> bool:
        if not isinstance(value, Tensor) or value.shape[:2] != batch[mask].shape:
            return False
        same_side = name.startswith("decoder_") == mask.startswith("decoder_")
        of_words = name.endswith(("attention_mask", "inputs_embeds"))
        whole = not value.is_floating_point() and (labels or name != "labels")
        return same_side and (of_words or whole)

    return {name: x[:, :-1] if of_tokens(name, x) else x for name, x in batch.items()}
