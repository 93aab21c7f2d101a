"""COCO captions in the Karpathy split, and any data of the same layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.annotation import annotation_files
from data.captions import normalize_caption
from data.image_dataset import ImageDataset
from data.records import (
    CAPTION_EVALUATION,
    CAPTION_TRAINING,
    listed,
    read_all,
    read_records,
    read_references,
)
from data.transforms import build_transform
from utils import UserError


class CaptionTrainDataset(ImageDataset):
    """Items `(image (3, S, S), prompt + normalised caption)`.

    Args:
        records: Dictionaries with `image` and `caption` (one).
        image_root: See `ImageDataset`.
        transform: See `ImageDataset`.
        prompt: Text before every caption; a space parts it from the caption.
        max_words: Longest caption.
        seed: See `ImageDataset`.
    """

    def __init__(
        self,
        records: list[dict],
        image_root: str | Path,
        transform: Callable,
        prompt: str,
        max_words: int,
        seed: int = 0,
    ):
        super().__init__(records, image_root, transform, seed)
        self.prompt, self.max_words = prompt, max_words

    def image_names(self, index: int) -> list[str]:
        """The item's image file, below the image root."""
        return [self.records[index]["image"]]

    def load(self, index: int) -> tuple[torch.Tensor, str]:
        """The item, see the class."""
        return self.open(*self.image_paths(index)), self.text(index)

    def text(self, index: int) -> str:
        """The item's prompt and caption."""
        return prompted(self.prompt, self.records[index]["caption"], self.max_words)


def prompted(prompt: str, caption: str, max_words: int) -> str:
    """The text whose tokens are predicted: prompt and normalised caption, parted by a space."""
    space = " " * (prompt != "" and not prompt[-1].isspace())
    return prompt + space + normalize_caption(caption, max_words)


class CaptionEvalDataset(ImageDataset):
    """Items `(image (3, S, S), COCO id)` of records with `image` and `image_id`."""

    def image_names(self, index: int) -> list[str]:
        """The item's image file, below the image root."""
        return [self.records[index]["image"]]

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """The item, see the class."""
        return self.open(*self.image_paths(index)), self.records[index]["image_id"]


def read_evaluation(path: Path, references_path: Path) -> list[dict]:
    """Reads the images of a split that its references are for, each once.

    An image's COCO id is its `image_id` or, as in the Karpathy split, the number at the end of its
    file name.

    Args:
        path: Records of the layout CAPTION_EVALUATION; several may be of one image.
        references_path: See `read_references`.

    Raises:
        UserError: A file cannot be used, two images have one id, or the files do not belong
            together.
    """
    records, references = read_all(
        lambda: read_records(path, CAPTION_EVALUATION), lambda: read_references(references_path)
    )
    by_id: dict[int, dict] = {}
    for record in records:
        same = by_id.setdefault(record["image_id"], record)
        if same["image"] != record["image"]:
            raise UserError(
                f"{path}: images {same['image']} and {record['image']} both have the id "
                f"{record['image_id']}: give each record an image_id of its own"
            )
    without = sorted(by_id.keys() - references.keys())
    unknown = sorted(references.keys() - by_id.keys())
    if without or unknown:
        raise UserError(
            f"{path} and {references_path} must be of the same images, but {len(without)} of the "
            f"split's images have no reference (ids: {listed(without) or 'none'}) and "
            f"{len(unknown)} of the references are for images outside the split (ids: "
            f"{listed(unknown) or 'none'}): take both files from the same data"
        )
    return list(by_id.values())


def build_caption_datasets(
    config: dict, seed: int = 0
) -> tuple[CaptionTrainDataset, CaptionEvalDataset, CaptionEvalDataset]:
    """Builds the three splits; missing annotation files are downloaded, ground truth included.

    Args:
        config: A captioning configuration; used are `image_root`, `ann_root`, `coco_gt_root`,
            `image_size`, `augment`, `prompt` and `max_words`.
        seed: Seed of the training transforms.

    Returns:
        Training, validation and test set.

    Raises:
        UserError: Files are missing, or records are wrong; all of them are told.
    """
    root, size = config["image_root"], config["image_size"]
    files = annotation_files(
        *(
            (config["ann_root"], f"coco_karpathy_{split}.json")
            for split in ("train", "val", "test")
        ),
        *((config["coco_gt_root"], f"coco_karpathy_{split}_gt.json") for split in ("val", "test")),
    )
    train, val, test = read_all(
        partial(read_records, files[0], CAPTION_TRAINING),
        partial(read_evaluation, files[1], files[3]),
        partial(read_evaluation, files[2], files[4]),
    )
    transform = build_transform(size, config["augment"])
    plain = build_transform(size, augment=False)
    return (
        CaptionTrainDataset(train, root, transform, config["prompt"], config["max_words"], seed),
        CaptionEvalDataset(val, root, plain),
        CaptionEvalDataset(test, root, plain),
    )
