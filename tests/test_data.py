"""Captions, transforms, samplers and datasets."""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader

from data import annotation
from data.annotation import annotation_files
from data.caption_dataset import build_caption_datasets
from data.captions import normalize_caption
from data.image_dataset import seeded
from data.images import BadImageError, find_pictures, open_image
from data.nlvr_dataset import build_nlvr_datasets, mirror
from data.samplers import EvalSampler, TrainBatchSampler
from data.transforms import CLIP_MEAN, CLIP_STD, build_transform, operations
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


def test_constant_image_is_normalised_with_clip_statistics():
    result = build_transform(16, augment=False)(Image.new("RGB", (20, 30), (255, 51, 0)))
    expected = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(result, expected.view(3, 1, 1).expand(3, 16, 16))


def test_plain_transform_keeps_the_whole_image():
    result = build_transform(20, augment=False)(gradient_image())
    shades = result * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    columns = torch.linspace(0, 1, 60).view(20, 3).mean(1)
    torch.testing.assert_close(shades[0, 10], columns, atol=0.02, rtol=0)


def test_augmentation_mirrors_half_of_the_images_as_the_generator_says():
    transform, pictures = build_transform(32, augment=True), []
    for index in range(200):
        with seeded(index):
            pictures.append(transform(gradient_image()))
    assert pictures[0].shape == (3, 32, 32) and pictures[0].dtype == torch.float32
    with seeded(7):
        assert torch.equal(transform(gradient_image()), pictures[7])
    assert len({picture.sum().item() for picture in pictures}) > 150
    # red still grows to the right unless the image was mirrored
    assert 70 < sum(int(red[:, 20:].mean() > red[:, :12].mean()) for red, *_ in pictures) < 130


# Where each operation takes the colour of pixel (x, y) from; the sign is drawn.
SHEAR, SHIFT, COS, SIN = 0.15, 5, np.cos(np.pi / 12), np.sin(np.pi / 12)
SOURCES = {
    "shear x": lambda x, y, sign: (x + sign * SHEAR * (y + 0.5), y),
    "shear y": lambda x, y, sign: (x, y + sign * SHEAR * (x + 0.5)),
    "translate x": lambda x, y, sign: (x - sign * SHIFT, y),
    "translate y": lambda x, y, sign: (x, y - sign * SHIFT),
    "rotate": lambda x, y, sign: (
        29.5 + COS * (x - 29.5) + sign * SIN * (y - 19.5),
        19.5 + COS * (y - 19.5) - sign * SIN * (x - 29.5),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_geometric_operation_takes_each_pixel_from_where_it_should(name):
    y, x = np.mgrid[:40, :60]

    def is_moved(result, sign):
        u, v = SOURCES[name](x, y, sign)
        inside = (0 <= u) & (u <= 59) & (0 <= v) & (v <= 39)
        outside = (u < -1) | (u > 60) | (v < -1) | (v > 40)
        expected = np.stack([u * 255 / 59, v * 255 / 39], -1)
        # the picture's colours are rounded down, so is their mean: each less than 1
        right = np.abs(result[..., :2] - expected)[inside].max() < 2
        return right and inside.mean() > 0.7 and outside.any() and (result[outside] == 128).all()

    signs = []
    for index in range(20):
        with seeded(index):
            result = np.asarray(operations()[name](gradient_image())).astype(int)
        (sign,) = [sign for sign in (-1, 1) if is_moved(result, sign)]
        signs.append(sign)
    assert set(signs) == {-1, 1}


@pytest.mark.parametrize("name", ["identity", "brightness", "sharpness"])
def test_operations_that_change_nothing_at_this_level(name):
    image = gradient_image()
    assert np.array_equal(operations()[name](image), image)


def test_autocontrast_stretches_each_channel_to_the_full_range():
    pale = gradient_image().point(lambda shade: 50 + shade // 2)  # 50 to 177; blue 114
    result = np.asarray(operations()["autocontrast"](pale))
    expected = (np.asarray(pale)[..., :2] - 50.0) * 255 / 127
    assert np.abs(result[..., :2] - expected).max() < 1  # rounded down
    assert (result[..., 2] == 114).all()


def test_equalize_gives_each_shade_as_much_room_as_it_has_pixels():
    dark = np.tile(np.arange(64, dtype=np.uint8), (400, 1))  # 400 pixels of each shade
    result = np.asarray(operations()["equalize"](Image.fromarray(dark).convert("RGB")))
    # Pillow steps on after 25200 // 255 = 98 pixels and not 98.8: 2.1 of 255 shades, and rounding
    assert np.abs(result[0, :, 0] - np.arange(64) * 255 / 63).max() < 3
    assert set(operations()) == set(SOURCES) | {
        *("identity", "brightness", "sharpness", "autocontrast", "equalize")
    }


def test_two_operations_are_drawn_each_half_of_the_time():
    """Of one colour a picture changes only where a geometric operation, 5 of 10, fills its rim."""
    transform, filled = build_transform(32, augment=True), 0
    for index in range(600):
        with seeded(index):
            red = transform(Image.new("RGB", (40, 40), (200, 30, 30)))[0]
        filled += int(red.min() < red.max())
    # 600 * (1 - 0.75^2) = 262.5, five standard deviations to either side; one operation: 150
    assert 262.5 - 61 < filled < 262.5 + 61


# --- samplers


def epoch_batches(n, batch_size, rank=0, world_size=1, epoch=0, start_batch=0, seed=0):
    sampler = TrainBatchSampler(n, batch_size, seed, rank, world_size)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_an_epoch_visits_every_sample_once_but_for_the_last_incomplete_batch():
    batches = epoch_batches(103, 10, epoch=7)
    visited, epochs = zip(*(item for batch in batches for item in batch), strict=True)
    assert [len(batch) for batch in batches] == [10] * 10 and set(epochs) == {7}
    assert len(set(visited)) == 100 and set(visited) < set(range(103))


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
    samplers = [EvalSampler(n, rank, world_size) for rank in range(world_size)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(n))
    sizes = [len(list(sampler)) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == sizes and max(sizes) - min(sizes) <= 1


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
        ids = [int(name[-6:-4]) for name in some]
        references = [{"image_id": i, "id": n, "caption": "a dog"} for n, i in enumerate(ids)]
        (ann / f"coco_karpathy_{split}_gt.json").write_text(json.dumps({"annotations": references}))
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

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def test_caption_items(coco):
    train, val, test = build_caption_datasets(coco)
    assert (len(train), len(val), len(test)) == (6, 2, 2)
    image, caption = train[1]
    assert (image.shape, caption) == ((3, 16, 16), "a picture of a dog number 1")
    assert val[1][1] == 47 and test[0][1] == 48
    assert train.image_paths(2) == [f"{coco['image_root']}/val2014/COCO_val2014_000000000042.jpg"]


@pytest.mark.parametrize("prompt, parted", [("a photo of", "a photo of "), (" ", " "), ("", "")])
def test_a_prompt_never_runs_into_the_caption(prompt, parted, coco):
    train, _, _ = build_caption_datasets(coco | {"prompt": prompt})
    assert train.text(1) == f"{parted}a dog number 1"


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


def test_nlvr_evaluation_is_deterministic_and_mirrors_whole_words(coco):
    _, dev, test = build_nlvr_datasets(coco)
    for dataset in (dev, test):
        for index in range(len(dataset)):
            once, again = dataset[index], dataset[(index, 9)]
            assert once[2] == again[2] == "the left image is not the right one"
            assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert mirror("the left dog is right of the leftmost").endswith("dog is left of the leftmost")


def test_a_split_may_be_cut_to_its_first_samples(coco):
    for dataset in build_caption_datasets(coco)[1:]:
        first = dataset.records[0]
        dataset.keep_first(1)
        assert len(dataset) == 1 and dataset.records == [first]
        dataset.keep_first(9)
        assert len(dataset) == 1


# --- errors


BASE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"


def test_missing_annotations_offline_are_named_all_at_once(coco, offline, tmp_path):
    names = [f"nlvr_{split}.json" for split in ("train", "dev", "test")]
    for name in names:
        (tmp_path / "annotation" / name).unlink()
    with pytest.raises(UserError) as error:
        build_nlvr_datasets(coco)
    assert offline == [f"{BASE}/{names[0]}"]  # after one that fails the others are not tried
    for name in names:
        assert f"{BASE}/{name} to {tmp_path / 'annotation' / name}" in str(error.value)
    assert "no network" in str(error.value) and "python -m data.scenes" in str(error.value)


def test_annotation_is_downloaded_once_and_whole(tmp_path, monkeypatch):
    published = tmp_path / "published"
    published.mkdir()
    (published / "nlvr_dev.json").write_text("[1, 2]")
    monkeypatch.setattr(annotation, "PUBLISHED_AT", published.as_uri())
    wanted = (tmp_path / "annotation", "nlvr_dev.json")
    (path,) = annotation_files(wanted)
    assert path.read_text() == "[1, 2]"
    (published / "nlvr_dev.json").unlink()
    assert annotation_files(wanted) == [path]
    assert [file.name for file in path.parent.iterdir()] == ["nlvr_dev.json"]


@pytest.mark.parametrize(
    "answer, message",
    [("\n<html>Please log in</html>", "is a page and not"), ("Please log in", "is not JSON")],
)
def test_a_page_in_place_of_an_annotation_is_not_kept(answer, message, tmp_path, monkeypatch):
    (tmp_path / "nlvr_dev.json").write_text(answer)
    monkeypatch.setattr(annotation, "PUBLISHED_AT", tmp_path.as_uri())
    with pytest.raises(UserError, match=message):
        annotation_files((tmp_path / "annotation", "nlvr_dev.json"))
    assert list((tmp_path / "annotation").iterdir()) == []


@pytest.mark.parametrize("main", [True, False])
def test_every_process_reports_why_the_main_ones_download_failed(main, tmp_path, monkeypatch):
    sent = []

    def broadcast(reason, device):
        sent.append(reason[0])
        reason[0] = reason[0] if main else "the network is down"

    monkeypatch.setattr(annotation, "PUBLISHED_AT", (tmp_path / "nowhere").as_uri())
    monkeypatch.setattr(annotation, "is_main", lambda: main)
    monkeypatch.setattr(annotation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(annotation.dist, "broadcast_object_list", broadcast)
    why = "No such file or directory" if main else "the network is down"
    with pytest.raises(UserError, match=why):
        annotation_files((tmp_path / "annotation", "nlvr_dev.json"))
    assert ("No such file" in sent[0]) == main  # the others try no download


def test_check_passes_on_good_data_and_names_what_is_missing(coco, tmp_path):
    train, val, _ = build_caption_datasets(coco)
    for path in (tmp_path / "images" / "val2014").iterdir():
        path.write_bytes(b"")  # images are looked up, not read
    train.check()
    for number in (46, 47):
        (tmp_path / "images" / "val2014" / f"COCO_val2014_{number:012d}.jpg").unlink()
    with pytest.raises(
        UserError, match="^2 of 2 images .*46.jpg, .*47.jpg.*image_root and ann_roo"
    ):
        val.check()
    train.image_root = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="elsewhere does not exist: set .*image_root"):
        train.check()


def linked(folder):
    (folder / "b_7.png").symlink_to("/nowhere/b.png")


INSTEAD = {
    "Caf\u00e9_7.png": (
        lambda folder: (folder / "cafe\u0301_7.JPG").touch(),
        r"has 'cafe\\u0301_7.JPG'",
    ),
    "b_7.png": (linked, "is a link to /nowhere/b.png, which does not exist"),
    "train/11/c_7.png": (lambda folder: (folder / "train").mkdir(), "is no folder .*/train/11\\."),
    "sub/train/d_7.png": (lambda folder: None, "is no folder .*/sub\\."),
    "e_7.png": (lambda folder: None, "e_7.png. They.*the same data$"),
    "/export/f_7.png": (lambda folder: None, "is not for names that begin with /"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_check_says_what_stands_where_an_image_should_be(name, coco, tmp_path):
    make, message = INSTEAD[name]
    make(tmp_path / "images")
    train, _, _ = build_caption_datasets(coco)
    train.records[0]["image"] = name
    with pytest.raises(UserError, match=message):
        train.check()


def test_check_finds_one_missing_image_of_a_pair_and_shows_few_of_many(coco, tmp_path):
    _, dev, _ = build_nlvr_datasets(coco)
    dev.check()
    (tmp_path / "images" / "val2014" / "COCO_val2014_000000000041.jpg").unlink()
    with pytest.raises(UserError, match="^1 of 2 images .*41.jpg. They"):
        dev.check()
    dev.records[0]["images"] = ["a\0.jpg", "val2014"]  # no file's name; a folder
    dev.records[1]["images"] = [str(tmp_path / "annotation" / "nlvr_dev.json"), "x/1.jpg"]
    dev.records[2]["images"] = ["x/2.jpg", "x/3.jpg"]
    with pytest.raises(UserError, match="^6 of 8 .*, [.][.][.]. They"):
        dev.check()


def test_check_with_skipping_wants_one_image(coco, tmp_path):
    train, _, _ = build_caption_datasets(coco)
    train.skip_bad_images = True
    for number in range(40, 45):
        (tmp_path / "images" / "val2014" / f"COCO_val2014_{number:012d}.jpg").unlink()
    train.check()
    (tmp_path / "images" / "val2014" / "COCO_val2014_000000000045.jpg").unlink()
    with pytest.raises(UserError, match="^6 of 6 images"):
        train.check()


# --- images that cannot be read, or not as Pillow does


def gradient_bytes(path, **options) -> bytes:
    gradient_image().save(path, **options)
    return path.read_bytes()


def long_text(path):
    info = PngInfo()
    info.add_text("comment", "a" * 3_000_000, zip=True)
    gradient_image().save(path, pnginfo=info)


def broken_checksum(path):
    data = bytearray(gradient_bytes(path))
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)


BAD_IMAGES = {
    "absent.jpg": lambda path: None,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "page.jpg": lambda path: path.write_text("<html>not found</html>"),
    "pointer.jpg": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "folder.jpg": lambda path: path.mkdir(),
    "cut.jpg": lambda path: path.write_bytes(gradient_bytes(path)[:200]),
    "cut.webp": lambda path: path.write_bytes(gradient_bytes(path)[:60]),
    "cut.tif": lambda path: path.write_bytes(gradient_bytes(path)[:9]),
    "text.png": long_text,
    "checksum.png": broken_checksum,
    "header.png": lambda path: path.write_bytes(gradient_bytes(path)[:20]),
    "float.tif": lambda path: Image.new("F", (4, 4), 0.5).save(path),
    "integer.tif": lambda path: Image.new("I", (4, 4), 70_000).save(path),
    "large.png": lambda path: Image.new("1", (1000, 1500)).save(path),
    "huge.png": lambda path: Image.new("1", (1000, 3000)).save(path),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_whatever_reading_an_image_raises_is_that_images_fault(name, tmp_path, monkeypatch):
    BAD_IMAGES[name](tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # large is beyond, huge beyond twice
    with pytest.raises(BadImageError, match=f"{tmp_path / name}: .+ Mend or replace it$"):
        open_image(str(tmp_path / name))


def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def fail(path):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        open_image("good.png")


@pytest.mark.parametrize("name, order", [("grey.png", "<"), ("grey.tif", "<"), ("grey.tif", ">")])
def test_grey_of_16_bits_keeps_its_high_byte(name, order, tmp_path):
    ramp = (np.arange(256) * 256 + 77).reshape(16, 16).astype(f"{order}u2")
    Image.fromarray(ramp).save(tmp_path / name)
    image = np.asarray(open_image(str(tmp_path / name)))
    assert np.array_equal(image[..., 1].ravel(), np.arange(256)) and image.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_pillow_makes_them(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image = gradient_image().convert(mode)
    image.save(path, **({"transparency": 3} if mode == "P" else {}))
    assert np.array_equal(open_image(str(path)), image.convert("RGB"))


def test_an_image_is_not_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: BLIP was trained without looking at it
    gradient_image().save(tmp_path / "turned.png", exif=exif)
    assert open_image(str(tmp_path / "turned.png")).size == (60, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_where_users_bring_pictures(mode, tmp_path, recwarn):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.convert(mode).save(tmp_path / "a.png")
    shown, trained = (open_image(tmp_path / "a.png", on_white=w) for w in (True, False))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    assert trained.getpixel((1, 0)) == (0, 0, 0)
    assert not recwarn.list  # Pillow's on palettes with transparency


def test_pictures_of_a_folder_are_those_that_can_be_read(tmp_path, capsys):
    for name in "b.JPG a.png ._a.png .hidden.jpg list.txt c.HEIC d.heic e.mpg".split():
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    (tmp_path / "more.png" / "IMG.NEF").touch()
    given = tmp_path / "list.txt"
    assert find_pictures([tmp_path, given]) == [tmp_path / "a.png", tmp_path / "b.JPG", given]
    assert capsys.readouterr().err == "2 .heic file(s), 1 subfolder(s) are not read\n"
    assert find_pictures([given]) == [given] and not capsys.readouterr().err
    with pytest.raises(UserError, match="no pictures .*more.png .1 .nef file.s. are not read"):
        find_pictures([tmp_path / "more.png"])


@pytest.fixture
def damaged(coco, tmp_path):
    """The COCO config, with training image 42 cut short."""
    path = tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return coco


def test_damaged_image_is_named(damaged):
    train, _, _ = build_caption_datasets(damaged)
    train.check()
    with pytest.raises(UserError, match="000000000042.jpg"):
        train[2]


def test_bad_images_are_skipped_and_counted_on_request(damaged, tmp_path):
    (tmp_path / "images" / "val2014" / "COCO_val2014_000000000041.jpg").unlink()
    train, _, _ = build_caption_datasets(damaged)
    train.skip_bad_images = True
    fetched = [train.fetch((index, 3)) for index in range(6)]
    assert [skipped for _, skipped in fetched] == [0, 2, 1, 0, 0, 0]
    assert [text[-1] for (_, text), _ in fetched] == list("033345")
    assert all(torch.equal(fetched[3][0][0], fetched[index][0][0]) for index in (1, 2))
    assert torch.equal(train[(1, 3)][0], fetched[1][0][0])


def test_loading_processes_skip_bad_images(damaged):
    train, _, _ = build_caption_datasets(damaged)
    train.skip_bad_images = True
    sampler = TrainBatchSampler(6, 3)
    alone, helped = (list(DataLoader(train, batch_sampler=sampler, num_workers=n)) for n in (0, 2))
    assert sorted(text[-1] for _, texts in helped for text in texts) == list("013345")
    assert all(torch.equal(one[0], other[0]) for one, other in zip(alone, helped, strict=True))


def test_a_pair_with_one_bad_image_is_skipped_whole(damaged):
    train, _, _ = build_nlvr_datasets(damaged | {"augment": False})
    for record in train.records[1:]:
        record["images"] = [record["images"][0].replace("40", "43")] * 2
    train.records[0]["images"] = ["val2014/COCO_val2014_000000000042.jpg"] * 2
    train.records[1]["images"][1] = "val2014/COCO_val2014_000000000042.jpg"
    train.skip_bad_images = True
    (*_, label), skipped = train.fetch(0)
    assert (label.item(), skipped) == (1, 2)


def test_no_readable_image_at_all_is_an_error(coco, tmp_path):
    train, _, _ = build_caption_datasets(coco)
    for path in (tmp_path / "images" / "val2014").iterdir():
        path.write_bytes(b"not an image")
    train.skip_bad_images = True
    with pytest.raises(UserError, match="no image under .* can be read"):
        train[0]
