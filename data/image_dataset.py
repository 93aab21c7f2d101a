"""What caption and statement datasets share: images on disk, their errors, reproducible chance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from data.samplers import derived_seed
from utils import UserError


class BadImageError(ValueError):
    """An image file that is missing or cannot be decoded."""


def open_image(path: str) -> Image.Image:
    """Decodes an image as RGB.

    Raises:
        BadImageError: If the file is missing or damaged; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL reports a damaged PNG as a SyntaxError
        raise BadImageError(f"cannot read image {path}: {error}") from error


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds torch's CPU generator from `numbers` inside the block and restores it after."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which nobody restores
        torch.default_generator.manual_seed(derived_seed(*numbers))
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
        skip_bad_images: Whether an unreadable image is replaced by the next sample (for training).
        bad_images: How often that happened, counted over all loader workers.
    """

    def __init__(
        self, records: list[dict], image_root: str | Path, transform: Callable, seed: int = 0
    ):
        self.records, self.image_root = records, Path(image_root)
        self.transform, self.seed = transform, seed
        self.skip_bad_images = False
        self.bad_images = torch.zeros((), dtype=torch.int64).share_memory_()

    def load(self, index: int) -> tuple:
        """One item; random choices are drawn from torch's global generator."""
        raise NotImplementedError

    def image_paths(self, index: int) -> list[str]:
        """The image files that an item is made of."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        """The item, see the subclass; a plain index stands for epoch 0."""
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        for _ in range(len(self)):
            try:
                with seeded(self.seed, epoch, index):
                    return self.load(index)
            except BadImageError:
                if not self.skip_bad_images:
                    raise
                self.bad_images += 1
                index = (index + 1) % len(self)
        raise UserError(f"no image under {self.image_root} can be read (config key image_root)")

    def open(self, path: str) -> torch.Tensor:
        """The transformed image (3, S, S)."""
        return self.transform(open_image(path))

    def check(self, sample: int = 20) -> None:
        """Reads some images, so that a wrong folder fails before a run and not within it.

        With `skip_bad_images` no image is read.

        Args:
            sample: Records to try, evenly spaced.

        Raises:
            UserError: If the image root or one of the images does not exist.
            ValueError: If there are no records, or an image is damaged.
        """
        if not self.records:
            raise UserError("the annotation file has no records: is config key ann_root right?")
        if not self.image_root.is_dir():
            raise UserError(
                f"image folder {self.image_root} does not exist: set config key image_root to "
                "where the images are, or use a demo config (python -m data.scenes makes its data)"
            )
        if self.skip_bad_images:
            return
        for index in range(0, len(self), max(1, len(self) // sample)):
            for path in self.image_paths(index):
                if not Path(path).is_file():
                    raise UserError(
                        f"image {path} does not exist: it is named by the annotation file, so "
                        "config keys image_root and ann_root must belong to the same data"
                    )
                open_image(path)
