"""NLVR2: is a statement about a pair of images true?"""

from functools import partial

import torch

from data.annotation import annotation_files
from data.captions import OTHER_SIDE
from data.image_dataset import ImageDataset, build_sets
from data.records import STATEMENTS, read_records


class NlvrDataset(ImageDataset):
    """Items `(left image (3, S, S), right image (3, S, S), statement, label 0 or 1)`.

    With `swap` the two images are exchanged at random, and the words left and right with them.
    (The original does so in evaluation too, which makes it random; we do not.)
    """

    text_key = "sentence"

    def __init__(self, *arguments, swap: bool = False, **words):
        super().__init__(*arguments, **words)
        self.swap = swap

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


def mirror(sentence: str) -> str:
    """Exchanges the words left and right."""
    return " ".join(OTHER_SIDE.get(word, word) for word in sentence.split(" "))


def build_nlvr_datasets(config: dict, seed: int = 0) -> tuple[NlvrDataset, ...]:
    """Builds the training, development and test set; missing annotations are downloaded."""
    splits = ("train", "dev", "test")
    files = annotation_files(*((config["ann_root"], f"nlvr_{split}.json") for split in splits))
    readers = [partial(read_records, file, STATEMENTS) for file in files]
    classes = (partial(NlvrDataset, swap=True), NlvrDataset, NlvrDataset)
    return build_sets(config, classes, readers, seed)
