"""NLVR2: is a statement about a pair of images true?"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.annotation import annotation_files
from data.captions import OTHER_SIDE, normalize_caption
from data.image_dataset import ImageDataset
from data.records import STATEMENTS, read_all, read_records
from data.transforms import build_transform


class NlvrDataset(ImageDataset):
    """Items `(left image (3, S, S), right image (3, S, S), statement, label 0 or 1)`.

    Args:
        records: Dictionaries with `sentence`, `label` (0 or 1) and two `images`.
        image_root: See `ImageDataset`.
        transform: See `ImageDataset`.
        max_words: Longest statement.
        swap: Whether to exchange the two images at random, and the words left and right with
            them. The original code did so in evaluation too, which made it random; we do not.
        seed: See `ImageDataset`.
    """

    def __init__(
        self,
        records: list[dict],
        image_root: str | Path,
        transform: Callable,
        max_words: int,
        swap: bool,
        seed: int = 0,
    ):
        super().__init__(records, image_root, transform, seed)
        self.max_words, self.swap = max_words, swap

    def image_names(self, index: int) -> list[str]:
        """The left and the right image file, below the image root, before any swap."""
        return self.records[index]["images"]

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor, str, torch.Tensor]:
        """The item, see the class."""
        record = self.records[index]
        left, right = (self.open(path) for path in self.image_paths(index))
        sentence = self.text(index)
        if self.swap and torch.rand(()) < 0.5:
            left, right, sentence = right, left, mirror(sentence)
        return left, right, sentence, torch.tensor(record["label"])

    def text(self, index: int) -> str:
        """The item's statement, before any swap."""
        return normalize_caption(self.records[index]["sentence"], self.max_words)


def mirror(sentence: str) -> str:
    """Exchanges the words left and right."""
    return " ".join(OTHER_SIDE.get(word, word) for word in sentence.split(" "))


def build_nlvr_datasets(
    config: dict, seed: int = 0
) -> tuple[NlvrDataset, NlvrDataset, NlvrDataset]:
    """Builds the three splits; missing annotation files are downloaded.

    Args:
        config: An NLVR2 configuration; used are `image_root`, `ann_root`, `image_size`, `augment`
            and `max_words`.
        seed: Seed of the training transforms and swaps.

    Returns:
        Training, development and test set.

    Raises:
        UserError: Files are missing, or records are wrong; all of them are told.
    """
    root, max_words = config["image_root"], config["max_words"]
    splits = ("train", "dev", "test")
    files = annotation_files(*((config["ann_root"], f"nlvr_{split}.json") for split in splits))
    train, dev, test = read_all(*(partial(read_records, file, STATEMENTS) for file in files))
    transform = build_transform(config["image_size"], config["augment"])
    plain = build_transform(config["image_size"], augment=False)
    return (
        NlvrDataset(train, root, transform, max_words, swap=True, seed=seed),
        NlvrDataset(dev, root, plain, max_words, swap=False),
        NlvrDataset(test, root, plain, max_words, swap=False),
    )
