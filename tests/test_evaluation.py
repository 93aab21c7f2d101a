"""Captions of a split over processes."""

import json

import torch
from torch.utils.data import DataLoader, TensorDataset

from data.samplers import EvalSampler
from evaluation.captions import caption_split, generate_captions
from models import build_captioner
from tests.runs import on_two_processes

IMAGES, BATCH = 101, 8
DECODING = {"num_beams": 3, "max_length": 12, "min_length": 5}


def caption(rank, world_size, model_config, path):
    """Captions the split with a model whose captions differ from image to image."""
    torch.manual_seed(0)
    model = build_captioner(model_config).eval()
    with torch.no_grad():
        for weight in model.text_decoder.parameters():
            weight.mul_(10)
    # Ids descend, so that the file's order is not the split's.
    split = TensorDataset(torch.randn(IMAGES, 3, 32, 32), 1000 - torch.arange(IMAGES))
    sampler = EvalSampler(IMAGES, rank, world_size, BATCH)
    loader = DataLoader(split, BATCH, sampler=sampler)
    results = caption_split(model, loader, DECODING, torch.device("cpu"), path)
    assert (results is None) == (rank > 0)


def test_two_processes_write_the_captions_of_one(caption_tiny_config, tmp_path):
    caption(0, 1, caption_tiny_config, tmp_path / "one.json")
    on_two_processes(caption, 2, caption_tiny_config, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [result["image_id"] for result in one] == list(range(900, 1001))
    assert len({result["caption"] for result in one}) > 20
    assert two == one


def test_captions_are_decoded_as_the_config_says():
    asked = []

    class Model(torch.nn.Module):
        def generate(self, images, **lengths):
            asked.append(lengths)
            return ["a"] * len(images)

    split = TensorDataset(torch.zeros(3, 3, 2, 2), torch.arange(3))
    lengths = {"num_beams": 2, "max_length": 9, "min_length": 3}
    config = {**lengths, "batch_size": 7}
    generate_captions(Model(), DataLoader(split, 2), config, torch.device("cpu"))
    assert asked == [lengths] * 2
