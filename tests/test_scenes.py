"""The embedded scenes: what is said must be what is drawn, checked from positions and pixels."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image
from transformers import BertTokenizer

from data.caption_dataset import build_caption_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.scenes import __main__ as scenes
from data.scenes import attribute_accuracy, generate
from data.scenes.pictures import PAINT
from data.scenes.words import SIZES, attributes_correct, parse_caption, vocabulary

PER_SPLIT = {"train": 150, "val": 60, "test": 30}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small embedded set, made by the command."""
    out = tmp_path_factory.mktemp("data") / "scenes"
    scenes.main(scenes.parse_args(arguments(out)))
    return out


def arguments(out, **changes):
    settings = {
        "out": out,
        **PER_SPLIT,
        "statements": 400,
        "heldout_statements": 200,
        "seed": 0,
    }
    return [text for k, v in (settings | changes).items() for text in (f"--{k}", str(v))]


def read(root, name):
    return json.loads((root / "annotation" / f"{name}.json").read_text())


def captions_of(root, split) -> list[tuple[int, str]]:
    """(COCO id, caption) of every caption of a split."""
    rows = read(root, f"coco_karpathy_{split}")
    if split == "train":
        return [(int(row["image_id"].split("_")[1]), row["caption"]) for row in rows]
    return [
        (int(re.search(r"(\d+)\.png$", row["image"])[1]), caption)
        for row in rows
        for caption in row["caption"]
    ]


def truth_of(root, split) -> dict[int, dict]:
    return {scene["image_id"]: scene for scene in read(root, f"scenes_{split}")}


# --- layout


@pytest.mark.parametrize("split", PER_SPLIT)
def test_layout_is_that_of_coco_karpathy_and_flickr30k(root, split):
    rows, files = read(root, f"coco_karpathy_{split}"), sorted((root / "images" / split).iterdir())
    assert len(rows) == len(files) == PER_SPLIT[split]
    assert read(root, f"flickr30k_{split}") == rows
    with Image.open(files[0]) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")
    if split == "train":
        assert rows[1] == rows[1] | {"image_id": "scene_1", "image": "train/scene_0000001.png"}
        assert set(rows[0]) == {"image_id", "image", "caption"}
        return
    assert all(len(set(row["caption"])) == 5 and set(row) == {"image", "caption"} for row in rows)
    truth = read(root, f"coco_karpathy_{split}_gt")
    listed = [(row["image_id"], row["caption"]) for row in truth["annotations"]]
    assert listed == captions_of(root, split)
    assert len({row["id"] for row in truth["annotations"]}) == len(listed)
    assert [row["id"] for row in truth["images"]] == list(truth_of(root, split))


def test_datasets_read_it(root):
    config = {
        "image_root": str(root / "images"),
        "ann_root": str(root / "annotation"),
        "coco_gt_root": str(root / "annotation"),
        "image_size": 64,
        "augment": False,
        "prompt": "a picture of ",
        "max_words": 40,
    }
    for dataset in (*build_caption_datasets(config), *build_nlvr_datasets(config)):
        dataset.check()
        assert dataset[0][0].shape == (3, 64, 64)
    assert build_caption_datasets(config)[1][7][1] == 1_000_007


# --- the same settings give the same data, written once


def test_same_settings_give_the_same_data(root, tmp_path):
    scenes.main(scenes.parse_args(arguments(tmp_path / "again")))
    names = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    assert len(names) == sum(PER_SPLIT.values()) + 5 + 3 + 3 + 3 + 2
    for name in names:
        assert (root / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    first = {split: captions_of(root, split)[0][1] for split in PER_SPLIT}
    assert len(set(first.values())) == 3


def test_data_are_those_that_the_shipped_models_were_trained_on(root):
    digest = hashlib.sha256()
    for path in sorted((root / "annotation").iterdir()):
        if not path.name.startswith("flickr30k"):  # the same captions again
            digest.update(path.read_bytes())
    digest.update((root / "tokenizer" / "vocab.txt").read_bytes())
    assert digest.hexdigest()[:16] == "6e21ed3f9b078d7c"


def test_a_scene_depends_on_the_seed_and_not_on_how_many_are_made(root, tmp_path, capsys):
    """Known data are left alone, and data of other settings take their place."""
    out, few = tmp_path / "scenes", {"train": 10, "val": 20, "test": 20, "statements": 10}
    args = scenes.parse_args(arguments(out, **few, heldout_statements=10))
    scenes.main(args)
    few, many = truth_of(out, "train"), truth_of(root, "train")
    assert len(few) == 10 and all(many[coco_id] == scene for coco_id, scene in few.items())
    stamp = (out / "settings.json").stat().st_mtime_ns
    scenes.main(args)
    assert (out / "settings.json").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.splitlines() == [f"{out}: written", f"{out}: up to date"]
    args.train, args.seed = 11, 1
    scenes.main(args)
    other = truth_of(out, "train")
    assert len(list((out / "images" / "train").iterdir())) == len(other) == 11
    assert all(other[coco_id] != scene for coco_id, scene in few.items())
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="was not made by data.scenes"):
        generate.make(tmp_path, {})
    assert (tmp_path / "holiday.jpg").exists()


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "write_statements", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scenes.main(scenes.parse_args(arguments(tmp_path / "scenes")))
    assert list(tmp_path.iterdir()) == []


# --- pictures show what the annotation says


@pytest.mark.parametrize("split", PER_SPLIT)
def test_pixels_have_the_colours_of_the_objects(root, split):
    for scene in read(root, f"scenes_{split}"):
        image = np.asarray(Image.open(root / "images" / scene["image"]), dtype=float)

        def colour_at(x, y, image=image):
            patch = image[int(y) - 1 : int(y) + 1, int(x) - 1 : int(x) + 1].mean((0, 1))
            return min(PAINT, key=lambda name: np.abs(patch - PAINT[name]).sum())

        for thing in scene["objects"]:
            shown = colour_at(thing["x"], thing["y"])
            hollow = thing["kind"] == "ring"
            assert shown == (scene["background"] if hollow else thing["colour"]), scene


def test_scenes_vary(root):
    train = read(root, "scenes_train")
    counts = Counter(len(scene["objects"]) for scene in train)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 30
    things = [thing for scene in train for thing in scene["objects"]]
    for key, values in (("colour", 8), ("kind", 6), ("size", 2)):
        shares = Counter(thing[key] for thing in things)
        assert len(shares) == values and min(shares.values()) > 0.5 * len(things) / values
    sides = Counter(scene["side"] for scene in train if scene["side"])
    assert len(sides) == 4


def test_objects_fit_in_the_picture_apart_and_of_clearly_different_sizes(root):
    things = [scene["objects"] for scene in read(root, "scenes_train")]
    radii = {
        size: [t["radius"] for of in things for t in of if t["size"] == size] for size in SIZES
    }
    assert min(radii["large"]) > 1.5 * max(radii["small"])
    for of_scene in things:
        for thing, axis in product(of_scene, "xy"):
            assert thing["radius"] <= thing[axis] <= 64 - thing["radius"]
        for first, second in combinations(of_scene, 2):
            reach = first["radius"] + second["radius"]
            assert max(abs(first[axis] - second[axis]) for axis in "xy") > reach + 2


# --- captions are true


@pytest.mark.parametrize("split", PER_SPLIT)
def test_every_caption_names_exactly_the_objects_of_its_scene(root, split):
    truth = truth_of(root, split)
    for coco_id, caption in captions_of(root, split):
        objects = [(o["size"], o["colour"], o["kind"]) for o in truth[coco_id]["objects"]]
        assert sorted(parse_caption(caption)) == sorted(objects), caption
        assert len(set(objects)) == len(objects)
        grounds = re.findall(r"(\w+) background", caption)
        assert grounds in ([], [truth[coco_id]["background"]])
        numbers = re.findall(r"\b(one|two|three)\b", caption)
        assert numbers in ([], [("one", "two", "three")[len(objects) - 1]])


@pytest.mark.parametrize("split", PER_SPLIT)
def test_every_relation_holds_in_the_positions(root, split):
    truth, seen = truth_of(root, split), Counter()
    for coco_id, caption in captions_of(root, split):
        where = {
            (o["size"], o["colour"], o["kind"]): (o["x"], o["y"], o["radius"])
            for o in truth[coco_id]["objects"]
        }
        relation = re.search(r"\b(left|right|above|over|below|under)\b", caption)
        if relation is None:
            assert len(where) == 1
            continue
        seen[relation[1]] += 1
        subjects = parse_caption(caption[: relation.start()])
        others = parse_caption(caption[relation.end() :])
        assert subjects and others
        for subject, other in product(subjects, others):
            (x0, y0, r0), (x1, y1, r1) = where[subject], where[other]
            distance = {
                "left": x1 - x0,
                "right": x0 - x1,
                "above": y1 - y0,
                "over": y1 - y0,
                "below": y0 - y1,
                "under": y0 - y1,
            }[relation[1]]
            assert distance > r0 + r1 + 3, caption
    assert len(seen) == 6


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
def test_attributes_correct(caption, correct):
    objects = [("small", "red", "star"), ("large", "blue", "ring")]
    assert attributes_correct(caption, objects) is correct


def test_attribute_accuracy_counts_captions(root):
    path = root / "annotation" / "scenes_val.json"
    results = [
        {"image_id": image_id, "caption": caption}
        for image_id, caption in captions_of(root, "val")[::5]
    ]
    assert attribute_accuracy(results, path) == 1.0
    for row in results[:15]:
        row["caption"] = "a picture"
    assert attribute_accuracy(results, path) == 0.75


# --- vocabulary


def test_tokenizer_knows_every_word(root):
    tokenizer = BertTokenizer.from_pretrained(root / "tokenizer")
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))
    assert vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [caption for split in PER_SPLIT for _, caption in captions_of(root, split)]
    texts += [
        row["sentence"] for split in ("train", "dev", "test") for row in statements(root, split)
    ]
    for text in ["a picture of ", *texts]:
        tokens = tokenizer.tokenize(text)
        assert tokens == text.split(), text
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


# --- statements about pairs


def statements(root, split):
    return read(root, f"nlvr_{split}")


NOUN = r"((?:an? )?(?:\w+ )?\w+)"
FAMILIES = {
    rf"the (left|right) image contains {NOUN} and the (left|right) image contains {NOUN}": "each",
    rf"the (left|right) image contains {NOUN} and the other image contains {NOUN}": "one and other",
    rf"(both|neither) images? contains? {NOUN}": "both or neither",
    rf"at least one image contains {NOUN}": "either",
    rf"only the (left|right) image contains {NOUN}": "only",
    rf"the (left|right) image contains (more|fewer) {NOUN} than the (left|right) image": "compare",
    rf"there (?:are|is) exactly (one|two|three) {NOUN} in the two images": "total",
}


def count(scene, noun):
    """Objects of a scene that a noun phrase, singular or plural, fits."""
    *adjectives, kind = noun.removeprefix("an ").removeprefix("a ").split()
    kind = {"crosses": "cross", "cross": "cross"}.get(kind, kind.removesuffix("s"))
    wanted = {*adjectives, kind} - {"shape"}
    return sum(wanted <= {o["size"], o["colour"], o["kind"]} for o in scene["objects"])


def holds(sentence, left, right):
    """(family, truth) of a statement, read from its words alone."""
    side, other = {"left": left, "right": right}, {"left": right, "right": left}
    (found,) = (
        (family, match.groups())
        for pattern, family in FAMILIES.items()
        if (match := re.fullmatch(pattern, sentence))
    )
    family, words = found
    if family == "each":
        return family, bool(count(side[words[0]], words[1]) and count(side[words[2]], words[3]))
    if family == "one and other":
        in_this, in_that = count(side[words[0]], words[1]), count(other[words[0]], words[2])
        return family, bool(in_this and in_that)
    if family == "either":
        return family, bool(count(left, words[0]) or count(right, words[0]))
    if family == "only":
        return family, bool(
            count(side[words[0]], words[1]) and not count(other[words[0]], words[1])
        )
    counts = [count(scene, words[1]) for scene in (left, right)]
    if family == "both or neither":
        return words[0], all(counts) if words[0] == "both" else not any(counts)
    if family == "total":
        return family, sum(count(s, words[1]) for s in (left, right)) == NUMBERS[words[0]]
    this, that = count(side[words[0]], words[2]), count(side[words[3]], words[2])
    assert words[0] != words[3]
    return words[1], this > that if words[1] == "more" else this < that


NUMBERS = {"one": 1, "two": 2, "three": 3}


@pytest.mark.parametrize("split, images", [("train", "train"), ("dev", "val"), ("test", "test")])
def test_every_label_is_true_of_the_scenes(root, split, images):
    truth = {scene["image"]: scene for scene in truth_of(root, images).values()}
    families = Counter()
    for row in statements(root, split):
        left, right = (truth[name] for name in row["images"])
        family, expected = holds(row["sentence"], left, right)
        families[family] += 1
        assert row["label"] == str(expected), row
        assert left != right
    assert len(families) == 9


@pytest.mark.parametrize("split, size", [("train", 400), ("dev", 200), ("test", 200)])
def test_text_says_nothing_about_the_label(root, split, size):
    labels = defaultdict(list)
    for row in statements(root, split):
        labels[row["sentence"]].append(row["label"])
    assert sum(map(len, labels.values())) == size
    for sentence, given in labels.items():
        assert given.count("True") == given.count("False"), sentence


def test_too_few_scenes_for_statements(tmp_path):
    with pytest.raises(ValueError, match="2 scenes are too few for statements"):
        scenes.main(scenes.parse_args(arguments(tmp_path / "scenes", val=2)))


def test_one_image_does_not_decide(root):
    """A statement's true and false pair share an image, on either side."""
    shared = Counter()
    rows = statements(root, "train")
    for row in rows:
        for other in rows:
            if other["sentence"] == row["sentence"] and other["label"] != row["label"]:
                shared.update(i for i in range(2) if row["images"][i] == other["images"][i])
    assert sum(shared.values()) >= len(rows) and min(shared.values()) > 0.3 * len(rows)
