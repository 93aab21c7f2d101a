"""COCO captions in the Karpathy split, and any data of the same layout."""

from functools import partial
from pathlib import Path

import torch

from data.annotation import annotation_files
from data.captions import normalize_caption
from data.image_dataset import ImageDataset, build_sets
from data.records import (
    CAPTION_EVALUATION,
    CAPTION_TRAINING,
    listed,
    read_all,
    read_records,
    read_references,
)
from utils import UserError


class CaptionTrainDataset(ImageDataset):
    """Items `(image (3, S, S), prompt + normalised caption)` of records with one caption each."""

    def __init__(self, *images, prompt: str, max_words: int):
        super().__init__(*images)
        self.prompt, self.max_words = prompt, max_words

    def load(self, index: int) -> tuple[torch.Tensor, str]:
        """One item."""
        return self.open(*self.image_paths(index)), self.text(index)

    def text(self, index: int) -> str:
        """The item's prompt and caption."""
        return prompted(self.prompt, self.records[index]["caption"], self.max_words)


def prompted(prompt: str, caption: str, max_words: int) -> str:
    """The text whose tokens are predicted: prompt and normalised caption, parted by a space."""
    space = " " * (prompt != "" and not prompt[-1].isspace())
    return prompt + space + normalize_caption(caption, max_words)


class CaptionEvalDataset(ImageDataset):
    """Items `(image (3, S, S), COCO id)` of records with an id each."""

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        """One item."""
        return self.open(*self.image_paths(index)), self.records[index]["image_id"]


def read_evaluation(path: Path, references_path: Path) -> list[dict]:
    """The records of a split, one for each image; its references must be of the same images."""
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
    """Builds the training, validation and test set; missing annotations are downloaded."""
    coco = "coco_karpathy_{}.json".format
    files = annotation_files(
        *((config["ann_root"], coco(split)) for split in ("train", "val", "test")),
        *((config["coco_gt_root"], coco(f"{split}_gt")) for split in ("val", "test")),
    )
    records = read_all(
        partial(read_records, files[0], CAPTION_TRAINING),
        partial(read_evaluation, files[1], files[3]),
        partial(read_evaluation, files[2], files[4]),
    )
    words = {key: config[key] for key in ("prompt", "max_words")}
    train = partial(CaptionTrainDataset, **words)
    return build_sets(config, (train, CaptionEvalDataset, CaptionEvalDataset), records, seed)
