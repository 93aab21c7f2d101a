"""Flickr30k's images and captions for retrieval, and any data of the same layout."""

from functools import partial

import torch

from data.annotation import annotation_files
from data.captions import normalize_caption
from data.image_dataset import ImageDataset, build_sets
from data.records import RETRIEVAL_EVALUATION, RETRIEVAL_TRAINING, read_records


class FlickrTrainDataset(ImageDataset):
    """Items `(image (3, S, S), normalised caption, number of its image id, from 0)`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        numbers: dict[str, int] = {}
        ids = (record["image_id"] for record in self.records)
        self.image_ids = [numbers.setdefault(image, len(numbers)) for image in ids]

    def load(self, index: int) -> tuple[torch.Tensor, str, int]:
        """One item."""
        return *super().load(index), self.image_ids[index]


class FlickrEvalDataset(ImageDataset):
    """Items `(image (3, S, S), index)` of records with several captions each.

    `texts` has all captions, the first image's first; `image_of_text`, (T,) int64, the index of
    each text's image.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        pairs = [(n, text) for n, row in enumerate(self.records) for text in row["caption"]]
        self.texts = TextDataset([normalize_caption(text, self.max_words) for _, text in pairs])
        self.image_of_text = torch.tensor([n for n, _ in pairs])

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """One item."""
        return self.open(*self.image_paths(index)), index

    def keep_first(self, samples: int) -> None:
        """Drops all images but the first ones, and their texts."""
        super().keep_first(samples)
        self.image_of_text = self.image_of_text[self.image_of_text < samples]
        del self.texts[len(self.image_of_text) :]


class TextDataset(list):
    """Items `(text, index)`."""

    def __init__(self, texts: list[str]):
        super().__init__((text, index) for index, text in enumerate(texts))

    def fetch(self, index: int) -> tuple[tuple[str, int], int]:
        """The item, and the number skipped for it, as `ImageDataset.fetch`."""
        return self[index], 0


def build_flickr_datasets(config: dict, seed: int = 0) -> tuple[ImageDataset, ...]:
    """Builds the training, validation and test set; missing annotations are downloaded."""
    splits = ("train", "val", "test")
    files = annotation_files(*((config["ann_root"], f"flickr30k_{split}.json") for split in splits))
    layouts = (RETRIEVAL_TRAINING, RETRIEVAL_EVALUATION, RETRIEVAL_EVALUATION)
    readers = [partial(read_records, *pair) for pair in zip(files, layouts, strict=True)]
    classes = (FlickrTrainDataset, FlickrEvalDataset, FlickrEvalDataset)
    return build_sets(config, classes, readers, seed)
