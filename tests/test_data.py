"""Captions, transforms, samplers and datasets."""

import json
import shutil
import urllib.error
import urllib.request
from collections import Counter
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import annotation
from data.annotation import annotation_files
from data.caption_dataset import build_caption_datasets
from data.captions import normalize_caption
from data.flickr_dataset import build_flickr_datasets
from data.image_dataset import seeded
from data.images import BadImageError, find_pictures, open_image
from data.nlvr_dataset import build_nlvr_datasets, mirror
from data.samplers import EvalSampler, TrainBatchSampler
from data.transforms import build_transform, operations
from engine.loading import read, train_loader
from engine.processes import Process
from utils import UserError


def test_captions_are_normalised_as_in_the_original(golden_dir):
    cases = json.loads((golden_dir / "captions.json").read_text())
    assert len(cases) > 20
    for case in cases:
        assert normalize_caption(case["caption"], case["max_words"]) == case["expected"], case


# --- transforms

CLIP = [(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)]


def gradient_image(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards: every distortion shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 128 + 0 * x], -1).astype(np.uint8))


def test_plain_transform_keeps_the_whole_image_and_normalises_it_as_clip():
    result = build_transform(20, augment=False)(gradient_image())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    shades = result * std + mean
    columns = torch.linspace(0, 1, 60).view(20, 3).mean(1)
    torch.testing.assert_close(shades[0, 10], columns, atol=0.02, rtol=0)
    torch.testing.assert_close(shades[2], torch.full((20, 20), 128 / 255))


def test_augmentation_mirrors_half_of_the_images_as_the_generator_says():
    transform, pictures = build_transform(32, augment=True), []
    for index in (*range(200), 7):
        with seeded(index):
            pictures.append(transform(gradient_image()))
    assert pictures[0].shape == (3, 32, 32) and pictures[0].dtype == torch.float32
    assert torch.equal(pictures.pop(), pictures[7])
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


def test_operations_on_colours():
    """Autocontrast stretches shades, equalize gives each as much room as it has pixels."""
    image = gradient_image()
    for name in ("identity", "brightness", "sharpness"):  # at this level
        assert np.array_equal(operations()[name](image), image)
    pale = image.point(lambda shade: 50 + shade // 2)  # 50 to 177; blue 114
    result = np.asarray(operations()["autocontrast"](pale))
    expected = (np.asarray(pale)[..., :2] - 50.0) * 255 / 127
    assert np.abs(result[..., :2] - expected).max() < 1  # rounded down
    assert (result[..., 2] == 114).all()
    dark = np.tile(np.arange(64, dtype=np.uint8), (400, 1))  # 400 pixels of each shade
    result = np.asarray(operations()["equalize"](Image.fromarray(dark).convert("RGB")))
    # Pillow steps on after 25200 // 255 = 98 pixels and not 98.8: 2.1 of 255 shades, and rounding
    assert np.abs(result[0, :, 0] - np.arange(64) * 255 / 63).max() < 3
    assert len(operations()) == len(SOURCES) + 5


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


def epoch_batches(n, batch_size, rank=0, world_size=1, epoch=7, start_batch=0, seed=0):
    sampler = TrainBatchSampler(n, batch_size, seed, rank, world_size)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_an_epoch_visits_every_sample_once_but_for_the_last_incomplete_batch():
    batches = epoch_batches(103, 10)
    visited, epochs = zip(*(item for batch in batches for item in batch), strict=True)
    assert [len(batch) for batch in batches] == [10] * 10 and set(epochs) == {7}
    assert len(set(visited)) == 100 and set(visited) < set(range(103))
    assert epoch_batches(103, 10, start_batch=5) == batches[5:]
    for other in (epoch_batches(103, 10, epoch=6), epoch_batches(103, 10, seed=1)):
        assert visited != tuple(index for batch in other for index, _ in batch)
    first, second = (epoch_batches(103, 5, rank, world_size=2) for rank in range(2))
    assert batches == [a + b for a, b in zip(first, second, strict=True)]
    assert len(TrainBatchSampler(103, 5, world_size=2)) == 10
    with pytest.raises(UserError, match="7 training samples .* batch of 4 on each of 2"):
        TrainBatchSampler(7, 4, world_size=2)


@pytest.mark.parametrize("n, world_size", [(11, 1), (11, 3), (2, 4), (0, 2)])
def test_evaluation_batches_have_the_same_members_in_any_number_of_processes(n, world_size):
    batches = [list(range(first, min(first + 3, n))) for first in range(0, n, 3)]
    for rank in range(world_size):
        sampler = EvalSampler(n, rank, world_size, batch_size=3)
        assert list(sampler) == sum(batches[rank::world_size], [])
        assert len(sampler) == len(list(sampler))


# --- datasets


@pytest.fixture
def config(scenes, tmp_path):
    """Of a copy of the scenes, which a test may change."""
    places = {"image_root": "images", "ann_root": "annotation", "coco_gt_root": "annotation"}
    root = shutil.copytree(scenes, tmp_path / "scenes")
    config = {"image_size": 16, "augment": True, "prompt": "a picture of ", "max_words": 8}
    return config | {key: str(root / folder) for key, folder in places.items()}


def test_caption_items(config):
    train, val, test = build_caption_datasets(config)
    assert (len(train), len(val), len(test)) == (48, 6, 6)
    train.records[1]["caption"] = "A Dog; number 1!"
    image, caption = train[1]
    assert (image.shape, caption) == ((3, 16, 16), "a picture of a dog number 1")
    assert val[1][1] == 1_000_001 and test[0][1] == 2_000_000
    assert train.image_paths(2) == [f"{config['image_root']}/train/scene_0000002.png"]
    for prompt, parted in (("a photo of", "a photo of "), (" ", " "), ("", "")):
        train, _, _ = build_caption_datasets(config | {"prompt": prompt, "max_words": 1})
        assert train.text(1) == f"{parted}{train.records[1]['caption'].split()[0]}"


def test_pairs_for_retrieval_and_held_out_images_with_all_their_texts(config):
    file = Path(config["ann_root"], "flickr30k_val.json")
    rows = [{"image": "a.jpg", "caption": ["A.", "B!"]}, *json.loads(file.read_text())[1:]]
    file.write_text(json.dumps(rows))
    train, val, _ = build_flickr_datasets(config)
    image, caption, image_id = train[3]
    assert (image.shape, image_id) == ((3, 16, 16), 3)
    assert caption == normalize_caption(train.records[3]["caption"], 8)
    assert val[1][1] == 1 and val[1][0].shape == (3, 16, 16)
    assert list(val.image_of_text) == [0, 0, *(image for image in range(1, 6) for _ in range(5))]
    assert [val.texts[n] for n in (0, 1)] == [("a", 0), ("b", 1)] and len(val.texts) == 27
    for samples in (1, 9):
        val.keep_first(samples)
        assert (len(val), len(val.texts), list(val.image_of_text)) == (1, 2, [0, 0])


def test_retrieval_counts_images_by_their_ids(config):
    rows = [{"image": "a.jpg", "caption": "a", "image_id": i} for i in ("c", "a", "c", 7)]
    rows = json.dumps([*rows, {"image": "a.jpg", "caption": "a"}])
    Path(config["ann_root"], "flickr30k_train.json").write_text(rows)
    assert build_flickr_datasets(config)[0].image_ids == [0, 1, 0, 2, 3]


def test_training_images_depend_on_index_epoch_and_seed_only(config):
    train, val, _ = build_caption_datasets(config, seed=5)
    state = torch.get_rng_state()
    first = train[(3, 1)][0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again, _, _ = build_caption_datasets(config, seed=5)
    assert torch.equal(again[(3, 1)][0], first)
    assert torch.equal(train[(3, 0)][0], train[3][0])
    assert not torch.equal(train[(3, 2)][0], first)
    assert not torch.equal(build_caption_datasets(config, seed=6)[0][(3, 1)][0], first)
    without, _, _ = build_caption_datasets(config | {"augment": False})
    for dataset, index in ((val, 0), (without, (0, 3))):
        assert torch.equal(dataset[index][0], plain(*dataset.image_paths(0)))


def plain(path) -> torch.Tensor:
    return build_transform(16, augment=False)(Image.open(path))


def test_nlvr_training_swaps_images_and_words_together_and_evaluation_does_not(config):
    train, dev, test = build_nlvr_datasets(config | {"augment": False, "max_words": 40})
    swaps = Counter()
    for name, dataset in (("train", train), ("dev", dev), ("test", test)):
        pairs = [tuple(map(plain, dataset.image_paths(index))) for index in range(8)]
        for index, epoch in product(range(8), range(25)):
            (left, right), record = pairs[index], dataset.records[index]
            image0, image1, sentence, label = dataset[(index, epoch)]
            swapped = torch.equal(image0, right)
            swaps[name] += swapped
            assert torch.equal(image0, right if swapped else left)
            assert torch.equal(image1, left if swapped else right)
            assert sentence == (mirror if swapped else str)(record["sentence"])
            assert label.item() == record["label"] and label.dtype == torch.int64
    assert 70 < swaps["train"] < 130 and swaps["dev"] == swaps["test"] == 0  # of 200
    assert mirror("the left dog is right of the leftmost").endswith("dog is left of the leftmost")


# --- annotation files that are missing

BASE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"


def test_missing_annotations_offline_are_named_all_at_once(config, monkeypatch):
    refused = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    files = [Path(config["ann_root"], f"nlvr_{split}.json") for split in ("train", "dev", "test")]
    for file in files:
        file.unlink()
    with pytest.raises(UserError, match="no network(.|\n)*python -m data.scenes") as error:
        build_nlvr_datasets(config)
    assert refused.call_count == 1  # after one that fails the others are not tried
    for file in files:
        assert f"{BASE}/{file.name} to {file}" in str(error.value)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The file that is published as nlvr_dev.json."""
    monkeypatch.setattr(annotation, "PUBLISHED_AT", tmp_path.as_uri())
    return tmp_path / "nlvr_dev.json"


def test_annotation_is_downloaded_once_and_only_if_it_is_json(published, tmp_path):
    folder = tmp_path / "annotation"
    published.write_text("Please log in")
    with pytest.raises(UserError, match="is not JSON"):
        annotation_files((folder, "nlvr_dev.json"))
    assert list(folder.iterdir()) == []
    published.write_text("[1, 2]", "utf-8-sig")
    for _ in range(2):
        (path,) = annotation_files((folder, "nlvr_dev.json"))
        assert path.read_text("utf-8-sig") == "[1, 2]"
        published.unlink(missing_ok=True)
    assert list(folder.iterdir()) == [path]


def test_the_others_report_why_the_main_processs_download_failed(published, tmp_path, monkeypatch):
    def broadcast(reason, device):
        reason[0] = "the main one has no network"

    published.write_text("[]")
    monkeypatch.setattr(annotation, "is_main", lambda: False)
    monkeypatch.setattr(annotation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(annotation.dist, "broadcast_object_list", broadcast)
    with pytest.raises(UserError, match="the main one has no network"):
        annotation_files((tmp_path / "annotation", "nlvr_dev.json"))


# --- images that are missing


def test_check_names_what_is_missing_and_reads_no_image(config):
    train, val, _ = build_caption_datasets(config)
    _, dev, _ = build_nlvr_datasets(config)
    for path in Path(config["image_root"]).rglob("*.png"):
        path.write_bytes(b"")
    train.check()
    dev.check()
    for path in (*val.image_paths(1), *val.image_paths(4)):
        Path(path).unlink()
    with pytest.raises(UserError, match="^2 of 6 images .*01.png, .*04.png.*image_root"):
        val.check()
    dev.records = [{"images": ["a\0.jpg", "val"]}]  # no file's name; a folder
    dev.records += [{"images": [f"{config['ann_root']}/nlvr_dev.json", "x/1.jpg"]}]  # there is one
    dev.records += [{"images": ["x/2.jpg", f"x/{n}.jpg"]} for n in (3, 4)]
    with pytest.raises(UserError, match="^6 of 7 .*, [.][.][.]. They"):
        dev.check()
    train.image_root = Path("elsewhere")
    with pytest.raises(UserError, match="elsewhere does not exist: set .*image_root"):
        train.check()


INSTEAD = {
    "Caf\u00e9_7.png": (lambda folder: (folder / "cafe\u0301_7.JPG").touch(), "has 'cafe.*JPG'"),
    "b_7.png": (lambda folder: (folder / "b_7.png").symlink_to("/b.png"), "is a link to /b.png"),
    "train/11/c_7.png": (lambda folder: None, "is no folder .*/train/11\\."),
    "sub/train/d_7.png": (lambda folder: None, "is no folder .*/sub\\."),
    "e_7.png": (lambda folder: None, "e_7.png. They.*the same data$"),
    "/export/f_7.png": (lambda folder: None, "is not for names that begin with /"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_check_says_what_stands_where_an_image_should_be(name, config):
    make, message = INSTEAD[name]
    train, _, _ = build_caption_datasets(config)
    make(train.image_root)
    train.records[0]["image"] = name
    with pytest.raises(UserError, match=message):
        train.check()


# --- images that cannot be read, or not as Pillow does


def save_cut(path, length: int):
    gradient_image().save(path)
    path.write_bytes(path.read_bytes()[:length])


LONG_TEXT = PngInfo()
LONG_TEXT.add_text("comment", "a" * 3_000_000, zip=True)
BAD_IMAGES = {
    "absent.jpg": lambda path: None,
    "pointer.jpg": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "cut.jpg": lambda path: save_cut(path, 200),
    "cut.tif": lambda path: save_cut(path, 9),
    "text.png": lambda path: gradient_image().save(path, pnginfo=LONG_TEXT),
    "float.tif": lambda path: Image.new("F", (4, 4), 0.5).save(path),
    "integer.tif": lambda path: Image.new("I", (4, 4), 70_000).save(path),
    "large.png": lambda path: Image.new("1", (1000, 1500)).save(path),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_whatever_reading_an_image_raises_is_that_images_fault(name, tmp_path, monkeypatch):
    BAD_IMAGES[name](tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # of which Pillow only warns
    with pytest.raises(BadImageError, match=f"{tmp_path / name}: .+ Mend or replace it$"):
        open_image(str(tmp_path / name))
    if name == "large.png":  # as a phone of a user's makes them
        assert open_image(tmp_path / name, on_white=True).size == (1000, 1500)


def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch):
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        open_image("good.png")


@pytest.mark.parametrize("name, order", [("grey.png", "<"), ("grey.tif", "<"), ("grey.tif", ">")])
def test_grey_of_16_bits_keeps_its_high_byte(name, order, tmp_path):
    ramp = (np.arange(256) * 256 + 77).reshape(16, 16).astype(f"{order}u2")
    Image.fromarray(ramp).save(tmp_path / name)
    image = np.asarray(open_image(str(tmp_path / name)))
    assert np.array_equal(image[..., 1].ravel(), np.arange(256)) and image.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_pillow_makes_them_not_turned_as_exif_says(mode, tmp_path):
    path, exif = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: BLIP was trained without looking at it
    gradient_image().convert(mode).save(path, exif=exif, transparency=3 if mode == "P" else None)
    image = Image.open(path)
    assert np.array_equal(open_image(str(path)), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_pictures_of_users_are_laid_on_white_and_turned(mode, tmp_path, recwarn):
    image, exif = Image.new("RGBA", (2, 1), (0, 0, 0, 255)), Image.Exif()
    image.putpixel((1, 0), (0, 0, 0, 0))
    exif[0x0112] = 8  # to be turned counterclockwise by a quarter
    image.convert(mode).save(tmp_path / "a.png", exif=exif)
    shown, trained = (open_image(tmp_path / "a.png", on_white=w) for w in (True, False))
    assert [shown.getpixel((0, y)) for y in (1, 0)] == [(0, 0, 0), (255, 255, 255)]
    assert trained.getpixel((1, 0)) == (0, 0, 0)
    assert not recwarn.list  # Pillow's on palettes with transparency


def test_pictures_of_a_folder_are_those_that_can_be_read(tmp_path, capsys):
    for name in "b.JPG a.png ._a.png .hidden.jpg list.txt c.HEIC d.heic e.mpg f.eps".split():
        (tmp_path / name).touch()
    (tmp_path / "away.jpg").symlink_to("unplugged/away.jpg")
    (tmp_path / "more.png").mkdir()
    (tmp_path / "more.png" / "IMG.NEF").touch()
    given = tmp_path / "list.txt"
    assert find_pictures([tmp_path, given]) == [tmp_path / "a.png", tmp_path / "b.JPG", given]
    passed_over = "2 .heic file(s), 1 .jpg file(s), 1 subfolder(s) are not read\n"
    assert capsys.readouterr().err == passed_over
    assert find_pictures([given]) == [given] and not capsys.readouterr().err
    with pytest.raises(UserError, match="no pictures .*more.png .1 .nef file.s. are not read"):
        find_pictures([tmp_path / "more.png"])


def test_bad_images_are_errors_or_skipped_and_counted_on_request(config):
    train, _, _ = build_caption_datasets(config)
    pairs, _, _ = build_nlvr_datasets(config)
    train.records = train.records[:6]
    paths = [Path(*train.image_paths(index)) for index in range(6)]
    paths[1].unlink()
    paths[2].write_bytes(b"not an image")
    train.skip_bad_images = pairs.skip_bad_images = True
    train.check()  # as long as there is one
    fetched = [train.fetch((index, 3)) for index in range(6)]
    assert [skipped for _, skipped in fetched] == [0, 2, 1, 0, 0, 0]
    assert [text for (_, text), _ in fetched] == [train.text(index) for index in (0, 3, 3, 3, 4, 5)]
    assert all(torch.equal(fetched[3][0][0], fetched[index][0][0]) for index in (1, 2))
    for place, pair in enumerate(((0, 1), (3, 4))):  # one image of the first pair is missing
        pairs.records[place]["images"] = [train.records[index]["image"] for index in pair]
    assert pairs.fetch(0)[1] == 1
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match="no image under .* can be read"):
        train[0]
    with pytest.raises(UserError, match="^6 of 6 images"):
        train.check()


def test_a_loading_process_names_the_image_that_it_cannot_read(config):
    """Without its traceback, which nobody needs."""
    train, _, _ = build_caption_datasets(config)
    for path in Path(config["image_root"], "train").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    process = Process(0, 1, torch.device("cpu"))
    loader = train_loader({"batch_size": 4, "num_workers": 1}, train, 0, process)
    with pytest.raises(UserError, match="^cannot read image .*--skip_bad_images$"):
        next(read(loader))
