"""COCO captions in the Karpathy split, and any data of the same layout."""

from functools import partial
from pathlib import Path

import torch

from data.annotation import annotation_files
from data.image_dataset import ImageDataset, build_sets
from data.records import (
    CAPTION_EVALUATION,
    CAPTION_TRAINING,
    read_all,
    read_records,
    read_references,
)
from utils import UserError, listed


class CaptionTrainDataset(ImageDataset):
    """Items `(image (3, S, S), prompt + normalised caption)` of records with one caption each."""


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


def build_caption_datasets(config: dict, seed: int = 0) -> tuple[ImageDataset, ...]:
    """Builds the training, validation and test set; missing annotations are downloaded."""
    coco = "coco_karpathy_{}.json".format
    files = annotation_files(
        *((config["ann_root"], coco(split)) for split in ("train", "val", "test")),
        *((config["coco_gt_root"], coco(f"{split}_gt")) for split in ("val", "test")),
    )
    readers = (
        partial(read_records, files[0], CAPTION_TRAINING),
        partial(read_evaluation, files[1], files[3]),
        partial(read_evaluation, files[2], files[4]),
    )
    train = partial(CaptionTrainDataset, prompt=config["prompt"])
    return build_sets(config, (train, CaptionEvalDataset, CaptionEvalDataset), readers, seed)
