"""COCO captions in the Karpathy split, and any data of the same layout."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from data.annotation import annotation_file, read_annotation
from data.captions import normalize_caption
from data.image_dataset import ImageDataset
from data.transforms import build_transform
from utils import UserError


class CaptionTrainDataset(ImageDataset):
    """Items `(image (3, S, S), prompt + normalised caption, image id of the annotation)`.

    Args:
        records: Dictionaries with `image`, `caption` (one) and `image_id`.
        image_root: See `ImageDataset`.
        transform: See `ImageDataset`.
        prompt: Text before every caption.
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

    def image_paths(self, index: int) -> list[str]:
        """The item's image file."""
        return [str(self.image_root / self.records[index]["image"])]

    def load(self, index: int) -> tuple[torch.Tensor, str, str]:
        """The item, see the class."""
        image_id = self.records[index]["image_id"]
        return self.open(*self.image_paths(index)), self.text(index), image_id

    def text(self, index: int) -> str:
        """The item's prompt and caption."""
        return self.prompt + normalize_caption(self.records[index]["caption"], self.max_words)


class CaptionEvalDataset(ImageDataset):
    """Items `(image (3, S, S), COCO id)`: the id is the number at the end of the file name."""

    def image_paths(self, index: int) -> list[str]:
        """The item's image file."""
        return [str(self.image_root / self.records[index]["image"])]

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """The item, see the class."""
        return self.open(*self.image_paths(index)), coco_id(self.records[index]["image"])


def coco_id(path: str) -> int:
    """The COCO id of an image file, for instance 42 of `val2014/COCO_val2014_000000000042.jpg`."""
    number = re.search(r"\d+$", Path(path).stem)
    if number is None:
        raise UserError(f"image file name {path} does not end in its COCO id")
    return int(number.group())


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
    """
    root, size = config["image_root"], config["image_size"]
    records = {
        split: read_annotation(config["ann_root"], f"coco_karpathy_{split}.json")
        for split in ("train", "val", "test")
    }
    for split in ("val", "test"):
        annotation_file(config["coco_gt_root"], f"coco_karpathy_{split}_gt.json")
    train = CaptionTrainDataset(
        records["train"],
        root,
        build_transform(size, config["augment"]),
        config["prompt"],
        config["max_words"],
        seed,
    )
    plain = build_transform(size, augment=False)
    return (
        train,
        CaptionEvalDataset(records["val"], root, plain),
        CaptionEvalDataset(records["test"], root, plain),
    )
