"""Flickr30k in its published layout."""

import pytest

from data.flickr_dataset import build_flickr_datasets
from tests.runs import write_annotations, write_images
from utils import UserError

NAMES = [f"flickr30k-images/{number}.jpg" for number in (36979, 1000092795, 65567, 12, 7)]
TRAIN = [
    {"image": NAMES[n], "caption": f"A Dog; number {n}!", "image_id": f"flickr30k_{NAMES[n]}"}
    for n in (2, 0, 2, 1, 0)
]
HELD_OUT = [
    {"image": NAMES[n], "caption": [f"Image {n}, caption {c}." for c in range(count)]}
    for n, count in ((3, 5), (4, 2))
]


@pytest.fixture
def build(tmp_path):
    """Builds the data sets of three training images, and of two in each held-out split."""
    write_images(tmp_path, NAMES)

    def read(max_words=4, **changes):
        files = {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT[::-1]} | changes
        files = {f"flickr30k_{split}": rows for split, rows in files.items()}
        config = {"ann_root": write_annotations(tmp_path, files), "image_root": str(tmp_path)}
        return build_flickr_datasets(
            config | {"image_size": 16, "augment": True, "max_words": max_words}
        )

    return read


def test_training_items(build, tmp_path):
    train, _, _ = build()
    image, caption, image_id = train[3]
    assert (image.shape, caption, image_id) == ((3, 16, 16), "a dog number 1", 2)
    assert train.image_paths(3) == [str(tmp_path / NAMES[1])]
    assert build(max_words=2)[0][0][1] == "a dog"
    without_ids = [{key: row[key] for key in ("image", "caption")} for row in TRAIN]
    for dataset in (train, build(train=without_ids)[0]):  # then the image files count
        assert dataset.image_ids == [0, 1, 0, 2, 1]


def test_held_out_images_and_all_their_texts(build):
    _, val, test = build()
    assert (len(val), len(val.texts), len(test.texts)) == (2, 7, 7)
    assert val[1][1] == 1 and val[1][0].shape == (3, 16, 16)
    assert val.image_of_text.tolist() == [0] * 5 + [1] * 2
    assert test.image_of_text.tolist() == [0] * 2 + [1] * 5
    assert [val.texts[n] for n in (4, 5)] == [("image 3, caption 4", 4), ("image 4, caption 0", 5)]


def test_a_held_out_split_is_cut_with_its_texts(build):
    _, val, test = build()
    for split, texts in ((val, 5), (test, 2)):
        for samples in (1, 9):
            split.keep_first(samples)
            assert (len(split), len(split.texts)) == (1, texts)
            assert split.image_of_text.tolist() == [0] * texts


@pytest.mark.parametrize(
    "split, caption, message",
    [
        ("train", ["a dog"], "caption is a list of 1, but must be"),
        ("val", "a dog", 'caption is "a dog", but must be a list'),
        ("test", [], "caption is a list of 0, but must be a list"),
        ("test", ["a", " "], "caption is a list of 2, but must be"),
    ],
)
def test_wrong_records_are_named(build, split, caption, message):
    with pytest.raises(UserError, match=f"flickr30k_{split}.json: 1 of 1 records .*{message}"):
        build(**{split: [{"image": "a.jpg", "caption": caption}]})
