"""Files of weights (safetensors or torch.save's) and folders of them as dicts of tensors.

Tensors are mapped from the file: what is not used is not read. No pickled code runs.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models import compressed
from models.compressed import Packed
from utils import UserError, download, mistaken_for

_BLIP_MODELS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/"
RUN_WEIGHTS = "pruned.safetensors"  # in the folder of a run
INDEX = "model.safetensors.index.json"  # Hugging Face's: {"weight_map": {tensor: file}}
_PART = 32 << 20  # bytes of a file that are mapped together
_UNREADABLE = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError)
_UNREADABLE += (pickle.UnpicklingError,)
_GLOBAL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")  # in torch's sentence on pickled code


def fetch(path_or_url: str | Path) -> Path:
    """The file or folder itself, or an address's copy in torch.hub's folder, downloaded once.

    No process waits for another here: call this inside `engine.processes.main_process_first`.
    """
    url = str(path_or_url)
    address = urlparse(url)
    if address.scheme not in ("http", "https"):
        if not Path(path_or_url).exists():
            raise UserError(
                f"there is no checkpoint {url}: give a file, a folder, or an address with http, "
                "such as https://huggingface.co/NAME/resolve/main/model.safetensors"
            )
        return Path(path_or_url)
    # BLIP's own code keeps its files by name alone; two others may have one name
    published = url.startswith(_BLIP_MODELS)
    name = Path(address.path).name if published else f"{address.netloc}{address.path}"
    copy = Path(torch.hub.get_dir(), "checkpoints", name)
    if not copy.exists():
        try:
            download(url, copy)
        except (OSError, ValueError) as error:  # of the network or the disk
            raise UserError(
                f"cannot download {url} ({error}): put it at {copy} (set TORCH_HOME to move that "
                "folder), give the path of a copy as --pretrained, or try the demo config"
            ) from error
    return copy


def open_weights(path: Path) -> dict[str, Tensor | Packed]:
    """The tensors of a file or folder, by their names in it."""
    if path.is_dir():
        path = _file_of_folder(path)
    if path.name == INDEX:
        return _open_shards(path)
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # behind the length of a header in JSON
        return _open_safetensors(path) if is_safetensors else _open_pickle(path)
    except _UNREADABLE as error:
        raise UserError(
            f"cannot read weights from {path}: {_why_unreadable(path, error)}"
        ) from error


def _file_of_folder(folder: Path) -> Path:
    """The file of weights in a folder, or the index of several."""
    for name in (RUN_WEIGHTS, INDEX):
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(
            f"{folder} has several files of weights ({_few(files)}) and no {INDEX} that says what "
            "belongs together: add it, or give one of them as the file itself"
        )
    if pickles := sorted(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has {_few(pickles)}, but of a folder only safetensors are read. Convert it: "
            'python -c "from transformers import BlipForConditionalGeneration as B; '
            f"B.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
        )
    others = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    hint = f"; give one of its files itself: {_few(others)}" if others else ""
    raise UserError(f"no *.safetensors in the folder {folder}{hint}")


def _few(names: list) -> str:
    names = [name.name if isinstance(name, Path) else str(name) for name in names]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, several where there is an index."""
    single = folder / "model.safetensors"  # transformers passes others by
    path = single if single.exists() else _file_of_folder(folder)
    return sorted(set(_shards(path)[1].values())) if path.name == INDEX else [path]


def _shards(index: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """An index's file of each tensor, and the path of each file."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        shards = {file: index.parent / Path(file).name for file in weight_map.values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors: {error!r}") from error
    for path in shards.values():
        if not path.exists():
            raise UserError(f"{path} is missing, though {INDEX} names it: copy it there too")
    return weight_map, shards


def _open_shards(index: Path) -> dict[str, Tensor | Packed]:
    """Each tensor from the file that the index names for it."""
    weight_map, shards = _shards(index)
    opened = {file: open_weights(path) for file, path in shards.items()}
    for name, file in weight_map.items():
        if name not in opened[file]:
            raise UserError(f"{shards[file]} has no tensor {name}, which {INDEX} says is there")
    return {name: opened[file][name] for name, file in weight_map.items()}


def _open_safetensors(path: Path) -> dict[str, Tensor | Packed]:
    """Maps the file anew for every part, because what was read is memory until its mapping goes."""
    weights, size = {}, _PART
    with safe_open(path, "pt") as file:
        names, metadata = file.offset_keys(), file.metadata() or {}
    for name in names:
        if size >= _PART:
            file, size = safe_open(path, "pt"), 0
        weights[name] = file.get_tensor(name)
        size += weights[name].nbytes
    return compressed.joined(path, metadata, weights)


def _open_pickle(path: Path) -> dict[str, Tensor]:
    # what torch.save writes since 2020 is a zip file, from which tensors can be mapped
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: expected a mapping, got {type(content)}")
    wrapped = (content.get(key) for key in ("model", "model_state_dict", "state_dict"))
    content = next((value for value in wrapped if isinstance(value, dict)), content)
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f"{path} is no mapping of names to tensors, but has {_few([*content]) or 'nothing'}: "
            "save such a mapping alone, or under the key 'model'"
        )
    return weights


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is that is none of the formats, or what it holds besides weights."""
    if "TorchScript" in str(error):
        return "it is a compiled program (TorchScript): save the model's state_dict alone"
    if re.search("central directory|not fully covered|invalid header length", str(error)):
        return "its end is missing: copy or download it again"
    if path.suffix == ".safetensors" and zipfile.is_zipfile(path):
        return "it is what torch.save writes: rename it to .pth"
    pickled = isinstance(error, pickle.UnpicklingError)
    if pickled and (found := _GLOBAL.search(str(error))):
        return (
            f"it holds {found[1]} beside tensors and plain values, and pickled code is never run. "
            "If you trust the file, save its weights alone, with its key of them for 'model': "
            f"python -c \"import torch; content = torch.load('{path}', 'cpu', weights_only=False); "
            "torch.save(content['model'], 'NEW.pth')\" (or content.state_dict(), of a whole model)"
        )
    why = "" if pickled else str(error)
    return mistaken_for(path) or why or "it is neither safetensors nor what torch.save writes"
