"""Which layers are pruned: linear ones whose weights are parameters of their own."""

from collections.abc import Iterable

from torch import nn

from models.layers import prunable_layers
from utils import UserError


def choose_layers(
    model: nn.Module, names: Iterable[str] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to prune, by name.

    Args:
        model: any; names are those of its `named_modules`.
        names: linear layers (`nn.Linear`, transformers' `Conv1D`); None takes
            `models.prunable_layers`, which knows BLIP and CLIP.

    Returns:
        The layers, and those that are left out because another module has the same weight, a word
        embedding for instance: by name, with the other module's name.

    Raises:
        UserError: there is no layer, or one is unknown, not linear, or has no weight of its own.
    """
    if names is None:
        names = prunable_layers(model)
        if not names:
            raise UserError(
                "nothing to prune: the model has no transformer blocks of BLIP or CLIP. Name the "
                "linear layers to prune (layers=[...])"
            )
    names = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    refused = [f"{n!r} {why}" for n in names if (why := _why_refused(modules.get(n)))]
    if refused:
        more = f" and {len(refused) - 3} more" if refused[3:] else ""
        raise UserError(f"cannot prune these layers: {'; '.join(refused[:3])}{more}")
    owners: dict[int, list[str]] = {}  # of a weight
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    layers, left_out = {}, {}
    for name in names:
        others = [n for n in owners[id(modules[name].weight)] if modules[n] is not modules[name]]
        if others:
            left_out[name] = others[0]
        elif all(module is not modules[name] for module in layers.values()):
            layers[name] = modules[name]
    if not layers:
        raise UserError(f"nothing to prune: {tied(left_out) or 'no layer is named'}")
    return layers, left_out


def tied(left_out: dict[str, str]) -> str:
    """A clause that names the layers that `choose_layers` left out."""
    pairs = ", ".join(f"{name} (with {other})" for name, other in left_out.items())
    return f"layers that share their weights are left out: {pairs}" if left_out else ""


def _why_refused(module: nn.Module | None) -> str | None:
    if module is None:
        return "is not a layer of the model"
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if not isinstance(module, nn.Linear) and "Conv1D" not in kinds:
        return f"is no linear layer ({type(module).__name__})"
    own = {name for name, _ in module.named_parameters()}
    if not {"weight"} <= own <= {"weight", "bias"}:
        parts = ", ".join(sorted(own - {"weight", "bias"}))
        return (
            f"computes its weight from {parts or 'no parameter'}: remove the parametrization "
            "first (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.prune.remove), or merge the adapter"
        )
    if not module.weight.is_floating_point():
        return f"has a weight of {module.weight.dtype}: prune before quantising"
    return None


def check_layer_id(
    layer_id: dict[str, float], layers: dict[str, nn.Module], left_out: Iterable[str] = ()
) -> None:
    """Checks that an ID profile is of these layers; it may also have those that are left out.

    Raises:
        UserError: names layers that are missing, unknown, or whose ID is not positive.
    """
    problems = {
        "missing": [name for name in layers if name not in layer_id],
        "unknown": [name for name in layer_id if name not in layers and name not in left_out],
        "not positive": [name for name, dimension in layer_id.items() if not dimension > 0],
    }
    found = [
        f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for what, names in problems.items()
        if names
    ]
    if found:
        raise UserError(
            f"the ID profile does not fit the model ({'; '.join(found)}). Measure one with "
            "ComputeID.py and the same config"
        )
