"""Pictures in files: which there are, and their pixels as RGB."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts as Pillow does, and grey of 16 bits, which Pillow cuts off at 255, by its high byte.

    That is what Pillow makes of colours of 16 bits. (The original code sees 16-bit grey as white.)

    Raises:
        ValueError: If the pixels are integers of 32 bits or floats, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels ({image.mode}) are of unknown range: save it with 8 bits")
    return image.convert("RGB")


def find_pictures(places: list[Path]) -> list[Path]:
    """The files among `places`, and in folders those whose names end as pictures' do.

    Raises:
        UserError: a folder has none.
    """
    pictures = []
    for place in places:
        if not place.is_dir():
            pictures.append(place)
            continue
        known = Image.registered_extensions()
        found = sorted(file for file in place.iterdir() if file.suffix.lower() in known)
        if not found:
            raise UserError(f"there are no pictures in the folder {place}")
        pictures += found
    return pictures
