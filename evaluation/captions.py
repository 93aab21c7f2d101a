"""Captions of a split, over any number of processes, their scores and their references' loss."""

from itertools import chain, zip_longest

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.caption_dataset import prompted
from data.records import read_references
from engine.loading import EvalOptions, move
from engine.processes import gather_from_processes, is_main, sum_over_processes
from evaluation.scoring import notes_of, references_path, score_captions, write_captions
from utils import write_json


@torch.no_grad()
def evaluate_captions(model: nn.Module, dataset: Dataset, split: str, options: EvalOptions) -> dict:
    """Captions a split by beam search and scores the captions. Every process calls it.

    Args:
        model: captioner in eval mode, not wrapped.
        dataset: images (3, S, S) and their ids; each is in the share of one process.
        split: "val" or "test".
        options: device, batch size, precision and metrics. In `results` the captions are written in
            the format of COCO's results, `[{"image_id": int, "caption": str}, ...]` in the order of
            ids, with the files of `evaluation.scoring.write_captions` beside them.

    Returns:
        `scores`, with `loss`, the mean of the training loss over the predicted tokens of all
        references; and `notes`, sentences. On other processes than the main one no scores.

    Raises:
        UserError: the references cannot be read or are not of the same images.
    """
    config = options.config
    file = references_path(config, split)
    references = read_references(file)
    if options.samples:  # the split was cut to its first samples
        ids = [record["image_id"] for record in dataset.records]
        references = {image: references[image] for image in ids}
    lengths = {key: config[key] for key in ("num_beams", "max_length", "min_length")}
    captions, loss, terms = [], 0.0, 0
    with options.autocast():
        for images, ids in options.batches(dataset, "captions"):
            encoded, ids = model.encode_image(images), ids.tolist()
            texts = model.caption(encoded, **lengths)
            captions += [
                {"image_id": image, "caption": text} for image, text in zip(ids, texts, strict=True)
            ]
            batch_loss, batch_terms = references_loss(
                model, encoded, [references[image] for image in ids], config
            )
            loss, terms = loss + batch_loss, terms + batch_terms
    loss, terms = sum_over_processes([loss, terms])
    shares = gather_from_processes(captions)
    if not is_main():
        return {"scores": {}}
    captions = sorted(chain.from_iterable(shares), key=lambda result: result["image_id"])
    if options.results is not None:
        write_json(options.results / f"{split}.json", captions)
    report = score_captions(captions, references, file, options.spice, options.meteor)
    report["scores"]["loss"] = loss / terms
    if options.results is not None:
        write_captions(options.results / f"{split}.json", report)
    return {"scores": report["scores"], "notes": notes_of(report)}


def references_loss(
    model: nn.Module, encoded: Tensor, references: list[list[str]], config: dict
) -> tuple[float, int]:
    """The summed training loss of all references of a batch, and their predicted tokens.

    Args:
        model: captioner in eval mode.
        encoded: image tokens (B, L, D), which each reference of an image sees.
        references: of each of the B images.
        config: its `prompt` and `max_words` are read.
    """
    loss, terms = 0.0, 0
    for captions in zip_longest(*references):  # each image's first, then each one's second, ...
        there = [i for i, caption in enumerate(captions) if caption is not None]
        texts = [prompted(config["prompt"], captions[i], config["max_words"]) for i in there]
        inputs, predicted = model.prepare(encoded[there], texts)
        loss += float(model.text_loss(*move(inputs, encoded.device))) * predicted
        terms += predicted
    return loss, terms
