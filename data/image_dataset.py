"""What caption and statement datasets share: images on disk, their errors, reproducible chance."""

import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from data.images import to_rgb
from data.records import listed
from data.samplers import derived_seed
from utils import UserError, mistaken_for


class BadImageError(UserError):
    """An image file that is missing or cannot be decoded."""


def open_image(path: str) -> Image.Image:
    """Decodes an image as RGB with 8 bits.

    Raises:
        BadImageError: If it cannot be done, for whatever reason; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise what they meet in a damaged file
        why = mistaken_for(path) or str(error) or type(error).__name__
        raise BadImageError(f"cannot read image {path}: {why}. Mend or replace it") from error


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are no files; each folder is listed once."""
    by_folder = defaultdict(list)
    for path in paths:
        folder, name = os.path.split(path)
        by_folder[folder].append(name)
    missing = []
    for folder, names in by_folder.items():
        present = _files_in(folder)
        absent = (os.path.join(folder, name) for name in names if name not in present)
        # a file system that takes a.JPG for a.jpg lists one name only
        missing += [path for path in absent if not os.path.isfile(path)]
    return missing


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


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seeds torch's CPU generator from `parts` inside the block and restores it after."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which nobody restores
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield


class ImageDataset(Dataset):
    """Records of an annotation file beside a folder of images.

    An item is asked for by its index or, in training, by `(index, epoch)`: its random choices
    depend on (seed, epoch, index) only, not on the process or the order of loading.

    Args:
        records: The annotation file's records.
        image_root: Folder that the records' image paths are relative to.
        transform: From an RGB PIL image to a tensor.
        seed: Seed of the random choices.

    Attributes:
        skip_bad_images: Whether an unreadable image is replaced by another sample (not in
            evaluation, which needs every image).
    """

    def __init__(
        self, records: list[dict], image_root: str | Path, transform: Callable, seed: int = 0
    ):
        self.records, self.image_root = records, Path(image_root)
        self.transform, self.seed = transform, seed
        self.skip_bad_images = False

    def load(self, index: int) -> tuple:
        """One item; random choices are drawn from torch's global generator."""
        raise NotImplementedError

    def image_names(self, index: int) -> list[str]:
        """The image files that an item is made of, as the annotation names them."""
        raise NotImplementedError

    def image_paths(self, index: int) -> list[str]:
        """The image files that an item is made of."""
        return [str(self.image_root / name) for name in self.image_names(index)]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        """The item of `fetch`."""
        return self.fetch(index)[0]

    def fetch(self, index: int | tuple[int, int]) -> tuple[tuple, int]:
        """Loads an item, or with `skip_bad_images` the next one whose images can be read.

        Args:
            index: Of the record, or (index, epoch); a plain index stands for epoch 0.

        Returns:
            The item, see the subclass, and how many were passed over for it.

        Raises:
            BadImageError: If an image cannot be read and is not to be skipped.
            UserError: If no image at all can be read.
        """
        first, epoch = index if isinstance(index, tuple) else (index, 0)
        for skipped in range(len(self)):
            place = (first + skipped) % len(self)
            try:
                with seeded(self.seed, epoch, place):
                    return self.load(place), skipped
            except BadImageError:
                if not self.skip_bad_images:
                    raise
        raise UserError(f"no image under {self.image_root} can be read (config key image_root)")

    def open(self, path: str) -> torch.Tensor:
        """The transformed image (3, S, S).

        Raises:
            BadImageError: If it cannot be read; the message tells the flag that passes it over.
        """
        try:
            image = open_image(path)
        except BadImageError as error:
            raise BadImageError(
                f"{error}; training and profiling go on without such images under --skip_bad_images"
            ) from error
        return self.transform(image)

    def is_readable(self, index: int) -> bool:
        """Whether all images of an item can be read."""
        try:
            for path in self.image_paths(index):
                open_image(path)
        except BadImageError:
            return False
        return True

    def check(self) -> None:
        """Looks whether all image files exist, in the listings of their folders; reads none.

        With `skip_bad_images` one that exists is enough.

        Raises:
            UserError: If the image root or an image does not exist.
        """
        if not self.image_root.is_dir():
            raise UserError(
                f"image folder {self.image_root} does not exist: set config key image_root to "
                "where the images are, or use a demo config (python -m data.scenes makes its data)"
            )
        names = {name for index in range(len(self)) for name in self.image_names(index)}
        missing = missing_files(os.path.join(self.image_root, name) for name in names)
        if missing and not (self.skip_bad_images and len(missing) < len(names)):
            why, absolute = instead_of(min(missing)), any(map(os.path.isabs, names))
            raise UserError(
                f"{len(missing)} of {len(names)} images do not exist: {listed(sorted(missing))}"
                f"{why and f'; {why}'}. They are named by the annotation file, so config keys "
                "image_root and ann_root must belong to the same data"
                + " (image_root is not for names that begin with /)"
                * absolute
            )
