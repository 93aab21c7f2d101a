"""Captions, transforms, samplers and datasets."""

import json
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import (
    EvalSampler,
    TrainBatchSampler,
    annotation,
    build_caption_datasets,
    build_nlvr_datasets,
    build_transform,
    normalize_caption,
)
from data.annotation import annotation_file
from data.caption_dataset import coco_id
from data.image_dataset import BadImageError, seeded
from data.nlvr_dataset import mirror
from data.transforms import CLIP_MEAN, CLIP_STD
from utils import UserError


def test_captions_are_normalised_as_in_the_original(golden_dir):
    cases = json.loads((golden_dir / "captions.json").read_text())
    assert len(cases) > 20
    for case in cases:
        assert normalize_caption(case["caption"], case["max_words"]) == case["expected"], case


# --- transforms


def gradient_image(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards: every distortion shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 128 + 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize("augment", [False, True])
def test_transform_gives_a_square_of_normalised_floats(augment):
    result = build_transform(32, augment)(gradient_image())
    assert result.shape == (3, 32, 32) and result.dtype == torch.float32
    assert result.min() < -0.5 and result.max() > 0.5


def test_constant_image_is_normalised_with_clip_statistics():
    result = build_transform(16, augment=False)(Image.new("RGB", (20, 30), (255, 51, 0)))
    expected = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(result, expected.view(3, 1, 1).expand(3, 16, 16))


def test_plain_transform_keeps_the_whole_image():
    result = build_transform(20, augment=False)(gradient_image())
    shades = result * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    columns = torch.linspace(0, 1, 60).view(20, 3).mean(1)
    torch.testing.assert_close(shades[0, 10], columns, atol=0.02, rtol=0)


def test_augmentation_depends_on_the_generator_only():
    transform, image = build_transform(32, augment=True), gradient_image()

    def draw(*key):
        with seeded(*key):
            return transform(image)

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    different = [not torch.equal(draw(0, 1, 2), draw(0, 1, index)) for index in range(3, 23)]
    assert all(different)


def test_augmentation_mirrors_and_distorts_as_often_as_it_should():
    crop_only_right = 0  # red still grows to the right unless the image was mirrored
    transform = build_transform(32, augment=True)
    for index in range(200):
        with seeded(index):
            red = transform(gradient_image())[0]
        crop_only_right += int(red[:, 20:].mean() > red[:, :12].mean())
    assert 70 < crop_only_right < 130


# --- samplers


def epoch_batches(n, batch_size, rank=0, world_size=1, epoch=0, start_batch=0, seed=0):
    sampler = TrainBatchSampler(n, batch_size, seed, rank, world_size)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_an_epoch_visits_every_sample_once_but_for_the_last_incomplete_batch():
    batches = epoch_batches(103, 10)
    visited = [index for batch in batches for index, _ in batch]
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(set(visited)) == 100 and set(visited) < set(range(103))
    assert {epoch for batch in epoch_batches(30, 10, epoch=7) for _, epoch in batch} == {7}


def test_two_processes_see_what_one_with_the_double_batch_sees():
    one = epoch_batches(97, 8, epoch=3)
    first, second = (epoch_batches(97, 4, rank, 2, epoch=3) for rank in range(2))
    assert one == [a + b for a, b in zip(first, second, strict=True)]


def test_epochs_and_seeds_give_other_orders_and_a_resumed_epoch_its_rest():
    whole = epoch_batches(64, 8, epoch=2)
    order = [index for batch in whole for index, _ in batch]
    assert order != [index for batch in epoch_batches(64, 8, epoch=1) for index, _ in batch]
    assert order != [index for batch in epoch_batches(64, 8, epoch=2, seed=1) for index, _ in batch]
    assert epoch_batches(64, 8, epoch=2, start_batch=5) == whole[5:]
    assert len(TrainBatchSampler(64, 8)) == 8


def test_a_dataset_smaller_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="7 training samples .* batch of 4 on each of 2"):
        TrainBatchSampler(7, 4, world_size=2)


@pytest.mark.parametrize("n, world_size", [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_shards_partition_the_set(n, world_size):
    shards = [list(EvalSampler(n, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(n))
    assert [len(EvalSampler(n, rank, world_size)) for rank in range(world_size)] == [
        len(shard) for shard in shards
    ]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_evaluation_batches_have_the_same_members_in_any_number_of_processes():
    def batches(rank, world_size):
        shard = list(EvalSampler(11, rank, world_size, batch_size=3))
        return [shard[first : first + 3] for first in range(0, len(shard), 3)]

    assert batches(0, 1) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert [batches(rank, 3) for rank in range(3)] == [
        [[0, 1, 2], [9, 10]],
        [[3, 4, 5]],
        [[6, 7, 8]],
    ]


# --- datasets of the published layout, written here


@pytest.fixture
def coco(tmp_path):
    """Config of a COCO of six training, two validation and two test images."""
    ann = tmp_path / "annotation"
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    ann.mkdir()
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(40, 50)]
    for shade, name in enumerate(names):
        image = Image.new("RGB", (30, 20), (20 * shade, 0, 0))
        image.paste((0, 255, 0), (0, 0, 10, 20))
        image.save(tmp_path / "images" / name)
    train = [
        {"caption": f"A Dog; number {n}!", "image": name, "image_id": f"coco_{n}"}
        for n, name in enumerate(names[:6])
    ]
    (ann / "coco_karpathy_train.json").write_text(json.dumps(train))
    for split, some in (("val", names[6:8]), ("test", names[8:])):
        rows = [{"image": name, "caption": ["a", "b", "c", "d", "e"]} for name in some]
        (ann / f"coco_karpathy_{split}.json").write_text(json.dumps(rows))
        (ann / f"coco_karpathy_{split}_gt.json").write_text("{}")
    statements = [
        {"sentence": "The Left image is not the right one.", "label": label, "images": names[:2]}
        for label in ["True", "False"] * 10
    ]
    for split in ("train", "dev", "test"):
        (ann / f"nlvr_{split}.json").write_text(json.dumps(statements))
    return {
        "image_root": str(tmp_path / "images"),
        "ann_root": str(ann),
        "coco_gt_root": str(ann),
        "image_size": 16,
        "augment": True,
        "prompt": "a picture of ",
        "max_words": 8,
    }


@pytest.fixture
def offline(monkeypatch):
    """No network; gives the addresses that were asked for."""
    asked = []

    def refuse(url, timeout):
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(annotation.urllib.request, "urlopen", refuse)
    return asked


def test_caption_items(coco):
    train, val, test = build_caption_datasets(coco)
    assert (len(train), len(val), len(test)) == (6, 2, 2)
    image, caption, image_id = train[1]
    assert (image.shape, caption, image_id) == (
        (3, 16, 16),
        "a picture of a dog number 1",
        "coco_1",
    )
    assert val[1][1] == 47 and test[0][1] == 48
    assert train.image_paths(2) == [f"{coco['image_root']}/val2014/COCO_val2014_000000000042.jpg"]


def test_coco_id_is_the_number_at_the_end_of_the_name():
    assert coco_id("val2014/COCO_val2014_000000000042.jpg") == 42
    assert coco_id("val/scene_1000007.png") == 1000007
    with pytest.raises(ValueError, match="kitten.jpg does not end"):
        coco_id("val2014/kitten.jpg")


def test_training_images_depend_on_index_epoch_and_seed_only(coco):
    train, val, _ = build_caption_datasets(coco, seed=5)
    state = torch.get_rng_state()
    first = train[(3, 1)][0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again, _, _ = build_caption_datasets(coco, seed=5)
    assert torch.equal(again[(3, 1)][0], first)
    assert torch.equal(train[(3, 0)][0], train[3][0])
    assert not torch.equal(train[(3, 2)][0], first)
    assert not torch.equal(build_caption_datasets(coco, seed=6)[0][(3, 1)][0], first)
    assert torch.equal(val[0][0], val[0][0])


def test_workers_load_the_same_items(coco):
    train, _, _ = build_caption_datasets(coco)
    sampler = TrainBatchSampler(len(train), 3)
    sampler.set_epoch(4)
    alone, helped = (
        [images for images, _, _ in DataLoader(train, batch_sampler=sampler, num_workers=n)]
        for n in (0, 2)
    )
    assert len(alone) == 2 and all(map(torch.equal, alone, helped))


def test_without_augmentation_training_images_are_those_of_evaluation(coco):
    train, _, _ = build_caption_datasets(coco | {"augment": False})
    plain = build_transform(16, augment=False)(Image.open(train.image_paths(0)[0]))
    assert torch.equal(train[(0, 3)][0], plain)


def test_nlvr_training_swaps_images_and_words_together(coco):
    config = coco | {"augment": False}
    train, dev, _ = build_nlvr_datasets(config)
    as_written, swapped = (
        "the left image is not the right one",
        "the right image is not the left one",
    )
    left, right, sentence, label = dev[0]
    assert sentence == as_written and label.item() == 1 and label.dtype == torch.int64
    assert not torch.equal(left, right) and dev[1][3].item() == 0
    swaps = 0
    for epoch in range(20):
        for index in range(len(train)):
            image0, image1, sentence, label = train[(index, epoch)]
            swaps += sentence == swapped
            expected = (right, left, swapped) if sentence == swapped else (left, right, as_written)
            assert sentence == expected[2]
            assert torch.equal(image0, expected[0]) and torch.equal(image1, expected[1])
            assert label.item() == 1 - index % 2
    assert 160 < swaps < 240  # of 400


def test_nlvr_evaluation_is_deterministic(coco):
    _, dev, test = build_nlvr_datasets(coco)
    for dataset in (dev, test):
        for index in range(len(dataset)):
            once, again = dataset[index], dataset[(index, 9)]
            assert once[2] == again[2] == "the left image is not the right one"
            assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])


def test_mirror_exchanges_whole_words():
    assert (
        mirror("the left dog is right of the leftmost") == "the right dog is left of the leftmost"
    )


# --- errors


@pytest.mark.parametrize("build", [build_caption_datasets, build_nlvr_datasets])
def test_missing_annotation_offline_says_what_to_put_where(build, coco, offline, tmp_path):
    coco["ann_root"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError) as error:
        build(coco)
    name = offline[0].rsplit("/", 1)[1]
    assert offline == [
        f"https://storage.googleapis.com/sfr-vision-language-research/datasets/{name}"
    ]
    assert offline[0] in str(error.value) and str(tmp_path / "nowhere" / name) in str(error.value)
    assert "python -m data.scenes" in str(error.value)


def test_missing_ground_truth_is_noticed_when_the_data_are_built(coco, offline, tmp_path):
    coco["coco_gt_root"] = str(tmp_path / "gt")
    with pytest.raises(UserError, match="coco_karpathy_val_gt.json is missing"):
        build_caption_datasets(coco)


def test_annotation_is_downloaded_once_and_whole(tmp_path, monkeypatch):
    published = tmp_path / "published"
    published.mkdir()
    (published / "nlvr_dev.json").write_text("[1, 2]")
    monkeypatch.setattr(annotation, "PUBLISHED_AT", published.as_uri())
    path = annotation_file(tmp_path / "annotation", "nlvr_dev.json")
    assert path.read_text() == "[1, 2]"
    (published / "nlvr_dev.json").unlink()
    assert annotation_file(tmp_path / "annotation", "nlvr_dev.json") == path
    assert [file.name for file in path.parent.iterdir()] == ["nlvr_dev.json"]


def test_broken_annotation_names_the_file(coco, tmp_path):
    (tmp_path / "annotation" / "coco_karpathy_val.json").write_text("[{")
    with pytest.raises(ValueError, match="coco_karpathy_val.json is not valid JSON"):
        build_caption_datasets(coco)


def test_check_passes_on_good_data_and_names_what_is_missing(coco, tmp_path):
    train, val, _ = build_caption_datasets(coco)
    train.check(3)
    missing = tmp_path / "images" / "val2014" / "COCO_val2014_000000000046.jpg"
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing} .*image_root and ann_root"):
        val.check(2)
    train.image_root = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="elsewhere does not exist: set .*image_root"):
        train.check(1)
    train.records = []
    with pytest.raises(ValueError, match="no records.*ann_root"):
        train.check(1)


@pytest.fixture
def damaged(coco, tmp_path):
    """The COCO config, with training image 42 cut short."""
    path = tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return coco


def test_damaged_image_is_named(damaged):
    train, _, _ = build_caption_datasets(damaged)
    with pytest.raises(BadImageError, match="000000000042.jpg"):
        train[2]
    with pytest.raises(ValueError, match="000000000042.jpg"):
        train.check(6)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_counted_on_request(damaged, workers):
    train, _, _ = build_caption_datasets(damaged)
    train.skip_bad_images = True
    loader = DataLoader(train, batch_sampler=TrainBatchSampler(6, 3), num_workers=workers)
    seen = sorted(image_id for _, _, ids in loader for image_id in ids)
    assert seen == ["coco_0", "coco_1", "coco_3", "coco_3", "coco_4", "coco_5"]
    assert train.bad_images.item() == 1


def test_no_readable_image_at_all_is_an_error(coco, tmp_path):
    train, _, _ = build_caption_datasets(coco)
    for path in (tmp_path / "images" / "val2014").iterdir():
        path.write_bytes(b"not an image")
    train.skip_bad_images = True
    with pytest.raises(ValueError, match="no image under .* can be read"):
        train[0]
