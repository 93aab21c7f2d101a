"""What every script needs: configs, atomic files, seeds, and one or several processes."""

import ctypes
import json
import os
import platform
import random
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
REQUIRED = object()
ANSWER_SECONDS = 30  # that a download waits for its server


class UserError(ValueError):
    """A mistake in what the user gave: flags, config, files, data. The message says the remedy.

    `engine.run.launch` ends a script with this one sentence and exit code 2. Every other exception
    is a fault of the program and keeps its traceback.
    """


# key -> (accepted types, default). A config may hold these keys and no others.
_MODEL_KEYS = {
    "pretrained": (str, ""),
    "vit": ((str, dict), REQUIRED),
    "vit_grad_ckpt": (bool, False),
    "vit_ckpt_layer": (int, 0),
    "med_config": ((str, dict), "configs/med_config.json"),
    "tokenizer": (str, "bert-base-uncased"),
    "image_size": (int, REQUIRED),
}
_RUN_KEYS = {
    "image_root": (str, REQUIRED),
    "ann_root": (str, REQUIRED),
    "id_profile": (str, ""),
    "init_lr": (float, REQUIRED),
    "min_lr": (float, 0.0),
    "weight_decay": (float, 0.0),
    "max_epoch": (int, REQUIRED),
    "augment": (bool, True),
    "num_workers": (int, 4),
}
CONFIG_KEYS = {
    "caption": {
        **_MODEL_KEYS,
        **_RUN_KEYS,
        "coco_gt_root": (str, REQUIRED),
        "batch_size": (int, REQUIRED),
        "prompt": (str, "a picture of "),
        "max_words": (int, 30),
        "max_length": (int, 20),
        "min_length": (int, 5),
        "num_beams": (int, 3),
        "length_normalization": (str, "total"),
    },
    "nlvr": {
        **_MODEL_KEYS,
        **_RUN_KEYS,
        "batch_size_train": (int, REQUIRED),
        "batch_size_test": (int, REQUIRED),
        "max_words": (int, 40),
    },
}


def load_config(path: str, overrides: dict | None = None, task: str | None = None) -> dict:
    """Reads an experiment from YAML and checks its keys.

    Args:
        path: YAML 1.2 file, so that `1e-5` is a number.
        overrides: values that replace the file's; None values are passed over.
        task: "caption" or "nlvr"; None takes the one whose keys the file has.

    Returns:
        Every key of the task, defaults filled in, plus "task".

    Raises:
        ValueError: the file is unreadable, or a key is unknown, missing or of the wrong type.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(Path(path).read_text())
    except (OSError, YAMLError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"the config {path} must be a mapping of keys to values")
    if task is None:
        task = "nlvr" if "batch_size_train" in raw else "caption"
    raw.update({key: value for key, value in (overrides or {}).items() if value is not None})
    known = CONFIG_KEYS[task]
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise UserError(f"{path}: unknown keys {unknown}; a {task} config has {sorted(known)}")
    missing = sorted(k for k, (_, default) in known.items() if default is REQUIRED and k not in raw)
    if missing:
        raise UserError(f"{path}: missing keys {missing}")
    config = {"task": task}
    for key, (types, default) in known.items():
        config[key] = _checked(path, key, raw[key], types) if key in raw else default
    return config


def _checked(path: str, key: str, value, types):
    """The value as one of the types; whole numbers pass as floats, booleans not as numbers."""
    if types is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, types) or (types is int and isinstance(value, bool)):
        names = [t.__name__ for t in (types if isinstance(types, tuple) else (types,))]
        raise UserError(f"{path}: {key} is {value!r}, but must be of type {' or '.join(names)}")
    return value


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Opens a file that appears under its name whole or not at all.

    The bytes go to a temporary file beside it, which is synced to disk and then renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content) -> None:
    """Writes JSON atomically, indented for reading."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Process:
    """One process of the run: its rank, how many there are, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def init_distributed(device: str = "auto", timeout_s: float = 3600.0) -> Process:
    """Joins the processes that torchrun started, or stands alone under plain `python`.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Under torchrun each
            process on "cuda" takes the GPU of its local rank.
        timeout_s: a collective that waits longer for another process ends this one. It covers the
            longest work of one process alone (scoring, a download); a process that dies closes its
            connections, which ends the others at once.

    Raises:
        ValueError: the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{device} is asked for, but torch sees no GPU: take --device cpu (ComputeID.py: --cpu)"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device)
    if chosen.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} is asked for, but there are {torch.cuda.device_count()}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        # host numbers go over gloo, so that exchanging them waits for no GPU
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Process(int(os.environ.get("RANK", 0)), world_size, chosen)


def keep_freed_memory(device: torch.device) -> None:
    """Lets glibc keep what is freed, instead of returning it to the kernel and asking anew.

    Forward passes and training steps on the CPU free gigabytes, and a page that comes back is
    zeroed first: a training step of BLIP base took 6.3 s without this and 5.2 s with it (batch 2,
    two cores), at the same peak of memory. A GPU's memory is kept by torch.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all processes; nothing where there is one."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Lets the main process run the block (a download, say) before the others do."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def download(url: str, path: str | Path) -> None:
    """Downloads a file; `path` appears once it is whole. Long downloads show a progress bar.

    Raises:
        OSError: there is no answer, the connection breaks, or the file cannot be written.
    """
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=str(path), delay=5.0)
            with bar, atomic_write(path, "wb") as file:
                while chunk := answer.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
                if file.tell() < size:
                    raise OSError(f"the connection broke after {file.tell()} of {size} bytes")
    except (OSError, HTTPException) as error:
        raise OSError(str(error) or type(error).__name__) from error
