"""Reading checkpoints of every format that BLIP's and the paper's users have.

1. Official BLIP `.pth`: {"model": weights, ...}.
2. The paper's pruned files: {"model_state_dict": {"module.": weights}, ...}.
3. Hugging Face's BlipForConditionalGeneration folders (safetensors).
4. This project's own: `pruned.safetensors`, or the {"model": weights, ...} of a resume file.

No pickled code runs: safetensors, or torch.load with weights_only=True.
"""

import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from utils import UserError, is_main, main_process_first

POSITION_EMBEDDING = "visual_encoder.pos_embed"
_WRAPPERS = ("model", "model_state_dict", "state_dict")

# Hugging Face's names of BLIP's vision parameters; text parameters have the official names.
_HUGGING_FACE = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", POSITION_EMBEDDING),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.",
        r"visual_encoder.blocks.\1.attn.qkv.",
    ),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder.blocks.\1.attn.proj.",
    ),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.",
        r"visual_encoder.blocks.\1.norm\2.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
]


@dataclass
class LoadReport:
    """What became of a checkpoint's entries."""

    path: str
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for the log; names where they are few."""
        parts = [f"{self.path}: {len(self.loaded)} loaded"]
        for what in ("ignored", "resampled", "initialised"):
            names = getattr(self, what)
            if names:
                listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                label = "newly initialised" if what == "initialised" else what
                parts.append(f"{len(names)} {label} ({listed})")
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, path_or_url: str) -> LoadReport:
    """Loads weights in place; every parameter must be set.

    Position embeddings of another image size are resampled bicubically. A model may offer
    `adapt_state_dict(weights) -> (weights, may_be_missing)` to take weights of a relative; the
    parameters it names as possibly missing keep their initial values and are reported.

    Args:
        model: not wrapped in DistributedDataParallel.
        path_or_url: a file, a folder with safetensors, or an address, which is downloaded once
            into torch.hub's cache.

    Raises:
        ValueError: the file cannot be read, a shape differs, or a parameter stays unset.
    """
    weights = read_weights(path_or_url)
    may_be_missing: set[str] = set()
    if hasattr(model, "adapt_state_dict"):
        weights, may_be_missing = model.adapt_state_dict(weights)
    report = LoadReport(str(path_or_url))
    targets = model.state_dict()
    fitting = {}
    for name, value in weights.items():
        if name not in targets:
            report.ignored.append(name)
            continue
        if name == POSITION_EMBEDDING and value.shape != targets[name].shape:
            value = resample_position_embedding(value, targets[name])
            report.resampled.append(name)
        if value.shape != targets[name].shape:
            raise UserError(
                f"{path_or_url}: {name} has shape {tuple(value.shape)}, the model's is "
                f"{tuple(targets[name].shape)}; does the config's `vit` or `med_config` fit it?"
            )
        fitting[name] = value
        report.loaded.append(name)
    fitting.update(_tied(model, targets, fitting))
    unset = [name for name in targets if name not in fitting]
    report.initialised = [name for name in unset if name in may_be_missing]
    if len(unset) > len(report.initialised):
        names = [name for name in unset if name not in may_be_missing]
        raise UserError(
            f"{path_or_url} leaves {len(names)} of the model's {len(targets)} parameters unset, "
            f"among them {names[:5]}; is it a checkpoint of this model?"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def _tied(model: nn.Module, targets: dict, fitting: dict) -> dict:
    """Values for names whose storage a loaded name shares (safetensors keep one of them)."""
    by_storage = {targets[name].data_ptr(): value for name, value in fitting.items()}
    return {
        name: by_storage[tensor.data_ptr()]
        for name, tensor in targets.items()
        if name not in fitting and tensor.data_ptr() in by_storage
    }


def resample_position_embedding(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Position embeddings (1, 1 + g^2, D) of one grid to another's; the class token's is kept."""
    grids = [round((t.shape[1] - 1) ** 0.5) for t in (target, value)]
    return resample_abs_pos_embed(
        value,
        new_size=[grids[0]] * 2,
        old_size=[grids[1]] * 2,
        num_prefix_tokens=1,
        interpolation="bicubic",
        antialias=False,
    )


def read_weights(path_or_url: str) -> dict[str, torch.Tensor]:
    """Parameter name to tensor, under the official names, from any of the known formats.

    Raises:
        ValueError: there is no such file, or it is none of the formats.
    """
    path = _local(str(path_or_url))
    try:
        if path.is_dir():
            content = _read_folder(path)
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no file of weights, or holds more than tensors and plain values: pickled "
            "code is never run. Save the state_dict alone (torch.save or safetensors)"
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: expected a mapping, got {type(content)}")
    weights = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    return {_official_name(name): value for name, value in weights.items()}


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The pruned result of a run, or all safetensors (Hugging Face splits large models)."""
    own = folder / "pruned.safetensors"
    files = [own] if own.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no *.safetensors in the folder {folder}")
    return {name: value for file in files for name, value in load_file(file).items()}


def _official_name(name: str) -> str:
    name = name.removeprefix("module.")
    for pattern, replacement in _HUGGING_FACE:
        name, matched = re.subn(pattern, replacement, name)
        if matched:
            break
    return name


def _local(path_or_url: str) -> Path:
    """The file itself, or its copy in torch.hub's cache, downloaded if it is not there."""
    if urlparse(path_or_url).scheme not in ("http", "https"):
        if not Path(path_or_url).exists():
            raise UserError(f"there is no checkpoint {path_or_url}")
        return Path(path_or_url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(path_or_url).path).name
    with main_process_first():
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(path_or_url, str(cached), progress=is_main())
            except (URLError, OSError) as error:
                raise UserError(
                    f"cannot download {path_or_url} ({error}); fetch it on another machine and put "
                    f"it at {cached}, give its path as --pretrained, or try the demo config"
                ) from error
    return cached
