"""Which layers are pruned: linear ones whose weights are parameters of their own."""

from collections import defaultdict
from collections.abc import Iterable
from math import inf

from torch import nn

from models.layers import prunable_layers
from utils import UserError, listed


def choose_layers(
    model: nn.Module, names: Iterable[str] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The named linear layers; without names those of `models.prunable_layers`.

    Returns:
        The layers by name; and by name the module that has the same weight, a word embedding for
        instance, of layers that are left out.
    """
    if names is None and not (names := prunable_layers(model)):
        raise UserError(
            "nothing to prune: the model has no transformer blocks of BLIP or CLIP. Name the "
            "linear layers to prune (layers=[...])"
        )
    names = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules())
    refused = [f"{n!r} {why}" for n in names if (why := _why_refused(modules.get(n)))]
    if refused:
        raise UserError(f"cannot prune these layers: {listed(refused)}")
    owners = defaultdict(list)  # of a parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].insert(0, name.rpartition(".")[0])
    pairs = ((name, other) for name in names for other in owners[id(modules[name].weight)])
    left_out = {name: other for name, other in pairs if other != name}  # with the first of others
    layers = {name: modules[name] for name in names if name not in left_out}
    if not layers:
        raise UserError(f"nothing to prune: {tied(left_out) or 'no layer is named'}")
    return layers, left_out


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or GPT-2's name for one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def tied(left_out: dict[str, str]) -> str:
    """A clause that names the layers that `choose_layers` left out."""
    pairs = ", ".join(f"{name} (with {other})" for name, other in left_out.items())
    return f"layers that share their weights are left out: {pairs}" if left_out else ""


def _why_refused(module: nn.Module | None) -> str | None:
    if module is None:
        return "is not a layer of the model"
    if not is_linear(module):
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


def check_profile(
    profile: dict[str, float], layers: Iterable[str], left_out: Iterable[str] = ()
) -> None:
    """Checks that a profile, by layer name, is of these layers; it may have those left out, too."""
    problems = {
        "missing": [name for name in layers if name not in profile],
        "unknown": [name for name in profile if name not in layers and name not in left_out],
        "not positive": [name for name, dimension in profile.items() if not 0 < dimension < inf],
    }
    found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if found:
        raise UserError(
            f"the ID profile does not fit the model ({found}). Measure one with ComputeID.py and "
            "the same config, or leave out what it lacks"
        )
