"""Annotation files of every kind that users have: read, or told what is wrong with them."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.caption_dataset import build_caption_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.records import read_id, read_label, read_references
from utils import UserError

IMAGE = "COCO_val2014_000000000042.jpg"
TRAIN = {"image": IMAGE, "caption": "A dog.", "image_id": "coco_42"}
EVAL = {"image": IMAGE, "caption": ["a dog"] * 5}
REFERENCE = {"image_id": 42, "id": 1, "caption": "a dog"}
STATEMENT = {"sentence": "There is a dog.", "label": "True", "images": [IMAGE, IMAGE]}
FILES = {
    "coco_karpathy_train.json": [TRAIN, TRAIN],
    "coco_karpathy_val.json": [EVAL],
    "coco_karpathy_val_gt.json": {"annotations": [REFERENCE, REFERENCE], "images": [{"id": 42}]},
    "coco_karpathy_test.json": [EVAL],
    "coco_karpathy_test_gt.json": {"annotations": [REFERENCE]},
    "nlvr_train.json": [STATEMENT],
    "nlvr_dev.json": [STATEMENT, STATEMENT],
    "nlvr_test.json": [STATEMENT],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One image, and good annotation files."""
    folder = tmp_path_factory.mktemp("coco")
    Image.new("RGB", (8, 8)).save(folder / IMAGE)
    for name, good in FILES.items():
        (folder / name).write_text(json.dumps(good))
    return folder


def load(folder, task: str):
    """Builds the data sets of a task, and loads an item of each."""
    config = {
        **dict.fromkeys(("image_root", "ann_root", "coco_gt_root"), str(folder)),
        "image_size": 8,
        "augment": False,
        "prompt": "a picture of ",
        "max_words": 8,
    }
    datasets = (build_nlvr_datasets if task == "nlvr" else build_caption_datasets)(config)
    for dataset in datasets:
        dataset.check()
        dataset[0]
    return datasets


def build(folder, name: str, content, encoding: str = "utf-8"):
    """Loads the data sets that have another content in one file."""
    text = content if isinstance(content, str) else json.dumps(content)
    try:
        (folder / name).write_bytes(text.encode(encoding))
        return load(folder, name.split("_")[0])
    finally:
        (folder / name).write_text(json.dumps(FILES[name]))


# --- what is read


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["True", "true", " TRUE", True, 1, "1"], 1),
        (["False", "false", "FALSE\n", False, 0, "0"], 0),
        (["yes", "", None, 2, -1, 1.0, ["True"], {"True": 1}], None),
    ],
)
def test_labels(labels, expected):
    assert [read_label(label) for label in labels] == [expected] * len(labels)


def test_ids_are_numbers_or_end_texts():
    names = [IMAGE, "val/scene_0000042.png", "a/v1.2/img-42.JPEG"]
    assert {read_id(value) for value in [42, "42", " 42 ", "000042", "coco_42", *names]} == {42}
    others = ["kitten.jpg", "", "42 dogs", True, None, 4.2, -1, 10**18, "9" * 19, "9" * 5000, [42]]
    assert {read_id(value) for value in [*others, "٤٢"]} == {None}


def test_paths_as_windows_writes_them_are_read(folder):
    (folder / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val2014" / IMAGE)
    record = TRAIN | {"image": f"val2014\\{IMAGE}"}
    train, _, _ = build(folder, "coco_karpathy_train.json", [record])
    assert train.image_paths(0) == [str(folder / "val2014" / IMAGE)]


def test_records_without_what_is_not_needed(folder):
    train, val, _ = build(folder, "coco_karpathy_train.json", [{"image": IMAGE, "caption": "A"}])
    assert train[0][1] == "a picture of a" and val[0][1] == 42


@pytest.mark.parametrize(
    "records",
    [
        [
            {"image": IMAGE, "caption": "a dog", "image_id": "42", "instance_id": n}
            for n in range(5)
        ],
        [{"image": IMAGE, "image_id": 42}],
        [{"image": IMAGE, "image_id": "coco_42", "caption": None}],
        [EVAL, EVAL],
    ],
    ids=["a record a caption", "an id", "an id as in training", "twice"],
)
def test_evaluation_layouts_of_other_programs(records, folder):
    _, val, _ = build(folder, "coco_karpathy_val.json", records)
    assert len(val) == 1 and val[0][1] == 42


def test_an_image_id_goes_before_the_number_of_the_file_name(folder):
    Image.new("RGB", (8, 8)).save(folder / "kitten.jpg")
    references = {"annotations": [REFERENCE | {"image_id": "7"}]}
    records = [{"image": "kitten.jpg", "image_id": 42}]
    assert build(folder, "coco_karpathy_val.json", records)[1][0][1] == 42
    with pytest.raises(UserError, match="ids: 42.*ids: 7"):
        build(folder, "coco_karpathy_val_gt.json", references)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read(encoding, folder):
    content = [TRAIN | {"caption": "a café"}]
    text = json.dumps(content, ensure_ascii=False)
    train, _, _ = build(folder, "coco_karpathy_train.json", text, encoding)
    assert train[0][1] == "a picture of a café"


def test_one_record_a_line_is_read(folder):
    lines = "\n".join(json.dumps(STATEMENT | {"label": label}) for label in ("true", "false"))
    _, dev, _ = build(folder, "nlvr_dev.json", f"{lines}\n\n")
    assert [dev[0][3].item(), dev[1][3].item()] == [1, 0]


# --- what is told

FAULTS = [
    ("coco_karpathy_train.json", {"caption": None}, "caption is null, .* one text"),
    ("coco_karpathy_train.json", {"caption": ["a", "b"]}, "caption is a list of 2"),
    ("coco_karpathy_train.json", {"caption": " \n"}, r'caption is " \\n"'),
    ("coco_karpathy_train.json", {"caption": "\ud83d"}, r'caption is "\\ud83d"'),
    ("coco_karpathy_train.json", {"image": 5}, "image is 5, .*below the config's image_root"),
    ("coco_karpathy_val.json", {"image": "kitten.jpg"}, "image_id is missing, .*kitten.jpg"),
    ("coco_karpathy_val.json", {"image_id": -5}, "image_id is -5, .*number"),
    ("coco_karpathy_test.json", {"image": ""}, 'image is ""'),
    ("nlvr_train.json", {"images": [IMAGE]}, "images is a list of 1, .*two paths"),
    ("nlvr_dev.json", {"images": [IMAGE, None]}, "images is a list of 2"),
    ("nlvr_dev.json", {"label": "yes"}, 'label is "yes", but must be "True" or "False"'),
    ("nlvr_test.json", {"sentence": 3.5}, "sentence is 3.5"),
]


@pytest.mark.parametrize("name, change, message", FAULTS)
def test_a_wrong_record_is_named(name, change, message, folder):
    records = [*FILES[name], FILES[name][0] | change]
    with pytest.raises(UserError) as error:
        build(folder, name, records)
    number = len(FILES[name])
    start = f"{folder / name}: 1 of {number + 1} records are wrong (the first is record 0). "
    assert str(error.value).startswith(f"{start}record {number}: ")
    with pytest.raises(UserError, match=message):
        build(folder, name, records)


def test_of_many_wrong_records_the_first_are_told(folder):
    wrong = [{"image": IMAGE}, *[None] * 6]
    with pytest.raises(UserError, match="7 of 8 records are wrong") as error:
        build(folder, "coco_karpathy_train.json", [TRAIN, *wrong])
    assert "record 1: caption is missing" in str(error.value)
    assert "record 2: null is no record" in str(error.value)
    assert "record 5" in str(error.value) and "record 6" not in str(error.value)


def test_mistakes_in_several_files_are_told_together(folder):
    names = ["coco_karpathy_train.json", "coco_karpathy_val_gt.json", "coco_karpathy_test.json"]
    for name in names:
        (folder / name).write_text("{")
    try:
        with pytest.raises(UserError) as error:
            load(folder, "coco")
    finally:
        for name in names:
            (folder / name).write_text(json.dumps(FILES[name]))
    told = str(error.value).splitlines()
    assert [line.split(" is not valid JSON")[0] for line in told] == [
        str(folder / name) for name in names
    ]


REFERENCE_FAULTS = [
    ({"annotations": [REFERENCE, REFERENCE | {"caption": None}]}, "record 1: caption is null"),
    ({"annotations": [REFERENCE | {"caption": ""}]}, 'record 0: caption is ""'),
    ({"annotations": [{"image_id": 42, "id": 1}]}, "caption is missing"),
    ({"annotations": [REFERENCE | {"image_id": None}]}, "image_id is null"),
    ({"annotations": [REFERENCE, REFERENCE | {"image_id": 43}]}, "1 of the references .*ids: 43"),
    ({"annotations": [REFERENCE | {"image_id": 43}]}, "1 of the split's images .*ids: 42"),
    ({"annotations": []}, "has no records"),
    ({"images": [{"id": 42}]}, 'has no "annotations"'),
    ([EVAL], 'has no "annotations"'),
]


@pytest.mark.parametrize("content, message", REFERENCE_FAULTS)
def test_wrong_references_are_told_before_they_are_needed(content, message, folder):
    with pytest.raises(UserError, match=f"coco_karpathy_test_gt.json.*{message}"):
        build(folder, "coco_karpathy_test_gt.json", content)


def test_images_without_references_are_told(folder):
    records = [EVAL, *(EVAL | {"image": f"{number}.jpg"} for number in range(90, 97))]
    ids = r"90, 91, 92, 93, 94, [.]{3}\)"
    with pytest.raises(UserError, match=rf"7 of the split's .*{ids}.*0 of the"):
        build(folder, "coco_karpathy_val.json", records)


def test_references_are_read_with_ids_as_texts(folder):
    path = folder / "references.json"
    rows = [
        REFERENCE | {"image_id": i, "caption": c} for i, c in [("42", "a"), (7, "b"), (42, "c")]
    ]
    path.write_text(json.dumps({"annotations": rows}))
    assert read_references(path) == {42: ["a", "c"], 7: ["b"]}


def test_two_images_of_one_id_are_told(folder):
    with pytest.raises(UserError, match=f"images {IMAGE} and b/{IMAGE} both have the id 42"):
        build(folder, "coco_karpathy_val.json", [EVAL, EVAL | {"image": f"b/{IMAGE}"}])


KARPATHY = {"images": [{"filepath": "val2014", "filename": IMAGE, "sentences": [{"raw": "a"}]}]}
COCO = {"images": [{"id": 42, "file_name": IMAGE}], "annotations": [REFERENCE]}
NLVR2 = {"identifier": "dev-850-0-0", "sentence": "a", "label": "True", "left_url": "http://a"}
FOREIGN = [
    ("coco_karpathy_train.json", KARPATHY, "Karpathy split in its original layout"),
    ("coco_karpathy_val.json", KARPATHY["images"], "Karpathy split in its original layout"),
    ("coco_karpathy_train.json", COCO, "COCO's own layout"),
    ("nlvr_dev.json", [NLVR2], "NLVR2 in its original layout"),
]


@pytest.mark.parametrize("name, content, message", FOREIGN)
def test_original_layouts_are_recognised(name, content, message, folder):
    with pytest.raises(UserError, match=f"{name}.* it is .*{message}"):
        build(folder, name, content)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "not valid JSON"),
        ("", "not valid JSON: it is empty"),
        ("version https://git-lfs.github.com/spec/v1", "not valid JSON: .* `git lfs pull`"),
        ("[" * 100_000, "not valid JSON"),
        ('[{"a": 1}]\n[{', "not valid JSON"),
        ("[]", "has no records"),
        ("{}", "has no records"),
        ("5", "has no records"),
    ],
)
def test_a_file_that_holds_no_records_is_told(content, message, folder):
    with pytest.raises(UserError, match=f"nlvr_test.json.* {message}") as error:
        build(folder, "nlvr_test.json", content)
    assert "delete" not in str(error.value)  # it may be the user's own


def test_another_encoding_is_told(folder):
    text = json.dumps([TRAIN | {"caption": "a café"}], ensure_ascii=False)
    with pytest.raises(UserError, match="train.json is not valid JSON.*in UTF-8"):
        build(folder, "coco_karpathy_train.json", text, "latin-1")


# --- anything at all

WORDS = st.sampled_from(
    ["image", "caption", "image_id", "sentence", "label", "images", "annotations", "identifier"]
    + ["sentences", "True", "42", "", IMAGE, "\ud83d", "a\0b", "/", "."]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def contents(draw):
    """A file's name, and a good record of it with some values replaced, or anything."""
    name = draw(st.sampled_from(sorted(FILES)))
    good = FILES[name]
    if draw(st.booleans()):
        return name, draw(VALUES)
    record = (good if isinstance(good, list) else good["annotations"])[0]
    changed = record | draw(st.dictionaries(st.sampled_from(sorted(record)), VALUES, max_size=2))
    rows = draw(st.permutations([record, changed]))
    return name, rows if isinstance(good, list) else {"annotations": rows}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents())
def test_any_json_gives_items_or_a_mistake_of_the_user(folder, case):
    name, content = case
    try:
        build(folder, name, json.dumps(content))
    except UserError as mistake:
        assert str(folder) in str(mistake)
