"""Pruning of any model at once, without training: Magnitude and Wanda, shared out by a profile.

    from pruners.oneshot import prune_
    report = prune_(model, batches, sparsity=0.5, method="Wanda", allocation=ids)

Scores of one layer are compared with each other alone. So a profile (intrinsic dimensions, or any
other numbers by layer name) does not weight scores here: it says how much of each layer remains,
more where it is higher. The paper itself prunes during training only.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from math import ceil, sqrt
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from models.layers import prunable_layers
from pruners.layers import check_profile, choose_layers, is_linear
from utils import UserError

HEADS = ("*lm_head", "head", "*.head", "*classifier", "*cls_head", "*predictions.*", "score")
METHODS = ("Magnitude", "Wanda")
WORKING_BYTES = 32  # for each weight of the largest layer, while its scores are compared


@torch.no_grad()
def prune_(
    model: nn.Module,
    batches: Iterable,
    sparsity: float | None = None,
    method: str = "Wanda",
    allocation: Mapping[str, float] | None = None,
    *,
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    nm: tuple[int, int] | None = None,
    sequential: bool = False,
    held_out: Iterable = (),
    run: Callable[[object], object] | None = None,
) -> dict:
    """Zeroes weights of linear layers, in place; biases stay.

    Args:
        model: any, on its device.
        batches: calibration samples, for instance 128, as tensors, tuples or mappings of the
            model's arguments. Padding that an `attention_mask` names does not count. Magnitude
            needs none.
        sparsity: share of all weights of the layers that becomes zero, in (0, 1).
        method: "Magnitude" removes the smallest |w| of a layer, "Wanda" the smallest
            |w_ij| * ||x_j|| of each output row.
        allocation: a positive number by layer name, see `allocate`; None: each layer alike.
        layers: names; None takes `models.prunable_layers`, and of other models all linear layers
            but output heads. Layers that share their weights are always left out.
        skip: patterns of names to leave out, such as "*.lm_head".
        nm: (2, 4) keeps two of four neighbours along the input, in place of a sparsity.
        sequential: prune in forward order, each layer by inputs that the pruned layers before it
            give, as the published code does by blocks; a pass a layer. Else one pass in all.
        held_out: batches on which the errors of the layers' outputs are measured.
        run: what a pass does with a batch; None calls the model with it.

    Returns:
        `layers`: zeros by layer name; `sparsity`: of all these layers; `errors`: by layer name
        ||(W - W') x|| / ||W x + b|| over the held-out tokens x, where the layers before are dense,
        or pruned if sequential; `left_out`: by layer name the reason. Fit for JSON.

    Raises:
        UserError: an argument is out of range or does not fit the model, or no layer is called.

    Source: Wanda, Sun et al., ICLR 2024 (arXiv 2306.11695), equation 1.
    """
    _check(sparsity, method, nm, allocation, sequential)
    chosen, left_out = find_layers(model, layers, skip)
    if allocation is not None:
        check_profile(allocation, chosen, left_out)

    def zeros_by_layer() -> dict[str, int]:
        shapes = {name: matrix(layer).shape for name, layer in chosen.items()}
        return allocate(shapes, sparsity, method, allocation, nm)

    zeros = zeros_by_layer()  # mistakes do not wait for the pass
    batches = list(batches) if isinstance(batches, Iterator) else batches
    run, norms, errors = run or partial(call, model), {}, {}
    if method == "Wanda":
        first = next(iter(batches), None)
        if first is None:
            raise UserError("Wanda needs calibration samples: batches is empty")
        if not input_norms(model, chosen, [first], run):
            raise UserError("no layer to prune is called by the first calibration samples")
        norms = input_norms(model, chosen, batches, run)
        left_out |= {n: "not called by the calibration samples" for n in chosen if n not in norms}
        chosen = {name: chosen[name] for name in norms}  # in forward order
        zeros = zeros_by_layer()
    for group in [{name: chosen[name]} for name in chosen] if sequential else [chosen]:
        if sequential:
            norms = input_norms(model, group, batches, run)
        removed = {}
        for name, layer in group.items():
            scores = precise(matrix(layer)).abs() * norms.get(name, 1.0)
            compared = nm[1] if nm else scores.shape[1] if method == "Wanda" else scores.numel()
            found = lowest(scores.reshape(-1, compared), zeros[name])
            removed[name] = found.view(scores.shape)
        errors |= output_errors(model, removed, held_out, run)
        for name, layer in group.items():
            matrix(layer).masked_fill_(removed[name], 0)
    done = {name: int((layer.weight == 0).sum()) for name, layer in chosen.items()}
    share = sum(done.values()) / sum(layer.weight.numel() for layer in chosen.values())
    return {"layers": done, "sparsity": share, "errors": errors, "left_out": left_out}


def _check(sparsity, method, nm, allocation, sequential) -> None:
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if sequential and method != "Wanda":
        raise UserError(f"sequential: {method} looks at no inputs; leave it out, or take Wanda")
    if nm is None:
        if sparsity is None or not 0 < sparsity < 1:
            raise UserError(f"sparsity is the share of zeros, above 0 and below 1; got {sparsity}")
        return
    if not 0 < nm[0] < nm[1]:
        raise UserError(f"nm keeps n of m neighbours, 0 < n < m; got {nm[0]}:{nm[1]}")
    if allocation is not None or sparsity not in (None, 1 - nm[0] / nm[1]):
        raise UserError(
            f"{nm[0]}:{nm[1]} makes the same share of every layer zero, {1 - nm[0] / nm[1]:.4g}: "
            "leave out sparsity and allocation"
        )


def find_layers(
    model: nn.Module, names: Iterable[str] | None, skip: Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to prune, and those that are left out, with the reason; see `prune_`."""
    if names is None:
        names = list(prunable_layers(model))
    heads = () if names else HEADS
    names = names or [name for name, module in model.named_modules() if is_linear(module)]
    left_out = {}
    for reason, patterns in (("output head", heads), ("skipped", skip)):
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                left_out[name] = reason
    layers, shared = choose_layers(model, [name for name in names if name not in left_out])
    return layers, left_out | {name: f"shares its weight with {n}" for name, n in shared.items()}


def matrix(layer: nn.Module) -> Tensor:
    """A view of the weight, (outputs, inputs); GPT-2's Conv1D stores it transposed."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()


def precise(x: Tensor) -> Tensor:
    """At least float32, in which scores are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Where (rows, columns) the `count` lowest scores are; of equal ones the first.

    Rows share the count equally; where it does not divide, the first ones have one more.
    """
    each, more = divmod(count, len(scores))
    found = torch.zeros_like(scores, dtype=torch.bool)
    for rows, k in ((slice(more), each + 1), (slice(more, None), each)):
        if k and len(part := scores[rows]):
            if part.is_cpu:  # torch's kthvalue takes ten times as long, and twice the memory
                bound = torch.from_numpy(np.partition(part.numpy(), k - 1)[:, k - 1 : k])
            else:
                bound = part.kthvalue(k, dim=1, keepdim=True).values
            below, equal = part < bound, part == bound
            missing = k - below.sum(1, keepdim=True)
            if (equal.sum(1, keepdim=True) > missing).any():
                equal &= equal.cumsum(1, dtype=torch.int32) <= missing
            found[rows] = below | equal
    return found


def allocate(
    shapes: dict[str, tuple[int, int]],
    sparsity: float,
    method: str,
    profile: Mapping[str, float] | None = None,
    nm: tuple[int, int] | None = None,
) -> dict[str, int]:
    """How many weights of each layer become zero.

    Without a profile the share of each comparison group is `sparsity`, rounded down, as published.
    With one, a layer keeps the share r_l = min(1, c * w_l), where c is such that of all weights
    together int(sparsity * N) become zero, exactly.

    Shapes are (outputs, inputs). "Wanda" compares within rows, "Magnitude" within the layer.
    """
    if nm:
        if odd := [name for name, (_, inputs) in shapes.items() if inputs % nm[1]]:
            raise UserError(f"nm: the inputs of {odd[0]} are no multiple of {nm[1]}; skip it")
        return {name: o * i // nm[1] * (nm[1] - nm[0]) for name, (o, i) in shapes.items()}
    if profile is None:
        groups = {n: (o, i) if method == "Wanda" else (1, o * i) for n, (o, i) in shapes.items()}
        return {name: rows * int(columns * sparsity) for name, (rows, columns) in groups.items()}
    sizes = {name: outputs * inputs for name, (outputs, inputs) in shapes.items()}
    kept = sum(sizes.values()) - int(sum(sizes.values()) * sparsity)
    demand, remain = {n: Fraction(float(profile[n])) * size for n, size in sizes.items()}, {}
    for name in sorted(sizes, key=profile.__getitem__, reverse=True):  # the first to be full first
        share = kept / sum(demand[other] for other in sizes if other not in remain)  # c
        remain[name] = min(sizes[name], ceil(share * demand[name]))
        kept -= remain[name]
    if empty := [name for name, count in remain.items() if count < 1]:
        raise UserError(
            f"allocation: nothing of {empty[0]} would remain; take a lower sparsity or a profile "
            "of a smaller range"
        )
    return {name: sizes[name] - remain[name] for name in sizes}


def modality_means(profile: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    """A profile where each layer has the mean of its modality; `kinds` is by layer name."""
    members = {kind: [w for n, w in profile.items() if kinds[n] == kind] for kind in kinds.values()}
    return {name: fmean(members[kinds[name]]) for name in profile}


def input_norms(
    model: nn.Module, layers: dict[str, nn.Module], batches: Iterable, run: Callable
) -> dict[str, Tensor]:
    """||x_j|| (inputs,): the norm of each input feature over all tokens of all samples.

    In the order of first calls; layers that are not called are missing.
    """
    squares = defaultdict(float)

    def add(name: str, x: Tensor) -> None:
        squares[name] += precise(x).square().sum(0)

    each_input(model, layers, batches, run, add)
    if bad := [name for name, square in squares.items() if not square.isfinite().all()]:
        raise UserError(f"the inputs of {bad[0]} are not finite in the calibration samples")
    return {name: square.sqrt() for name, square in squares.items()}


def output_errors(
    model: nn.Module, removed: dict[str, Tensor], batches: Iterable, run: Callable
) -> dict[str, float]:
    """Relative error of each layer's output without the weights (outputs, inputs) to remove."""
    layers = {name: model.get_submodule(name) for name in removed}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in removed}

    def add(name: str, x: Tensor) -> None:
        layer = layers[name]
        lost = nn.functional.linear(x, torch.where(removed[name], matrix(layer), 0))
        outputs = nn.functional.linear(x, matrix(layer), layer.bias)
        sums[name] += torch.stack(
            [precise(y).square().sum().double().cpu() for y in (lost, outputs)]
        )

    each_input(model, layers, batches, run, add)
    return {n: sqrt(lost / all_) for n, (lost, all_) in sums.items() if all_}


def each_input(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable,
    run: Callable,
    see: Callable[[str, Tensor], None],
) -> None:
    """One pass, in eval mode; `see` gets each input (tokens, inputs) of each layer, less padding.

    `out_proj` of torch's MultiheadAttention is never called: its input is the attention's context.
    """
    padding: list[Tensor | None] = [None]  # attention_mask of the batch

    def watch(module: nn.Module, arguments: tuple, options: dict, name: str) -> None:
        x = (*arguments, *options.values())[0]
        if padding[0] is not None and padding[0].shape == x.shape[:-1]:
            x = x[padding[0].to(x.device).bool()]
        see(name, x.reshape(-1, x.shape[-1]))

    def watch_context(module: nn.Module, arguments: tuple, options: dict, name: str) -> None:
        """The context is what an identity for `out_proj` puts out."""
        plain, width = module.out_proj, module.embed_dim
        module.out_proj = nn.Linear(width, width, bias=False).to(plain.weight)
        nn.init.eye_(module.out_proj.weight)
        try:
            watch(plain, module.forward(*arguments, **options)[:1], {}, name)
        finally:
            module.out_proj = plain

    hooks = []
    for name, layer in layers.items():
        places = [(layer, watch)]
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            places.append((parent, watch_context))
        for module, hook in places:
            hook = partial(hook, name=name)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # fused encoder layers pass hooks by
        for batch in batches:
            padding[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            run(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()


def call(model: nn.Module, batch) -> None:
    """Calls the model with a tensor, a tuple or list of arguments, or a mapping of them."""
    device = next(model.parameters()).device

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
    else:
        model(*map(move, batch if isinstance(batch, tuple | list) else (batch,)))
