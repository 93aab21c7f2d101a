"""Flickr30k's images and captions for retrieval, and any data of the same layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from data.annotation import annotation_files
from data.captions import normalize_caption
from data.image_dataset import ImageDataset
from data.records import RETRIEVAL_EVALUATION, RETRIEVAL_TRAINING, read_all, read_records
from data.transforms import build_transform

SPLITS = ("train", "val", "test")


class FlickrTrainDataset(ImageDataset):
    """Items `(image (3, S, S), normalised caption, integer image id)`.

    The integers count the annotation's image ids from 0 in the order in which they first appear.

    Args:
        records: Dictionaries with `image`, `caption` (one) and `image_id`.
        image_root: See `ImageDataset`.
        transform: See `ImageDataset`.
        max_words: Longest caption.
        seed: See `ImageDataset`.
    """

    def __init__(
        self,
        records: list[dict],
        image_root: str | Path,
        transform: Callable,
        max_words: int,
        seed: int = 0,
    ):
        super().__init__(records, image_root, transform, seed)
        self.max_words = max_words
        numbers = {}
        self.image_ids = [
            numbers.setdefault(record["image_id"], len(numbers)) for record in records
        ]

    def image_names(self, index: int) -> list[str]:
        """The item's image file, below the image root."""
        return [self.records[index]["image"]]

    def load(self, index: int) -> tuple[torch.Tensor, str, int]:
        """The item, see the class."""
        return self.open(*self.image_paths(index)), self.text(index), self.image_ids[index]

    def text(self, index: int) -> str:
        """The item's caption."""
        return normalize_caption(self.records[index]["caption"], self.max_words)


class FlickrEvalDataset(ImageDataset):
    """The images of a held-out split: items `(image (3, S, S), index)`.

    Args:
        records: Dictionaries with `image` and `caption` (several).
        image_root: See `ImageDataset`.
        transform: See `ImageDataset`.
        max_words: Longest caption.

    Attributes:
        texts: `TextDataset` of all captions, those of the first image first.
        image_of_text: (T,) int64, the index of each text's image.
    """

    def __init__(
        self, records: list[dict], image_root: str | Path, transform: Callable, max_words: int
    ):
        super().__init__(records, image_root, transform)
        pairs = [(n, text) for n, record in enumerate(records) for text in record["caption"]]
        self.texts = TextDataset([normalize_caption(text, max_words) for _, text in pairs])
        self.image_of_text = torch.tensor([n for n, _ in pairs])

    def image_names(self, index: int) -> list[str]:
        """The item's image file, below the image root."""
        return [self.records[index]["image"]]

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """The item, see the class."""
        return self.open(*self.image_paths(index)), index


class TextDataset(Dataset):
    """Items `(text, index)`."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """The item, see the class."""
        return self.fetch(index)[0]

    def fetch(self, index: int) -> tuple[tuple[str, int], int]:
        """The item, and that none was passed over for it, as `ImageDataset.fetch`."""
        return (self.texts[index], index), 0


def build_flickr_datasets(
    config: dict, seed: int = 0
) -> tuple[FlickrTrainDataset, FlickrEvalDataset, FlickrEvalDataset]:
    """Builds the three splits; missing annotation files are downloaded.

    Args:
        config: A retrieval configuration; used are `image_root`, `ann_root`, `image_size`,
            `augment` and `max_words`.
        seed: Seed of the training transforms.

    Returns:
        Training, validation and test set.

    Raises:
        UserError: Files are missing, or records are wrong; all of them are told.
    """
    root, size, max_words = config["image_root"], config["image_size"], config["max_words"]
    files = annotation_files(*((config["ann_root"], f"flickr30k_{split}.json") for split in SPLITS))
    layouts = (RETRIEVAL_TRAINING, RETRIEVAL_EVALUATION, RETRIEVAL_EVALUATION)
    train, val, test = read_all(
        *(partial(read_records, *pair) for pair in zip(files, layouts, strict=True))
    )
    plain = build_transform(size, augment=False)
    return (
        FlickrTrainDataset(train, root, build_transform(size, config["augment"]), max_words, seed),
        FlickrEvalDataset(val, root, plain, max_words),
        FlickrEvalDataset(test, root, plain, max_words),
    )
