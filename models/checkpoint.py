"""Loading checkpoints of every format that BLIP's and the paper's users have.

1. Official BLIP `.pth`: {"model": weights, ...}.
2. The paper's pruned files: {"model_state_dict": {"module.": weights}, ...}.
3. Hugging Face's BlipForConditionalGeneration folders (safetensors).
4. This project's own: `pruned.safetensors`, or the {"model": weights, ...} of a resume file.
5. Its compressed files (`models.compressed`).

Weights go from the file into the model tensor by tensor: there is no second copy of all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import compat  # noqa: F401

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models.layers import is_sparse
from models.weight_files import Entry, fetch, open_weights
from utils import UserError

POSITION_EMBEDDING = "visual_encoder.pos_embed"
CLIP_POSITION_EMBEDDING = "visual.positional_embedding"
SIZE_KEYS = "`vit` or `med_config`"  # of BLIP's configs
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")  # DDP, torch.compile, Lightning

# Our and Hugging Face's names of BLIP's vision parameters; text parameters have one name.
_VISION, _HF_VISION = "visual_encoder.", "vision_model."
_HUGGING_FACE = [
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    (POSITION_EMBEDDING, "vision_model.embeddings.position_embedding"),
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
    """What became of a checkpoint's entries."""

    path: str
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for the log; names where they are few."""
        parts = [f"{self.path}: {len(self.loaded)} loaded"]
        for what in ("ignored", "resampled", "initialised"):
            names = getattr(self, what)
            if names:
                listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                label = "newly initialised" if what == "initialised" else what
                parts.append(f"{len(names)} {label} ({listed})")
        parts += [f"prefix {prefix!r} removed" for prefix in self.prefixes]
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, path_or_url: str) -> LoadReport:
    """Loads weights in place; every parameter must be set.

    Position embeddings of another image size are resampled bicubically. A model may offer
    `adapt_state_dict(entries) -> (entries, may_be_missing)` to take weights of a relative; the
    parameters it names as possibly missing keep their initial values and are reported. Its
    `size_keys` name the config's keys for its sizes, where they are not BLIP's.

    Args:
        model: not wrapped in DistributedDataParallel.
        path_or_url: a file, a folder with safetensors, or an address, see `fetch`. No process waits
            for another here.

    Raises:
        UserError: the file cannot be read, a shape differs, or a parameter stays unset (the model
            is as before); or a weight is not finite, quantised or packed (the model is partly
            loaded).
    """
    if is_sparse(model):
        raise ValueError("the model is sparse already: load weights before `sparsify_`")
    report = LoadReport(str(path_or_url))
    entries = _official_names(open_weights(fetch(path_or_url)), report)
    may_be_missing: set[str] = set()
    if hasattr(model, "adapt_state_dict"):
        entries, may_be_missing = model.adapt_state_dict(entries)
    targets = model.state_dict()
    report.ignored = [name for name in entries if name not in targets]
    report.loaded = [name for name in entries if name in targets]
    size_keys = getattr(model, "size_keys", SIZE_KEYS)
    for name in report.loaded:
        _check_shape(report, name, entries[name].shape, tuple(targets[name].shape), size_keys)
    _check_complete(report, targets, may_be_missing, size_keys)
    for name in report.loaded:
        target = value = targets[name]
        if name in report.resampled:
            value = torch.empty(entries[name].shape)
        entries[name].read(value)
        if not _all_finite(value):
            raise UserError(
                f"{path_or_url}: {name} holds values that are not finite (inf or nan): the file is "
                "damaged, or its training diverged; take another checkpoint"
            )
        if name in report.resampled:
            target.copy_(resample_position_embedding(value, target))
    return report


def _official_names(entries: dict[str, Entry], report: LoadReport) -> dict[str, Entry]:
    """The same entries under the official names; prefixes that fell off go to the report."""
    renamed = {}
    for name, entry in entries.items():
        official = _PREFIXES.sub("", name)
        prefix = name.removesuffix(official)
        if prefix and prefix not in report.prefixes:
            report.prefixes.append(prefix)
        if official.startswith(_HF_VISION):
            for ours, theirs in _HUGGING_FACE:
                official = official.replace(theirs, ours)
        if official in renamed:
            raise UserError(
                f"{report.path} holds {official} twice, with and without a prefix or under two "
                "names: save the weights of one model alone"
            )
        renamed[official] = entry
    return renamed


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a captioner's parameter."""
    if name.startswith(_VISION):
        for ours, theirs in _HUGGING_FACE:
            name = name.replace(ours, theirs)
    return name


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that a file of weights holds: parameters, of tied ones the first name.

    Buffers (CLIP's momentum copy and queues) belong to a training run, not to its result.
    """
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def load_trained(model: nn.Module, path_or_url: str) -> LoadReport:
    """As `load_checkpoint`, but weights that are only a start for training are a mistake.

    Raises:
        UserError: as `load_checkpoint`, or a parameter keeps its initial values.
    """
    report = load_checkpoint(model, path_or_url)
    if report.initialised:
        raise UserError(
            f"{path_or_url} is a start for training, not trained weights: it lacks "
            f"{', '.join(report.initialised)}"
        )
    return report


def _check_shape(
    report: LoadReport, name: str, shape: tuple, wanted: tuple, size_keys: str
) -> None:
    """Shapes must be equal, but for position embeddings, which are resampled.

    Raises:
        UserError: they are not.
    """
    if shape == wanted:
        return
    if not _can_be_resampled(name, shape, wanted):
        raise UserError(
            f"{report.path}: {name} has shape {shape}, the model's is {wanted}; does the config's "
            f"{size_keys} fit it?"
        )
    report.resampled.append(name)


def _all_finite(value: Tensor) -> bool:
    """Whether a tensor holds no inf or nan, which its sum would inherit."""
    # float32's sum is 30 times as fast, but finite values may add up beyond its limit
    return bool(value.sum().isfinite()) or bool(value.sum(dtype=torch.float64).isfinite())


def _can_be_resampled(name: str, shape: tuple, wanted: tuple) -> bool:
    """Whether these are position embeddings (..., 1 + g^2, D) that differ in the grid alone."""
    if not name.endswith((POSITION_EMBEDDING, CLIP_POSITION_EMBEDDING)) or len(shape) < 2:
        return False
    same_but_for_tokens = (*shape[:-2], *shape[-1:]) == (*wanted[:-2], *wanted[-1:])
    return same_but_for_tokens and round((shape[-2] - 1) ** 0.5) ** 2 == shape[-2] - 1


def _check_complete(
    report: LoadReport, targets: dict[str, Tensor], may_be_missing: set, size_keys: str
) -> None:
    """Every parameter must be loaded, share its memory with one that is, or be allowed to miss.

    Raises:
        UserError: with the names of those that are not.
    """
    loaded = {targets[name].data_ptr() for name in report.loaded}  # of tied ones a file has one
    unset = [name for name, target in targets.items() if target.data_ptr() not in loaded]
    report.initialised = [name for name in unset if name in may_be_missing]
    names = [name for name in unset if name not in may_be_missing]
    if names:
        raise UserError(
            f"{report.path} leaves {len(names)} of the model's {len(targets)} parameters unset, "
            f"among them {names[:5]}; is it a checkpoint of this model, and does the config's "
            f"{size_keys} fit it?"
        )


def resample_position_embedding(value: Tensor, target: Tensor) -> Tensor:
    """Position embeddings (..., 1 + g^2, D) of one grid to another's; the class token's is kept.

    Args:
        value: of the first grid, one embedding.
        target: of the other grid; only its shape counts.
    """
    grids = [round((t.shape[-2] - 1) ** 0.5) for t in (target, value)]
    resampled = resample_abs_pos_embed(
        value.view(1, *value.shape[-2:]),
        new_size=[grids[0]] * 2,
        old_size=[grids[1]] * 2,
        num_prefix_tokens=1,
        interpolation="bicubic",
        antialias=False,
    )
    return resampled.view(target.shape)
