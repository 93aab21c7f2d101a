"""Loads checkpoints of every format that users of BLIP and of the paper have.

1. Official BLIP `.pth`: {"model": weights, ...}.
2. The paper's pruned files: {"model_state_dict": {"module.": weights}, ...}.
3. Hugging Face's BlipForConditionalGeneration and CLIPModel folders (safetensors).
4. This project's own: `pruned.safetensors`, or the {"model": weights, ...} of a resume file.
5. Its compressed files (`models.compressed`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import compat  # noqa: F401

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models.compressed import Packed
from models.layers import is_sparse
from models.weight_files import fetch, open_weights
from utils import UserError, listed

Weights = dict[str, Tensor | Packed]
POSITION_EMBEDDINGS = ("visual_encoder.pos_embed", "visual.positional_embedding")  # BLIP's, CLIP's
SIZE_KEYS = "`vit` or `med_config`"  # of BLIP's configs; a model may have its own
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")  # DDP, torch.compile, Lightning
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not eight bits to scale

# Our and Hugging Face's names of BLIP's vision parameters; text parameters have one name.
_HUGGING_FACE = [
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
]


@dataclass
class LoadReport:
    """What became of a checkpoint's tensors, and which parameters kept their initial values."""

    path: str
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for the log; names where they are few."""
        line = f"{self.path}: {len(self.loaded)} loaded"
        lists = {"ignored": self.ignored, "resampled": self.resampled}
        for label, names in (lists | {"newly initialised": self.initialised}).items():
            if names:
                line += f"; {len(names)} {label} ({listed(names)})"
        return line + "".join(f"; prefix {prefix!r} removed" for prefix in self.prefixes)


@torch.no_grad()
def load_checkpoint(model: nn.Module, path_or_url: str) -> LoadReport:
    """Loads weights in place; every parameter must be set.

    Position embeddings of another image size are resampled bicubically. Names, types and shapes are
    checked first; then tensors are copied one by one from the mapped file.

    Args:
        model: not wrapped in DistributedDataParallel. `official_name(name)` turns another library's
            name of a parameter into its own. Optional are `adapt_weights(weights)`, which returns
            them as the model takes them and the names that may be missing, and `weights_loaded()`,
            which is called at the end.
        path_or_url: a file, a folder with safetensors, or an address, see `fetch`.

    Raises:
        UserError: the file cannot be read, a tensor is quantised or packed, a shape differs, or a
            parameter stays unset (the model is as before); or a weight is not finite (the model is
            partly loaded).
    """
    if is_sparse(model):
        raise ValueError("the model is sparse already: load weights before `sparsify_`")
    report = LoadReport(str(path_or_url))
    weights = _renamed(open_weights(fetch(path_or_url)), model.official_name, report)
    may_be_missing = set()
    if hasattr(model, "adapt_weights"):
        weights, may_be_missing = model.adapt_weights(weights)
    targets = dict(model.named_parameters(remove_duplicate=False))
    hint = f"does the config's {getattr(model, 'size_keys', SIZE_KEYS)} fit it?"
    _check(report, weights, targets, may_be_missing, hint)

    def copy(name: str) -> None:
        value, target = weights.pop(name), targets[name].detach()
        if isinstance(value, Packed):
            value = value.dense(None if name in report.resampled else target)
        if name in report.resampled:
            value = _resample(value.float(), target)
        if value.data_ptr() != target.data_ptr():
            target.copy_(value)
        # a sum inherits inf and nan; one in float32 is fast, but may overflow by itself
        if not (target.sum().isfinite() or target.sum(dtype=torch.float64).isfinite()):
            raise UserError(
                f"{path_or_url}: {name} holds values that are not finite (inf or nan): the file is "
                "damaged, or its training diverged; take another checkpoint"
            )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy unpacks bits on one thread
        list(pool.map(copy, report.loaded))
    if hasattr(model, "weights_loaded"):
        model.weights_loaded()
    return report


def load_trained(model: nn.Module, path_or_url: str) -> LoadReport:
    """As `load_checkpoint`, but no parameter may keep its initial values."""
    report = load_checkpoint(model, path_or_url)
    if report.initialised:
        raise UserError(
            f"{path_or_url} is a start for training, not trained weights: it lacks "
            f"{', '.join(report.initialised)}"
        )
    return report


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file of weights: parameters, tied ones once, but no run's buffers."""
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def blip_name(name: str) -> str:
    """The official name of a BLIP parameter that may have Hugging Face's."""
    theirs = name.startswith("vision_model.")
    return replace_all(name, [pair[::-1] for pair in _HUGGING_FACE]) if theirs else name


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a captioner's parameter."""
    return replace_all(name, _HUGGING_FACE) if name.startswith("visual_encoder.") else name


def replace_all(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A name in which each old part is replaced by its new one, in turn."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _renamed(weights: Weights, official_name: Callable[[str], str], report: LoadReport) -> Weights:
    """The same weights under the official names; the report gets the prefixes that fell off."""
    renamed = {}
    for name, value in weights.items():
        bare = _PREFIXES.sub("", name)
        prefix = name.removesuffix(bare)
        if prefix and prefix not in report.prefixes:
            report.prefixes.append(prefix)
        official = official_name(bare)
        if official in renamed:
            raise UserError(
                f"{report.path} holds {official} twice, with and without a prefix or under two "
                "names: save the weights of one model alone"
            )
        renamed[official] = value
    return renamed


def _check(
    report: LoadReport, weights: Weights, targets: Weights, may_be_missing: set[str], hint: str
) -> None:
    """Fills the report. Raises a UserError if a tensor does not fit or a parameter stays unset."""
    for name, value in weights.items():
        if name not in targets:
            report.ignored.append(name)
            continue
        report.loaded.append(name)
        stored = value.values if isinstance(value, Packed) else value
        if stored.dtype not in _DTYPES or stored.layout != torch.strided or stored.is_meta:
            kind = "of device meta" if stored.is_meta else f"{stored.dtype}, {stored.layout}"
            raise UserError(
                f"{report.path}: {name} is {kind}, but weights must be dense, and float32, float16 "
                "or bfloat16: save them before they are quantised or packed"
            )
        shape, wanted = tuple(value.shape), tuple(targets[name].shape)
        if _can_be_resampled(name, shape, wanted):
            report.resampled.append(name)
        elif shape != wanted:
            raise UserError(
                f"{report.path}: {name} has shape {shape}, the model's is {wanted}; {hint}"
            )
    loaded = {targets[name].data_ptr() for name in report.loaded}  # tied ones stand there once
    unset = [name for name, target in targets.items() if target.data_ptr() not in loaded]
    report.initialised = [name for name in unset if name in may_be_missing]
    if names := [name for name in unset if name not in may_be_missing]:
        raise UserError(
            f"{report.path} leaves {len(names)} of the model's {len(targets)} parameters unset, "
            f"among them {names[:5]}; is it a checkpoint of this model, and {hint}"
        )


def _can_be_resampled(name: str, shape: tuple, wanted: tuple) -> bool:
    """Whether these are position embeddings (..., 1 + g^2, D) that differ in the grid alone."""
    if name not in POSITION_EMBEDDINGS or len(shape) < 2 or shape == wanted:
        return False
    same_but_for_tokens = (*shape[:-2], *shape[-1:]) == (*wanted[:-2], *wanted[-1:])
    return same_but_for_tokens and round((shape[-2] - 1) ** 0.5) ** 2 == shape[-2] - 1


def _resample(value: Tensor, target: Tensor) -> Tensor:
    """Position embeddings (..., 1 + g^2, D) on a target's grid; the class token's is kept."""
    grid = round((target.shape[-2] - 1) ** 0.5)
    value = value.view(1, *value.shape[-2:])
    resampled = resample_abs_pos_embed(value, [grid] * 2, interpolation="bicubic", antialias=False)
    return resampled.view(target.shape)
