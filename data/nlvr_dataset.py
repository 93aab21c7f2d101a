"""NLVR2: is a statement about a pair of images true?"""

from functools import partial

import torch

from data.annotation import annotation_files
from data.captions import OTHER_SIDE, normalize_caption
from data.image_dataset import ImageDataset, build_sets
from data.records import STATEMENTS, read_all, read_records


class NlvrDataset(ImageDataset):
    """Items `(left image (3, S, S), right image (3, S, S), statement, label 0 or 1)`.

    With `swap` the two images are exchanged at random, and the words left and right with them.
    (The original does so in evaluation too, which makes it random; we do not.)
    """

    def __init__(self, *images, max_words: int, swap: bool):
        super().__init__(*images)
        self.max_words, self.swap = max_words, swap

    def image_names(self, index: int) -> list[str]:
        """The left and the right image file, as the annotation names them."""
        return self.records[index]["images"]

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor, str, torch.Tensor]:
        """One item."""
        left, right = (self.open(path) for path in self.image_paths(index))
        sentence = self.text(index)
        if self.swap and torch.rand(()) < 0.5:
            left, right, sentence = right, left, mirror(sentence)
        return left, right, sentence, torch.tensor(self.records[index]["label"])

    def text(self, index: int) -> str:
        """The item's statement, before any swap."""
        return normalize_caption(self.records[index]["sentence"], self.max_words)


def mirror(sentence: str) -> str:
    """Exchanges the words left and right."""
    return " ".join(OTHER_SIDE.get(word, word) for word in sentence.split(" "))


def build_nlvr_datasets(
    config: dict, seed: int = 0
) -> tuple[NlvrDataset, NlvrDataset, NlvrDataset]:
    """Builds the training, development and test set; missing annotations are downloaded."""
    splits = ("train", "dev", "test")
    files = annotation_files(*((config["ann_root"], f"nlvr_{split}.json") for split in splits))
    records = read_all(*(partial(read_records, file, STATEMENTS) for file in files))
    build = partial(NlvrDataset, max_words=config["max_words"])
    sets = [partial(build, swap=swap) for swap in (True, False, False)]
    return build_sets(config, sets, records, seed)
