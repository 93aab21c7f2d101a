"""Captions of a split, over any number of processes, their scores and their references' loss."""

from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.captions import prompted
from data.records import read_references
from engine.loading import EvalOptions, move
from engine.processes import gather_from_processes, is_main, sum_over_processes
from evaluation.scoring import REFERENCES, score_captions, write_captions
from utils import write_json


@torch.no_grad()
def evaluate_captions(model: nn.Module, dataset: Dataset, split: str, options: EvalOptions) -> dict:
    """Captions a split, "val" or "test", by beam search and scores it. Every process calls it.

    `options.results` receives the captions in COCO's format, in the order of ids, and their scores.
    Beside the metrics stands `loss`, the mean training loss over the predicted tokens of all
    references. Only the main process has `scores`, and `notes`.
    """
    config = options.config
    file = Path(config["coco_gt_root"], REFERENCES.format(split))
    references = read_references(file)
    if options.samples:  # the split was cut to its first samples
        references = {x["image_id"]: references[x["image_id"]] for x in dataset.records}
    decoding = {key: config[key] for key in ("num_beams", "max_length", "min_length")}
    captions, loss, terms = [], 0.0, 0
    with options.autocast():
        for images, ids in options.batches(dataset, "captions"):
            encoded, ids = model.encode_image(images), ids.tolist()
            captions += zip(ids, model.caption(encoded, **decoding), strict=True)
            batch = _references_loss(model, encoded, [references[image] for image in ids], config)
            loss, terms = loss + batch[0], terms + batch[1]
    loss, terms = sum_over_processes([loss, terms])
    shares = gather_from_processes(captions)
    if not is_main():
        return {"scores": {}}
    captions = [{"image_id": i, "caption": text} for i, text in sorted(chain(*shares))]
    path = options.results and options.results / f"{split}.json"
    if path is not None:
        write_json(path, captions)
    report = score_captions(captions, references, file, options.spice, options.meteor)
    report["scores"]["loss"] = loss / terms
    return {"scores": report["scores"], "notes": write_captions(path, report)}


def _references_loss(
    model: nn.Module, encoded: Tensor, references: list[list[str]], config: dict
) -> tuple[float, int]:
    """Summed training loss and predicted tokens of the references of images (B, L, D)."""
    loss, terms = 0.0, 0
    for captions in zip_longest(*references):  # the images' first references, their second, ...
        there = [i for i, caption in enumerate(captions) if caption is not None]
        texts = [prompted(config["prompt"], captions[i], config["max_words"]) for i in there]
        inputs, predicted = model.prepare(encoded[there], texts)
        loss += float(model.text_loss(*move(inputs, encoded.device))) * predicted
        terms += predicted
    return loss, terms
