"""What the datasets share: images on disk, and chance that repeats."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import Dataset

from data.captions import prompted
from data.images import BadImageError, instead_of, missing_files, open_image
from data.records import listed, read_all
from data.samplers import derived_seed
from data.transforms import build_transform
from utils import UserError


def build_sets(
    config: dict, classes: Sequence[Callable], readers: Sequence[Callable], seed: int
) -> tuple:
    """The training set and two held-out sets, from constructors and the records' readers."""
    augmented = build_transform(config["image_size"], config["augment"])
    plain = build_transform(config["image_size"], augment=False)
    transforms = (augmented, plain, plain)
    return tuple(
        build(rows, config["image_root"], transform, seed, config["max_words"])
        for build, rows, transform in zip(classes, read_all(*readers), transforms, strict=True)
    )


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seeds torch's CPU generator from `parts` inside the block and restores it after."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which nobody restores
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield


class ImageDataset(Dataset):
    """Records of an annotation file; their image paths are relative to `image_root`.

    An item is asked for by its index or, in training, by `(index, epoch)`: its random choices
    depend on (seed, epoch, index) only, not on the process or the order of loading.

    Attributes:
        text_key: key of a record's text, of which an item has `max_words` words behind `prompt`.
        skip_bad_images: whether another sample stands in for one whose image cannot be read.
    """

    text_key = "caption"
    skip_bad_images = False

    def __init__(self, records, image_root, transform, seed=0, max_words=0, prompt=""):
        self.records, self.image_root = records, Path(image_root)
        self.transform, self.seed = transform, seed
        self.max_words, self.prompt = max_words, prompt

    def text(self, index: int) -> str:
        """An item's prompt and normalised text, before random choices."""
        return prompted(self.prompt, self.records[index][self.text_key], self.max_words)

    def load(self, index: int) -> tuple:
        """One item, image and text; random choices are drawn from torch's global generator."""
        return self.open(*self.image_paths(index)), self.text(index)

    def image_names(self, index: int) -> list[str]:
        """The image files of an item, as the annotation names them."""
        return [self.records[index]["image"]]

    def image_paths(self, index: int) -> list[str]:
        """The image files of an item."""
        return [str(self.image_root / name) for name in self.image_names(index)]

    def keep_first(self, samples: int) -> None:
        """Drops all records but the first ones."""
        self.records = self.records[:samples]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        """The item of `fetch`."""
        return self.fetch(index)[0]

    def fetch(self, index: int | tuple[int, int]) -> tuple[tuple, int]:
        """An item, or with `skip_bad_images` the next one that can be read; and the number skipped.

        Raises:
            BadImageError: an image cannot be read and is not to be skipped.
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
        """The transformed image (3, S, S), or a BadImageError that names the flag to skip it."""
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
        """Looks for all image files in the listings of their folders."""
        if not self.image_root.is_dir():
            raise UserError(
                f"image folder {self.image_root} does not exist: set config key image_root to "
                "where the images are, or use a demo config (python -m data.scenes makes its data)"
            )
        names = {name for index in range(len(self)) for name in self.image_names(index)}
        missing = missing_files(os.path.join(self.image_root, name) for name in names)
        if missing and not (self.skip_bad_images and len(missing) < len(names)):
            why, absolute = instead_of(min(missing)), any(map(os.path.isabs, names))
            root = " (image_root is not for names that begin with /)" * absolute
            raise UserError(
                f"{len(missing)} of {len(names)} images do not exist: {listed(sorted(missing))}"
                f"{why and f'; {why}'}. They are named by the annotation file, so config keys "
                f"image_root and ann_root must belong to the same data{root}"
            )
