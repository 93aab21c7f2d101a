"""Annotation files: found, or downloaded from where BLIP's authors published them."""

import json
import shutil
import urllib.request
from pathlib import Path

from utils import UserError, atomic_write, barrier, is_main

PUBLISHED_AT = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
TIMEOUT = 30  # seconds without an answer


def annotation_file(root: str | Path, name: str) -> Path:
    """Finds an annotation file; the main process downloads it when it is missing.

    Where processes are distributed, all of them must call this.

    Args:
        root: Folder of annotation files; created for a download.
        name: File name, for instance `coco_karpathy_train.json`.

    Returns:
        The path of the file, which exists.

    Raises:
        UserError: If the file is missing and cannot be downloaded.
    """
    path, reason = Path(root) / name, "the main process could not download it"
    if is_main() and not path.is_file():
        try:
            download(f"{PUBLISHED_AT}/{name}", path)
        except OSError as error:
            reason = str(error)
    barrier()
    if not path.is_file():
        raise UserError(
            f"annotation file {path} is missing and could not be downloaded ({reason}). Download "
            f"{PUBLISHED_AT}/{name} yourself and put it at {path}; or use a demo config, which "
            "needs no download: python -m data.scenes makes its data"
        )
    return path


def download(url: str, path: Path) -> None:
    """Downloads a file; `path` appears only once it is complete."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            shutil.copyfileobj(response, file)


def read_annotation(root: str | Path, name: str) -> list[dict]:
    """Reads an annotation file that is a list of records, see `annotation_file`.

    Raises:
        ValueError: If the file is not JSON.
    """
    path = annotation_file(root, name)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"annotation file {path} is not valid JSON ({error}): delete it to download it again"
        ) from error
