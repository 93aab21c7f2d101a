"""Pictures in files: which there are, their pixels as RGB, and what is wrong with them."""

import os
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import UserError, mistaken_for

# formats that Pillow knows by name, but whose pixels it cannot read
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # EPS: with Ghostscript alone
PHOTOS = {".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".dng"}  # for other readers


class BadImageError(UserError):
    """An image file that is missing or cannot be decoded."""


def open_image(path: str | Path, on_white: bool = False) -> Image.Image:
    """Decodes an image as RGB with 8 bits, or raises BadImageError with the file's name."""
    try:
        with warnings.catch_warnings():
            # phones make such large pictures, data sets do not
            large = "ignore" if on_white else "error"
            warnings.simplefilter(large, Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image, on_white)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise what they meet in a damaged file
        why = mistaken_for(path) or str(error) or type(error).__name__
        raise BadImageError(f"cannot read image {path}: {why}. Mend or replace it") from error


def to_rgb(image: Image.Image, on_white: bool = False) -> Image.Image:
    """Converts to RGB as Pillow does, but grey of 16 bits, which Pillow clips, by its high byte.

    (The original code sees 16-bit grey as white.) With `on_white` it is turned as EXIF says, and
    transparent pixels become white; else they keep the colour under them, as the published models
    saw it. Other pixels than those of 8 or 16 bits raise a ValueError.
    """
    if on_white:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels ({image.mode}) are of unknown range: save it with 8 bits")
    if image.has_transparency_data and (on_white or image.mode == "P"):
        image = image.convert("RGBA")  # of a palette without the warning that RGB gives
    if image.mode in ("RGBA", "LA", "PA") and on_white:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def find_pictures(places: list[Path]) -> list[Path]:
    """The files among `places`, and the pictures in folders, by name.

    Hidden files, such as "._NAME" of Macs, are left out. The number of subfolders, and of
    photographs that Pillow cannot read, is printed.
    """
    known = Image.registered_extensions().items()  # which also fills OPEN
    known = {end for end, name in known if name in Image.OPEN and name not in UNREADABLE}
    pictures, passed, others = [], Counter(), ""
    for place in places:
        found = [] if place.is_dir() else [place]
        for file in sorted(place.glob("[!.]*")):
            ending = file.suffix.lower()
            if file.is_dir():
                passed["subfolder(s)"] += 1
            elif ending in known and file.is_file():
                found.append(file)
            elif ending in known | PHOTOS:  # a link that leads nowhere, too
                passed[f"{ending} file(s)"] += 1
        counts = ", ".join(f"{count} {what}" for what, count in sorted(passed.items()))
        others = counts and f"{counts} are not read"
        if not found:
            others = others and f" ({others})"
            raise UserError(f"there are no pictures in the folder {place}{others}")
        pictures += found
    if others:
        print(others, file=sys.stderr, flush=True)
    return pictures


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are no files; each folder is listed once."""
    listing = cache(_files_in)
    absent = (p for p in paths if os.path.basename(p) not in listing(os.path.dirname(p)))
    # a file system that takes a.JPG for a.jpg lists one name only
    return [path for path in absent if not os.path.isfile(path)]


def _files_in(folder: str) -> set[str]:
    """The names of a folder's files; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: no file system has such a name
        return set()


def instead_of(path: str) -> str:
    """What stands where a missing file should be: a link, no folder, a like name; or ""."""
    if os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist"
    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        while folder and not os.path.isdir(os.path.dirname(folder) or "."):
            folder = os.path.dirname(folder)
        return f"there is no folder {folder}"
    alike = min((other for other in _files_in(folder) if _stem(other) == _stem(name)), default="")
    return alike and f"{folder} has {alike!a} instead of {name!a}"


def _stem(name: str) -> str:
    """A file's name without its ending, in one case and one spelling of accents."""
    return unicodedata.normalize("NFC", os.path.splitext(name.strip())[0]).casefold()
