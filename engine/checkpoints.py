"""Files of a training run that survive being killed: written whole, and checkpoints kept a few."""

import pickle
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from models.checkpoint import stored_tensors
from pruners.pruner import Pruner
from reports.runs import CHECKPOINTS
from utils import UserError, atomic_write

_ENTRIES = {"model", "optimizer", "pruner", "progress", "identity", "rng"}


def step_files(folder: Path, after: int = -1) -> list[Path]:
    """The checkpoints of a run, newest first; those later than a step."""
    files = folder.glob(f"step_{'[0-9]' * 8}.pt")
    return sorted((file for file in files if int(file.stem[5:]) > after), reverse=True)


def save_checkpoint(
    folder: Path, step: int, content: dict, keep: int, replaced: list[Path]
) -> None:
    """Writes `step_XXXXXXXX.pt`; then deletes `replaced`, and all others but the `keep` newest."""
    path = folder / f"step_{step:08d}.pt"
    with atomic_write(path, "wb") as file:
        torch.save(content, file)
    for old in replaced:
        if old != path:
            old.unlink(missing_ok=True)
    for old in step_files(folder)[keep:]:
        old.unlink()


def read_checkpoint(path: Path) -> dict:
    """Reads one checkpoint; its tensors are mapped from the file until they are copied."""
    content = None
    if path.suffix != ".safetensors" and not path.is_dir():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            why = (str(error) or repr(error)).splitlines()[0]
            raise UserError(f"the checkpoint {path} is not whole: {why}") from error
    if not isinstance(content, dict) or not _ENTRIES <= content.keys():
        raise UserError(
            f"--resume {path}: no checkpoint of a training run, which is a step_*.pt in its "
            "checkpoints/ (auto, the default, finds it). Weights go to --pretrained (to train from "
            "them) or to --pruned (to evaluate them)"
        )
    return content


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a plain model's weights as safetensors; of tied parameters only the first name."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in stored_tensors(model)}
    with atomic_write(path, "wb") as file:
        file.write(safetensors.torch.save(weights))


def check_disk_space(folder: Path, model: nn.Module, pruner: Pruner | None, keep: int) -> None:
    """Refuses a run whose files do not fit on the disk; the files that it replaces count as room.

    A checkpoint holds weights, two averages of AdamW and those of the pruner, in float32.
    """
    parameters = sum(p.numel() for p in model.parameters())
    averages = [x for kind in pruner.score.state.values() for x in kind.values()] if pruner else []
    checkpoint = 4 * (3 * parameters + sum(map(torch.numel, averages)))
    needed = (keep + 1) * checkpoint + 3 * 4 * parameters
    own = [*step_files(folder / CHECKPOINTS), *folder.glob("*.safetensors")]
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in own)
    if free < needed:
        raise UserError(
            f"the run needs {needed / 1e9:.1f} GB in {folder} ({keep + 1} checkpoints of "
            f"{checkpoint / 1e9:.1f} GB and three files of weights), but {free / 1e9:.1f} GB are "
            "free: make room, lower --keep_checkpoints, or choose another --output_dir"
        )
