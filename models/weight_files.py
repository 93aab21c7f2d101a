"""Files of weights, opened without reading them: each tensor is read when it is wanted.

A file is safetensors (dense, or compressed as `models.compressed` writes it) or what torch.save
wrote. A folder is a run's results or Hugging Face's. No pickled code runs.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models import compressed
from utils import UserError, download, mistaken_for

_BLIP_MODELS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/"
RUN_WEIGHTS = "pruned.safetensors"  # in the folder of a run
INDEX = "model.safetensors.index.json"  # Hugging Face's: {"weight_map": {tensor: file}}
_SHARD = re.compile(r"^(.+)-(\d+)-of-(\d+)\.safetensors$")
_WRAPPERS = ("model", "model_state_dict", "state_dict")
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not eight bits to scale
_MAPPED = 32 << 20  # bytes of a mapped file that may stay in memory
_UNREADABLE = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError)
_UNREADABLE += (pickle.UnpicklingError,)
_GLOBAL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")  # in torch's sentence on pickled code


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        shape: of the tensor.
        read: reads it into a tensor of this shape, of any type and on any device.
    """

    shape: tuple[int, ...]
    read: Callable[[Tensor], object]


def fetch(path_or_url: str | Path) -> Path:
    """The file or folder itself, or the copy of an address, downloaded if it is not there yet.

    Copies lie in torch.hub's folder. No process waits for another here: where they are distributed,
    all call this inside `utils.main_process_first`.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    address = urlparse(str(path_or_url))
    if address.scheme not in ("http", "https"):
        if not Path(path_or_url).exists():
            raise UserError(
                f"there is no checkpoint {path_or_url}: give a file, a folder, or an address with "
                "http, such as https://huggingface.co/NAME/resolve/main/model.safetensors"
            )
        return Path(path_or_url)
    url, cache = str(path_or_url), Path(torch.hub.get_dir(), "checkpoints")
    # BLIP's own code keeps its files by name alone; of others two may have one name
    published = url.startswith(_BLIP_MODELS)
    copy = cache / (Path(address.path).name if published else f"{address.netloc}{address.path}")
    if not copy.exists():
        try:
            download(url, copy)
        except UserError as error:  # of the disk
            raise UserError(
                f"{error}: set TORCH_HOME to a folder that can be written, or download {url} "
                "yourself and give its path"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot download {url} ({error}): fetch it on another machine and put it at "
                f"{copy}, give its path as --pretrained, or try the demo config"
            ) from error
    return copy


def open_weights(path: Path) -> dict[str, Entry]:
    """The tensors of a file or folder, by the names that stand there.

    Raises:
        UserError: it cannot be read, is none of the formats, or does not say what belongs together.
    """
    if path.is_dir():
        return _open_files(_files_of_folder(path))
    if path.name == INDEX:
        return _open_files(_files_of_index(path))
    return _open_file(path)


def _open_files(files: dict[Path, set[str] | None]) -> dict[str, Entry]:
    """Merges files; of each the tensors that are wanted, None being all."""
    merged, found_in = {}, {}
    for file, wanted in files.items():
        entries = _open_file(file)
        missing = sorted((wanted or set()) - set(entries))
        if missing:
            raise UserError(f"{file} has no tensor {missing[0]}, which {INDEX} says is there")
        for name in entries if wanted is None else wanted:
            if name in found_in:
                raise UserError(
                    f"both {found_in[name]} and {file.name} in {file.parent} have a tensor {name}: "
                    "they are no shards of one model; give one of them as the file itself"
                )
            merged[name], found_in[name] = entries[name], file.name
    return merged


def _files_of_folder(folder: Path) -> dict[Path, set[str] | None]:
    """Which files of a folder are read, and which of their tensors."""
    if (folder / RUN_WEIGHTS).exists():
        return {folder / RUN_WEIGHTS: None}
    if (folder / INDEX).exists():
        return _files_of_index(folder / INDEX)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(_why_nothing_is_read(folder))
    shards = [_SHARD.match(file.name) for file in files]
    if any(shards):
        _check_shards(folder, shards)
    elif len(files) > 1:
        raise UserError(
            f"{folder} has several files of weights ({_few(file.name for file in files)}) and no "
            f"{INDEX} that says what belongs together: give one of them as the file itself"
        )
    return dict.fromkeys(files)


def _files_of_index(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for tensor, file in weight_map.items():
            files.setdefault(index.parent / Path(file).name, set()).add(tensor)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors: {error!r}") from error
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {index.name} names it: copy it there too")
    return files


def _check_shards(folder: Path, shards: list[re.Match | None]) -> None:
    """Without an index, files are one model if their names count from 1 to the number they say."""
    if None in shards or len({(shard[1], shard[3]) for shard in shards}) > 1:
        raise UserError(
            f"{folder} has shards and other files of weights, and no {INDEX} that says what "
            "belongs together: add the index, or remove what is of another model"
        )
    stem, _, total = shards[0].groups()
    there = {shard[2] for shard in shards}
    for number in range(1, int(total) + 1):
        if f"{number:0{len(total)}}" not in there:
            name = f"{stem}-{number:0{len(total)}}-of-{total}.safetensors"
            raise UserError(f"{folder / name} is missing, one of {int(total)} shards")


def _why_nothing_is_read(folder: Path) -> str:
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        return (
            f"{folder} has {_few(file.name for file in pickles)}, but of a folder only safetensors "
            'are read. Convert it: python -c "from transformers import BlipForConditionalGeneration'
            f" as B; B.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
        )
    others = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".pth", ".pt")]
    hint = f"; give one of its files itself: {_few(others)}" if others else ""
    return f"no *.safetensors in the folder {folder}{hint}"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _open_file(path: Path) -> dict[str, Entry]:
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # behind the length of a header in JSON
        return _open_safetensors(path) if is_safetensors else _open_pickle(path)
    except _UNREADABLE as error:
        why = _why_unreadable(path, error)
        raise UserError(f"cannot read weights from {path}: {why}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is that is none of the formats, or what it holds besides weights."""
    if "TorchScript" in str(error):
        return "it is a compiled program (TorchScript): save the model's state_dict alone"
    if "central directory" in str(error):
        return "its end is missing: copy or download it again"
    if path.suffix == ".safetensors" and zipfile.is_zipfile(path):
        return "it is what torch.save writes: rename it to .pth"
    found = isinstance(error, pickle.UnpicklingError) and _GLOBAL.search(str(error))
    if not found:
        why = "it is neither safetensors nor what torch.save writes"
        other = not isinstance(error, pickle.UnpicklingError) and str(error)
        return mistaken_for(path) or other or why
    return (
        f"it holds {found[1]} beside tensors and plain values, and pickled code is never run here. "
        "If you trust the file, save its weights alone, with its key of them for 'model': python "
        f"-c \"import torch; content = torch.load('{path}', 'cpu', weights_only=False); "
        "torch.save(content['model'], 'NEW.pth')\" (or content.state_dict(), of a whole model)"
    )


class SafetensorsFile:
    """A safetensors file whose tensors are read one by one.

    Pages of a mapped file that were read count as the process's memory until the file is closed, so
    it is opened anew from time to time; for each tensor would take longer than to read it.
    """

    def __init__(self, path: Path):
        """Opens the file."""
        self.path = path
        self._open()

    def _open(self) -> None:
        self._file, self._bytes_read = safe_open(self.path, "pt"), 0

    def metadata(self) -> dict[str, str]:
        """What the file says beside its tensors."""
        return self._file.metadata() or {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors."""
        names = self._file.keys()
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def get(self, name: str) -> Tensor:
        """A tensor, perhaps in the file's own pages: copy it, and let go of it."""
        if self._bytes_read > _MAPPED:
            self._open()
        tensor = self._file.get_tensor(name)
        self._bytes_read += tensor.nbytes
        return tensor


def _open_safetensors(path: Path) -> dict[str, Entry]:
    file = SafetensorsFile(path)
    shapes = file.shapes()
    metadata = file.metadata()
    packed = compressed.shapes(path, metadata, shapes) if compressed.claims(metadata) else {}
    for name in packed:
        for part in compressed.parts(name):
            del shapes[part]
    return {name: Entry(shape, partial(_read, file, name)) for name, shape in shapes.items()} | {
        name: Entry(shape, partial(_read_packed, file, name)) for name, shape in packed.items()
    }


def _read(file: SafetensorsFile, name: str, target: Tensor) -> None:
    _copy(file.path, name, file.get(name), target)


def _read_packed(file: SafetensorsFile, name: str, target: Tensor) -> None:
    bitmask, values = (file.get(part) for part in compressed.parts(name))
    try:
        compressed.unpack_into(target, bitmask, values)
    except ValueError as error:
        raise UserError(f"the compressed file {file.path} is damaged: {name}: {error}") from error


def _copy(path: Path, name: str, value: Tensor, target: Tensor) -> None:
    """Copies a weight, but none whose numbers mean something else than the model's."""
    if value.dtype not in _WEIGHTS or value.layout != torch.strided or value.is_meta:
        kind = "of device meta" if value.is_meta else f"{value.dtype}, {value.layout}"
        raise UserError(
            f"{path}: {name} is {kind}, but weights must be dense, and float32, float16 or "
            "bfloat16: save them before they are quantised or packed"
        )
    target.copy_(value)


def _open_pickle(path: Path) -> dict[str, Entry]:
    # what torch.save writes since 2020 is a zip file, from which tensors can be mapped
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: expected a mapping, got {type(content)}")
    weights = {name: w for name, w in content.items() if isinstance(w, Tensor)}
    if not weights or not all(isinstance(name, str) for name in weights):
        found = _few(map(str, content)) or "nothing"
        raise UserError(
            f"{path} is no mapping of names to tensors, but has {found}: save such a mapping "
            "alone, or under the key 'model'"
        )
    return {
        name: Entry(tuple(weight.shape), partial(_copy, path, name, weight))
        for name, weight in weights.items()
    }
