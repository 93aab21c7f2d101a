"""Flickr30k's images and captions for retrieval, and any data of the same layout."""

from functools import partial

import torch
from torch.utils.data import Dataset

from data.annotation import annotation_files
from data.captions import normalize_caption
from data.image_dataset import ImageDataset, build_sets
from data.records import RETRIEVAL_EVALUATION, RETRIEVAL_TRAINING, read_all, read_records


class FlickrTrainDataset(ImageDataset):
    """Items `(image (3, S, S), normalised caption, integer image id)`.

    The integers count the records' image ids from 0 in the order in which they first appear.
    """

    def __init__(self, *images, max_words: int):
        super().__init__(*images)
        self.max_words, numbers = max_words, {}
        ids = (record["image_id"] for record in self.records)
        self.image_ids = [numbers.setdefault(image, len(numbers)) for image in ids]

    def load(self, index: int) -> tuple[torch.Tensor, str, int]:
        """One item."""
        return self.open(*self.image_paths(index)), self.text(index), self.image_ids[index]

    def text(self, index: int) -> str:
        """The item's caption."""
        return normalize_caption(self.records[index]["caption"], self.max_words)


class FlickrEvalDataset(ImageDataset):
    """Items `(image (3, S, S), index)` of records with several captions each.

    `texts` has all captions, the first image's first; `image_of_text`, (T,) int64, the index of
    each text's image.
    """

    def __init__(self, *images, max_words: int):
        super().__init__(*images)
        pairs = [(n, text) for n, row in enumerate(self.records) for text in row["caption"]]
        self.texts = TextDataset([normalize_caption(text, max_words) for _, text in pairs])
        self.image_of_text = torch.tensor([n for n, _ in pairs])

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """One item."""
        return self.open(*self.image_paths(index)), index

    def keep_first(self, samples: int) -> None:
        """Drops all images but the first ones, and their texts."""
        super().keep_first(samples)
        self.image_of_text = self.image_of_text[self.image_of_text < samples]
        self.texts = TextDataset(self.texts.texts[: len(self.image_of_text)])


class TextDataset(Dataset):
    """Items `(text, index)`."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """One item."""
        return self.texts[index], index

    def fetch(self, index: int) -> tuple[tuple[str, int], int]:
        """The item, and that none was passed over for it, as `ImageDataset.fetch`."""
        return self[index], 0


def build_flickr_datasets(
    config: dict, seed: int = 0
) -> tuple[FlickrTrainDataset, FlickrEvalDataset, FlickrEvalDataset]:
    """Builds the training, validation and test set; missing annotations are downloaded."""
    splits = ("train", "val", "test")
    files = annotation_files(*((config["ann_root"], f"flickr30k_{split}.json") for split in splits))
    layouts = (RETRIEVAL_TRAINING, RETRIEVAL_EVALUATION, RETRIEVAL_EVALUATION)
    pairs = zip(files, layouts, strict=True)
    records = read_all(*(partial(read_records, *pair) for pair in pairs))
    classes = (FlickrTrainDataset, FlickrEvalDataset, FlickrEvalDataset)
    classes = [partial(kind, max_words=config["max_words"]) for kind in classes]
    return build_sets(config, classes, records, seed)
