"""The embedded scenes: what is said must be what is drawn, checked from positions and pixels."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest
from PIL import Image

from data.scenes import __main__ as scenes
from data.scenes import attribute_accuracy, generate
from data.scenes.pictures import PAINT
from data.scenes.words import MENTION

SIZES = {"train": 150, "val": 60, "test": 30, "statements": 400, "heldout_statements": 200}
SPLITS = ("train", "val", "test")
STATEMENTS = {"train": "train", "dev": "val", "test": "test"}  # and the split of their images
NUMBERS = {"one": 1, "two": 2, "three": 3}


def make(out, **changes):
    flags = [f"--{name}={value}" for name, value in (SIZES | {"out": out} | changes).items()]
    scenes.main(scenes.parse_args(flags))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    make(out)
    return out


def read(root, name):
    return json.loads((root / "annotation" / f"{name}.json").read_text())


def captions_of(root, split) -> list[tuple[int, str]]:
    """(COCO id, caption) of every caption of a split."""
    rows = read(root, f"coco_karpathy_{split}")
    if split == "train":
        return [(int(row["image_id"].split("_")[1]), row["caption"]) for row in rows]
    ids = [int(re.search(r"(\d+)\.png$", row["image"])[1]) for row in rows]
    return [(i, text) for i, row in zip(ids, rows, strict=True) for text in row["caption"]]


def truth_of(root, split) -> dict[int, dict]:
    return {scene["image_id"]: scene for scene in read(root, f"scenes_{split}")}


@pytest.mark.parametrize("split", SPLITS)
def test_layout_is_that_of_coco_karpathy_and_flickr30k(root, split):
    rows, files = read(root, f"coco_karpathy_{split}"), sorted((root / "images" / split).iterdir())
    assert len(rows) == len(files) == SIZES[split]
    assert read(root, f"flickr30k_{split}") == rows
    with Image.open(files[0]) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")
    if split != "train":
        truth = read(root, f"coco_karpathy_{split}_gt")
        listed = [(row["image_id"], row["caption"]) for row in truth["annotations"]]
        assert listed == captions_of(root, split)
        assert [row["id"] for row in truth["images"]] == list(truth_of(root, split))


def test_data_are_those_that_the_shipped_models_were_trained_on(root):
    digest = hashlib.sha256()
    for path in sorted((root / "annotation").iterdir()):
        if not path.name.startswith("flickr30k"):  # the same captions again
            digest.update(path.read_bytes())
    digest.update((root / "tokenizer" / "vocab.txt").read_bytes())
    assert digest.hexdigest()[:16] == "6e21ed3f9b078d7c"


def test_a_scene_depends_on_the_seed_and_not_on_how_many_are_made(root, tmp_path, capsys):
    """Known data are left alone, and data of other settings take their place."""
    out, few = tmp_path / "scenes", dict.fromkeys(SIZES, 20)
    make(out, **few)
    first, many = truth_of(out, "train"), truth_of(root, "train")
    assert len(first) == 20 and all(many[coco_id] == scene for coco_id, scene in first.items())
    for scene in first.values():
        image = f"images/{scene['image']}"
        assert (out / image).read_bytes() == (root / image).read_bytes()
    stamp = (out / "settings.json").stat().st_mtime_ns
    make(out, **few)
    assert (out / "settings.json").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.splitlines() == [f"{out}: written", f"{out}: up to date"]
    make(out, **few | {"train": 21, "seed": 1})
    other = truth_of(out, "train")
    assert len(list((out / "images" / "train").iterdir())) == len(other) == 21
    assert all(other[coco_id] != scene for coco_id, scene in first.items())
    assert list(tmp_path.iterdir()) == [out]


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="was not made by data.scenes"):
        generate.make(tmp_path, {})
    assert (tmp_path / "holiday.jpg").exists()


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="2 scenes are too few for statements"):
        make(tmp_path / "scenes", val=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_have_the_colours_of_the_objects(root, split):
    for scene in read(root, f"scenes_{split}"):
        image = np.asarray(Image.open(root / "images" / scene["image"]), dtype=float)
        for thing in scene["objects"]:
            x, y = int(thing["x"]), int(thing["y"])
            shown = image[y - 1 : y + 1, x - 1 : x + 1].mean((0, 1))
            shown = min(PAINT, key=lambda name, shown=shown: np.abs(shown - PAINT[name]).sum())
            hollow = thing["kind"] == "ring"
            assert shown == (scene["background"] if hollow else thing["colour"]), scene
            for axis in "xy":
                assert thing["radius"] <= thing[axis] <= 64 - thing["radius"]


# Words for the side on which the first objects lie: the axis, and its direction to the others.
SIDES = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "over": (1, 1)}
SIDES |= {"below": (1, -1), "under": (1, -1)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_names_exactly_the_objects_of_its_scene_and_how_they_lie(root, split):
    truth, seen = truth_of(root, split), set()
    for coco_id, caption in captions_of(root, split):
        scene = truth[coco_id]
        where = {
            (o["size"], o["colour"], o["kind"]): (o["x"], o["y"], o["radius"])
            for o in scene["objects"]
        }
        assert sorted(MENTION.findall(caption)) == sorted(where), caption
        assert len(where) == len(scene["objects"])
        assert {*re.findall(r"(\w+) background", caption)} <= {scene["background"]}
        numbers = re.findall(r"\b(one|two|three)\b", caption)
        assert {NUMBERS[number] for number in numbers} <= {len(where)}
        if len(where) > 1:
            first, side, others = re.split(rf"\b({'|'.join(SIDES)})\b", caption)
            seen.add(side)
            axis, sign = SIDES[side]
            assert MENTION.findall(first) and MENTION.findall(others)
            for a, b in product(MENTION.findall(first), MENTION.findall(others)):
                distance = sign * (where[b][axis] - where[a][axis])
                assert distance > where[a][2] + where[b][2] + 3, caption
    assert seen == SIDES.keys()


@pytest.mark.parametrize(
    "caption, correct",
    [
        ("a large blue ring", True),
        ("a small red star left of a large blue ring", True),
        ("a small blue ring", False),
        ("a large blue ring above a blue ring", False),
        ("a large blue ring and a large blue ring", False),
        ("a gray background", False),
    ],
)
def test_accuracy_is_the_share_of_captions_whose_objects_are_there(caption, correct, tmp_path):
    words = (("small", "red", "star"), ("large", "blue", "ring"))
    objects = [dict(zip(("size", "colour", "kind"), of_one, strict=True)) for of_one in words]
    (tmp_path / "scenes.json").write_text(json.dumps([{"image_id": 7, "objects": objects}]))
    results = [{"image_id": 7, "caption": text} for text in (caption, caption, "a small red star")]
    assert attribute_accuracy(results, tmp_path / "scenes.json") == (1 if correct else 1 / 3)


# a counts the named side's image, or the left one, b the other
FAMILIES = {
    "the SIDE image contains X and the OTHER image contains X": lambda a, b, x, y: a(x) and b(y),
    "the SIDE image contains X and the other image contains X": lambda a, b, x, y: a(x) and b(y),
    "both images contain X": lambda a, b, x: a(x) and b(x),
    "neither image contains X": lambda a, b, x: not a(x) and not b(x),
    "at least one image contains X": lambda a, b, x: a(x) or b(x),
    "only the SIDE image contains X": lambda a, b, x: a(x) and not b(x),
    "the SIDE image contains more X than the OTHER image": lambda a, b, x: a(x) > b(x),
    "the SIDE image contains fewer X than the OTHER image": lambda a, b, x: a(x) < b(x),
    "there (?:are|is) exactly (one|two|three) X in the two images": (
        lambda a, b, number, x: a(x) + b(x) == NUMBERS[number]
    ),
}
PARTS = {"SIDE": "(?P<side>left|right)", "OTHER": r"(?!other|(?P=side))\w+"}
PARTS |= {"X": r"((?:an? )?(?:\w+ )?\w+)"}


def counter(scene):
    """Counts the objects of a scene that a noun phrase, singular or plural, fits."""

    def count(noun):
        *adjectives, kind = noun.removeprefix("an ").removeprefix("a ").split()
        kind = {"crosses": "cross", "cross": "cross"}.get(kind, kind.removesuffix("s"))
        wanted = {*adjectives, kind} - {"shape"}
        return sum(wanted <= {o["size"], o["colour"], o["kind"]} for o in scene["objects"])

    return count


def holds(sentence, left, right):
    """(family, truth) of a statement."""
    for family, truth in FAMILIES.items():
        pattern = re.sub("|".join(PARTS), lambda part: PARTS[part[0]], family)
        if found := re.fullmatch(pattern, sentence):
            words = [word for word in found.groups() if word not in ("left", "right")]
            a, b = (right, left) if "right" in found.groups() else (left, right)
            return family, bool(truth(counter(a), counter(b), *words))
    raise AssertionError(sentence)


@pytest.mark.parametrize("split", STATEMENTS)
def test_every_label_is_true_of_the_scenes_and_the_text_says_nothing_about_it(root, split):
    truth = {scene["image"]: scene for scene in truth_of(root, STATEMENTS[split]).values()}
    families, labels = set(), defaultdict(Counter)
    rows = read(root, f"nlvr_{split}")
    for row in rows:
        left, right = (truth[name] for name in row["images"])
        family, expected = holds(row["sentence"], left, right)
        assert row["label"] == str(expected) and left != right, row
        families.add(family)
        labels[row["sentence"]][row["label"]] += 1
    assert len(rows) == SIZES["statements" if split == "train" else "heldout_statements"]
    assert families == FAMILIES.keys()
    assert all(found["True"] == found["False"] for found in labels.values())
