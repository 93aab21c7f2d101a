"""Checkpoints that survive being killed: written whole, kept a few, read back newest first."""

import pickle
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from utils import UserError, atomic_write

_STEP_FILE = re.compile(r"^step_(\d{8})\.pt$")


def step_files(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((p for p in folder.glob("step_*.pt") if _STEP_FILE.match(p.name)), reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Writes `step_XXXXXXXX.pt` atomically, then deletes all but the newest.

    Args:
        folder: of the run's checkpoints; one process writes to it.
        step: optimizer steps that were taken.
        state: tensors and plain values only, so that it can be read with weights_only=True.
        keep: how many checkpoints stay, this one included.

    Returns:
        The file.
    """
    path = folder / f"step_{step:08d}.pt"
    with atomic_write(path, "wb") as file:
        torch.save(state, file)
    for old in step_files(folder)[keep:]:
        old.unlink()
    return path


def remove_unfinished(folder: Path) -> None:
    """Deletes the temporary files of writes that were killed."""
    for temporary in folder.glob(".step_*"):
        temporary.unlink()


def read_checkpoint(path: Path) -> dict:
    """Reads one checkpoint; its tensors are mapped from the file until they are copied.

    Raises:
        ValueError: the file is not there or not whole.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint {path} is not whole: {error}") from error


def load_newest(folder: Path) -> tuple[dict, Path, list[str]] | None:
    """Reads the newest whole checkpoint of a run.

    Returns:
        Its content, its path and a sentence for every newer one that is not whole; None where the
        folder holds no checkpoint.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    broken = []
    for path in step_files(folder):
        try:
            return read_checkpoint(path), path, broken
        except ValueError as error:
            broken.append(str(error).splitlines()[0])
    if broken:
        raise UserError(
            "; ".join(broken) + f"; no checkpoint in {folder} is whole: --resume off starts again"
        )
    return None


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights as safetensors, atomically; of tied parameters only the first name.

    Args:
        model: not wrapped in DistributedDataParallel.
        path: of the file.
    """
    weights, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.cpu().contiguous()
    with atomic_write(path, "wb") as file:
        file.write(safetensors.torch.save(weights))


def check_disk_space(folder: Path, model: nn.Module, pruner_numbers: int, keep: int) -> None:
    """Checks that the run's files will fit on the disk.

    Args:
        folder: of the run's results.
        model: whose weights and AdamW averages (two a parameter) go into a checkpoint.
        pruner_numbers: float32 numbers that the pruner saves besides.
        keep: checkpoints that stay; one more is there while a new one is written.

    Raises:
        ValueError: with the space needed and the space free.
    """
    parameters = sum(p.numel() for p in model.parameters())
    checkpoint = 4 * (3 * parameters + pruner_numbers)
    needed = (keep + 1) * checkpoint + 2 * 4 * parameters
    reusable = sum(path.stat().st_size for path in step_files(folder / "checkpoints"))
    free = shutil.disk_usage(folder).free + reusable
    if free < needed:
        raise UserError(
            f"the run needs {needed / 1e9:.1f} GB in {folder} ({keep + 1} checkpoints of "
            f"{checkpoint / 1e9:.1f} GB and the weights), but {free / 1e9:.1f} GB are free: make "
            "room, lower --keep_checkpoints, or choose another --output_dir"
        )


def rng_state() -> dict[str, torch.Tensor]:
    """State of this process's generators that a training step draws from: torch's."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restores what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
