"""Flickr30k in its published layout, and the embedded scenes in the same."""

import json

import pytest
import torch
from PIL import Image

from data.flickr_dataset import build_flickr_datasets
from data.transforms import build_transform
from utils import UserError


@pytest.fixture
def flickr(tmp_path):
    """Config of a Flickr30k of three training images and two in each held-out split."""
    (tmp_path / "images" / "flickr30k-images").mkdir(parents=True)
    names = [f"flickr30k-images/{number}.jpg" for number in (36979, 1000092795, 65567, 12, 7)]
    for shade, name in enumerate(names):
        image = Image.new("RGB", (30, 20), (50 * shade, 0, 0))
        image.paste((0, 255, 0), (0, 0, 10, 20))
        image.save(tmp_path / "images" / name)
    train = [
        {"image": names[n], "caption": f"A Dog; number {n}!", "image_id": f"flickr30k_{names[n]}"}
        for n in (2, 0, 2, 1, 0)
    ]
    held_out = [
        {"image": names[n], "caption": [f"Image {n}, caption {c}." for c in range(count)]}
        for n, count in ((3, 5), (4, 2))
    ]
    ann = tmp_path / "annotation"
    ann.mkdir()
    for split, rows in (("train", train), ("val", held_out), ("test", held_out[::-1])):
        (ann / f"flickr30k_{split}.json").write_text(json.dumps(rows))
    return {
        "image_root": str(tmp_path / "images"),
        "ann_root": str(ann),
        "image_size": 16,
        "augment": True,
        "max_words": 4,
    }


def test_training_items(flickr):
    train, _, _ = build_flickr_datasets(flickr)
    assert [train.image_ids[n] for n in range(len(train))] == [0, 1, 0, 2, 1]
    image, caption, image_id = train[3]
    assert image.shape == (3, 16, 16)
    assert (caption, image_id) == ("a dog number 1", 2)
    assert train.image_paths(3) == [f"{flickr['image_root']}/flickr30k-images/1000092795.jpg"]
    short = build_flickr_datasets(flickr | {"max_words": 2})[0]
    assert short[0][1] == "a dog"


def test_training_images_are_augmented_and_held_out_ones_are_not(flickr):
    train, val, _ = build_flickr_datasets(flickr, seed=5)
    plain = build_transform(16, augment=False)
    assert torch.equal(train[(3, 1)][0], build_flickr_datasets(flickr, seed=5)[0][(3, 1)][0])
    assert not torch.equal(train[(3, 2)][0], train[(3, 1)][0])
    assert torch.equal(val[0][0], plain(Image.open(val.image_paths(0)[0])))
    unchanged = build_flickr_datasets(flickr | {"augment": False})[0]
    assert torch.equal(unchanged[(3, 2)][0], plain(Image.open(train.image_paths(3)[0])))


def test_held_out_images_and_all_their_texts(flickr):
    _, val, test = build_flickr_datasets(flickr)
    assert (len(val), len(val.texts), len(test.texts)) == (2, 7, 7)
    assert val[1][1] == 1 and val[1][0].shape == (3, 16, 16)
    assert val.image_of_text.tolist() == [0] * 5 + [1] * 2
    assert test.image_of_text.tolist() == [0] * 2 + [1] * 5
    assert [val.texts[n] for n in (4, 5)] == [("image 3, caption 4", 4), ("image 4, caption 0", 5)]


def test_a_held_out_split_is_cut_with_its_texts(flickr):
    _, val, test = build_flickr_datasets(flickr)
    for split, texts in ((val, 5), (test, 2)):
        split.keep_first(1)
        assert (len(split), len(split.texts)) == (1, texts)
        assert split.image_of_text.tolist() == [0] * texts


@pytest.mark.parametrize(
    "split, record, message",
    [
        ("train", {"image": "a.jpg", "caption": ["a dog"]}, "caption is a list of 1, but must be"),
        ("val", {"image": "a.jpg", "caption": "a dog"}, 'caption is "a dog", but must be a list'),
        ("test", {"image": "a.jpg", "caption": []}, "caption is a list of 0, but must be a list"),
        ("test", {"image": "a.jpg", "caption": ["a", " "]}, "caption is a list of 2, but must be"),
    ],
)
def test_wrong_records_are_named(flickr, tmp_path, split, record, message):
    (tmp_path / "annotation" / f"flickr30k_{split}.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=f"flickr30k_{split}.json: 1 of 1 records .*{message}"):
        build_flickr_datasets(flickr)


def test_without_image_ids_the_image_files_count(flickr, tmp_path):
    path = tmp_path / "annotation" / "flickr30k_train.json"
    rows = [
        {k: v for k, v in row.items() if k != "image_id"} for row in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(rows))
    assert build_flickr_datasets(flickr)[0].image_ids == [0, 1, 0, 2, 1]
