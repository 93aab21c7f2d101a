"""Annotation files: found, or downloaded from where BLIP's authors published them."""

from pathlib import Path

import torch
import torch.distributed as dist

from engine.processes import is_main
from utils import UserError, download

PUBLISHED_AT = "https://storage.googleapis.com/sfr-vision-language-research/datasets"


def annotation_files(*wanted: tuple[str | Path, str]) -> list[Path]:
    """Finds files, by folder and name; the main process downloads those that are missing.

    Every process of a run must call it.
    """
    paths = [Path(root) / name for root, name in wanted]
    reason = [_download_missing(paths) if is_main() else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(reason, device=torch.device("cpu"))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        files = "".join(f"\n  {PUBLISHED_AT}/{path.name} to {path}" for path in missing)
        raise UserError(
            f"annotation files are missing ({reason[0] or 'the main process has them'}). Put{files}"
            "\nor use a demo config, which needs none of them: python -m data.scenes makes its data"
        )
    return paths


def _download_missing(paths: list[Path]) -> str:
    """Downloads until one fails; returns why it failed, or an empty string."""
    for path in (path for path in paths if not path.is_file()):
        try:
            download(f"{PUBLISHED_AT}/{path.name}", path)
            with open(path, "rb") as file:
                start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n")
            if not start.startswith((b"[", b"{")):
                path.unlink()  # a portal's or proxy's page, which this process has just written
                return f"what {PUBLISHED_AT}/{path.name} answers is not JSON; is it a proxy's page?"
        except OSError as error:
            return f"the download failed: {error}"
    return ""
