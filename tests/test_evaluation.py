"""Captions of a split over processes, and the contact sheet."""

import json

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from data.caption_dataset import CaptionEvalDataset
from data.samplers import EvalSampler
from evaluation.captions import caption_split, generate_captions
from models import build_captioner
from reports.figures import contact_sheet, draw_sheet
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


def colours(path) -> set[tuple]:
    """Those that fill a good part of a picture, white aside."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, v)) for v in values[counts > len(pixels) / 50]} - {(255, 255, 255)}


def test_contact_sheet_shows_captioned_images(tmp_path):
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for number, colour in enumerate((red, green, blue)):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{number}.png")
    records = [{"image": f"{n}.png", "image_id": n} for n in range(3)]
    split = CaptionEvalDataset(records, tmp_path, transform=None)
    dense = [{"image_id": n, "caption": f"picture {n}"} for n in range(3)]
    sheet = tmp_path / "sheets" / "test.png"

    contact_sheet(split, {"dense": dense}, sheet, samples=5)
    assert colours(sheet) == {red, green, blue}
    contact_sheet(split, {"dense": dense, "pruned": dense[1:]}, sheet, samples=5)
    assert colours(sheet) == {green, blue}
    contact_sheet(split, {"dense": dense, "pruned": dense[1:]}, sheet, samples=1)
    assert colours(sheet) == {green}
    twice = CaptionEvalDataset([records[0], *records], tmp_path, transform=None)
    contact_sheet(twice, {"dense": dense}, sheet, samples=2)  # the first and the third of four
    assert colours(sheet) == {red, green}


def test_contact_sheet_shows_the_captions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "4.png")
    split = CaptionEvalDataset([{"image": "4.png", "image_id": 4}], tmp_path, transform=None)
    ink = []
    for words in ("a", "a dog and a cat", "a dog and a cat on a bed"):
        contact_sheet(
            split, {"dense": [{"image_id": 4, "caption": words}]}, tmp_path / "sheet.png", samples=1
        )
        grey = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
        ink.append(int((grey < 128).sum()))
    assert ink[0] < ink[1] < ink[2]


def test_captions_stay_in_their_column_and_row_and_lose_no_character():
    long, wide = "a dog on a bed " * 9, "W" * 150
    captions = [long, wide, "a $5 and a $10 note", f"{long} {wide}", "", "x"]
    sizes = [(40, 60), (10, 90), (90, 10), (30, 30), (60, 40), (5, 90)]
    pictures = [Image.new("RGB", size) for size in sizes]
    texts = [{"dense": caption, "pruned": caption[::-1]} for caption in captions]
    figure = draw_sheet(pictures, texts)
    figure.canvas.draw()

    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    images = [axes.images[0].get_window_extent(renderer) for axes in figure.axes]
    for n, (box, image) in enumerate(zip(boxes, images, strict=True)):
        assert box.x0 >= image.x0 - 1 and box.y1 <= image.y0 and box.y0 >= 0  # pixels
        if n + 1 < len(boxes) and n % 4 < 3:
            assert box.x1 <= boxes[n + 1].x0 and box.x1 <= images[n + 1].x0
        if n + 4 < len(boxes):
            assert box.y0 >= images[n + 4].y1
        assert box.x1 <= figure.bbox.x1
    for text, caption in zip(figure.texts, captions, strict=True):
        shown = f"dense: {caption} pruned: {caption[::-1]}"
        assert "".join(text.get_text().split()) == "".join(shown.split())
        assert not text.get_parse_math()
