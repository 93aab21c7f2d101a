"""Recalls against goldens, sorting and ties; features."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from data.flickr_dataset import TextDataset
from engine.loading import EvalOptions
from evaluation import retrieval
from evaluation.retrieval import evaluate_retrieval, recalls
from tests.conftest import read_golden

NAMES = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
NAN = float("nan")


def test_recalls_equal_the_original():
    sims = read_golden("clip_tiny", "input.")["sims"]
    result = recalls(sims, torch.arange(30).repeat_interleave(5))
    expected = read_golden("clip_tiny", "expected.")["recalls"].tolist()
    assert [result[name] for name in NAMES] == pytest.approx(expected, abs=1e-5)
    text, image = sum(expected[:3]) / 3, sum(expected[3:]) / 3
    means = [result[name] for name in ("txt_r_mean", "img_r_mean", "r_mean")]
    assert means == pytest.approx([text, image, (text + image) / 2], abs=1e-5)
    assert len(result) == 9


def test_recalls_are_those_of_sorted_lists():
    """With texts in any order, a different count for each image, and no ties."""
    owners = torch.cat([torch.arange(40), torch.randint(0, 40, (60,))])[torch.randperm(100)]
    sims = 2.0 * torch.randperm(4000).view(40, 100)
    sims[owners, torch.arange(100)] += 3001  # some are found, some are not; odd, so no ties
    result = recalls(sims, owners)
    for k in (1, 5, 10):
        found = [i in owners[sims[i].argsort(descending=True)[:k]] for i in range(40)]
        assert result[f"txt_r{k}"] == 100 * sum(found) / 40
        found = [owners[t] in sims[:, t].argsort(descending=True)[:k] for t in range(100)]
        assert result[f"img_r{k}"] == 100 * sum(found) / 100
    assert 0 < result["txt_r1"] < result["txt_r10"] < 100
    assert 0 < result["img_r1"] < result["img_r10"] < 100


def test_own_texts_of_an_image_do_not_compete():
    sims = torch.tensor([[0.9, 0.9, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]])
    result = recalls(sims, [0, 0, 1, 1])
    assert (result["txt_r1"], result["img_r1"]) == (100, 100)


@pytest.mark.parametrize("value", [0.0, NAN, float("inf"), -float("inf")])
def test_a_model_that_tells_nothing_apart_finds_nothing(value):
    result = recalls(torch.full((30, 150), value), torch.arange(30).repeat_interleave(5))
    assert set(result.values()) == {0.0}


@pytest.mark.parametrize(("place", "five"), [((3, 3), 29), ((3, 4), 30)])
def test_what_is_not_a_number_is_never_found(place, five):
    """The right text of an image, and a wrong one."""
    sims = torch.eye(30)
    assert recalls(sims, range(30))["r_mean"] == 100
    sims[place] = NAN
    result = recalls(sims, range(30))
    assert result["txt_r1"] == result["img_r1"] == pytest.approx(100 * 29 / 30)
    assert result["txt_r5"] == result["img_r10"] == pytest.approx(100 * five / 30)


# --- features

IMAGES, TEXTS, BATCH = 11, 600, 4


def towers() -> SimpleNamespace:
    """Encoders whose outputs are known: linear in the pixels, and in the number of the text."""
    torch.manual_seed(0)
    image, text = nn.Linear(12, 6), nn.Embedding(TEXTS, 6)
    return SimpleNamespace(
        encode_image=lambda pixels: image(pixels.flatten(1)),
        tokenize=lambda texts: (torch.tensor([[int(text.split()[1])] for text in texts]), None),
        encode_text=lambda ids: text(ids[:, 0]),
        text=text,
    )


class Split(Dataset):
    """Numbered images and texts; more texts than the 512 at which the original stopped."""

    def __init__(self):
        torch.manual_seed(1)
        self.images = torch.randn(IMAGES, 3, 2, 2)
        self.texts = TextDataset([f"text {number}" for number in range(TEXTS)])
        self.image_of_text = torch.arange(TEXTS) % IMAGES

    def __len__(self):
        return IMAGES

    def fetch(self, index):
        return (self.images[index], index), 0


def test_similarities_are_cosines_of_all_images_and_texts_in_order(monkeypatch):
    """Float32: each of a few operations rounds numbers of at most 1 by 6e-8."""
    monkeypatch.setattr(retrieval, "recalls", lambda *arguments: arguments)
    options = EvalOptions({"eval_batch_size": BATCH, "num_workers": 0})
    model, split = towers(), Split()
    similarities, image_of_text = evaluate_retrieval(model, split, "val", options)["scores"]
    images = model.encode_image(split.images)
    cosines = torch.cosine_similarity(images[:, None], model.text.weight[None], dim=-1).detach()
    torch.testing.assert_close(similarities, cosines, rtol=0, atol=1e-6)
    assert torch.equal(image_of_text, split.image_of_text)
