"""Annotation files of every kind that users have: read, or refused with what is wrong with them."""

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
    "nlvr_dev.json": [STATEMENT],
    "nlvr_test.json": [STATEMENT],
}
TRAINING, VALIDATION, REFERENCES, *_ = FILES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One image, under some names."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2014").mkdir()
    for name in (IMAGE, f"val2014/{IMAGE}", "kitten.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def build(folder, name: str, content, encoding: str = "utf-8", **others):
    """Builds the data sets of good files but for the named ones, and loads an item of each."""
    text = content if isinstance(content, str) else json.dumps(content)
    for other, good in (FILES | others).items():
        (folder / other).write_text(json.dumps(good))
    (folder / name).write_bytes(text.encode(encoding))
    config = {
        **dict.fromkeys(("image_root", "ann_root", "coco_gt_root"), str(folder)),
        **{"image_size": 8, "augment": False, "prompt": "a picture of ", "max_words": 8},
    }
    build_datasets = build_nlvr_datasets if name.startswith("nlvr") else build_caption_datasets
    datasets = build_datasets(config)
    for dataset in datasets:
        dataset.check()
        dataset[0]
    return datasets


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


def test_training_records_need_no_ids_and_may_have_windows_paths(folder):
    record = {"image": f"val2014\\{IMAGE}", "caption": "A"}
    train, *_ = build(folder, TRAINING, [record])
    assert train.image_paths(0) == [str(folder / "val2014" / IMAGE)]
    assert train[0][1] == "a picture of a"


@pytest.mark.parametrize(
    "records",
    [
        [{"image": IMAGE, "caption": "a dog", "image_id": "42", "id": n} for n in range(5)],
        [{"image": "kitten.jpg", "image_id": 42}],  # which goes before a number in the name
        [{"image": IMAGE, "image_id": "coco_42", "caption": None}],
        [EVAL, EVAL],
    ],
    ids=["a record a caption", "an id", "an id as in training", "twice"],
)
def test_evaluation_layouts_of_other_programs(records, folder):
    _, val, _ = build(folder, VALIDATION, records)
    assert len(val) == 1 and val[0][1] == 42


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read(encoding, folder):
    text = json.dumps([TRAIN | {"caption": "a café"}], ensure_ascii=False)
    assert build(folder, TRAINING, text, encoding)[0][0][1] == "a picture of a café"
    with pytest.raises(UserError, match="train.json is not valid JSON.*in UTF-8"):
        build(folder, TRAINING, text, "latin-1")


def test_one_record_a_line_is_read(folder):
    lines = "\n".join(json.dumps(STATEMENT | {"label": label}) for label in ("true", "false"))
    _, dev, _ = build(folder, "nlvr_dev.json", f"{lines}\n\n")
    assert [dev[0][3].item(), dev[1][3].item()] == [1, 0]


def test_references_are_read_with_ids_as_texts(folder):
    captions = {"a": "42", "b": 7, "c": 42}
    rows = [REFERENCE | {"image_id": i, "caption": text} for text, i in captions.items()]
    (folder / "references.json").write_text(json.dumps({"annotations": rows}))
    assert read_references(folder / "references.json") == {42: ["a", "c"], 7: ["b"]}


# --- what is refused


@pytest.mark.parametrize(
    "name, change, message",
    [
        (TRAINING, {"caption": None}, "caption is null, .* one text"),
        (TRAINING, {"caption": ["a", "b"]}, "caption is a list of 2"),
        (TRAINING, {"caption": " \n"}, r'caption is " \\n"'),
        (TRAINING, {"caption": "\ud83d"}, r'caption is "\\ud83d"'),
        (TRAINING, {"image": 5}, "image is 5, .*below the config's image_root"),
        (VALIDATION, {"image": "a.jpg"}, "image_id is missing, .*a.jpg"),
        (VALIDATION, {"image_id": -5}, "image_id is -5, .*number"),
        ("coco_karpathy_test.json", {"image": ""}, 'image is ""'),
        ("nlvr_train.json", {"images": [IMAGE]}, "images is a list of 1, .*two paths"),
        ("nlvr_dev.json", {"images": [IMAGE, None]}, "images is a list of 2"),
        ("nlvr_dev.json", {"label": "yes"}, 'label is "yes", but must be "True" or "False"'),
        ("nlvr_test.json", {"sentence": 3.5}, "sentence is 3.5"),
        (REFERENCES, {"caption": None}, "caption is null"),
        (REFERENCES, {"caption": ""}, 'caption is ""'),
        (REFERENCES, {"image_id": None}, "image_id is null"),
    ],
)
def test_a_wrong_record_is_named(name, change, message, folder):
    good = EVAL if name == VALIDATION else REFERENCE if name == REFERENCES else FILES[name][0]
    rows = [good, good | change]
    first = rf"{folder / name}: 1 of 2 records are wrong \(the first is record 0\)\. record 1: "
    with pytest.raises(UserError, match=f"^{first}{message}"):
        build(folder, name, {"annotations": rows} if name == REFERENCES else rows)


def test_of_many_wrong_records_the_first_are_named(folder):
    with pytest.raises(UserError, match="7 of 8 records are wrong") as error:
        build(folder, TRAINING, [TRAIN, {"image": IMAGE}, *[None] * 6])
    assert "record 1: caption is missing" in str(error.value)
    assert "record 2: null is no record" in str(error.value)
    assert "record 5" in str(error.value) and "record 6" not in str(error.value)


def test_mistakes_in_several_files_are_named_together(folder):
    with pytest.raises(UserError) as error:
        build(folder, TRAINING, "{", **{REFERENCES: {}, "coco_karpathy_test.json": []})
    lines = str(error.value).splitlines()
    wrong = (TRAINING, REFERENCES, "coco_karpathy_test.json")
    assert [line.split()[0] for line in lines] == [str(folder / name) for name in wrong]


OTHERS = [EVAL, *(EVAL | {"image": f"{number}.jpg"} for number in range(90, 97))]
KARPATHY = {"images": [{"filepath": "val2014", "filename": IMAGE, "sentences": [{"raw": "a"}]}]}
COCO = {"images": [{"id": 42, "file_name": IMAGE}], "annotations": [REFERENCE]}
NLVR2 = {"identifier": "dev-850-0-0", "sentence": "a", "label": "True", "left_url": "http://a"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            REFERENCES,
            {"annotations": [REFERENCE, REFERENCE | {"image_id": 43}]},
            "1 of the refer.*43",
        ),
        (REFERENCES, {"annotations": [REFERENCE | {"image_id": 43}]}, "1 of the split's .*ids: 42"),
        (REFERENCES, {"annotations": []}, "has no records"),
        (REFERENCES, {"images": [{"id": 42}]}, 'has no "annotations"'),
        (REFERENCES, [EVAL], 'has no "annotations"'),
        (VALIDATION, OTHERS, r"7 of the split's .*90, 91, 92, 93, 94, [.]{3}\).*0 of the"),
        (VALIDATION, [EVAL, EVAL | {"image": f"b/{IMAGE}"}], f" b/{IMAGE} both have the id 42"),
        (TRAINING, KARPATHY, "it is .*Karpathy split in its original layout"),
        (VALIDATION, KARPATHY["images"], "it is .*Karpathy split in its original layout"),
        (TRAINING, COCO, "it is .*COCO's own layout"),
        ("nlvr_dev.json", [NLVR2], "it is .*NLVR2 in its original layout"),
        (TRAINING, "", "not valid JSON: it is empty"),
        (
            TRAINING,
            "version https://git-lfs.github.com/spec/v1",
            "not valid JSON: .*`git lfs pull`",
        ),
        (TRAINING, "[" * 100_000, "not valid JSON"),
        (TRAINING, '[{"a": 1}]\n[{', "not valid JSON"),
        (TRAINING, "{}", "has no records"),
        (TRAINING, "5", "has no records"),
    ],
)
def test_a_file_of_other_content_is_named(name, content, message, folder):
    with pytest.raises(UserError, match=f"{name}.*{message}") as error:
        build(folder, name, content)
    assert "delete" not in str(error.value)  # it may be the user's own


# --- anything at all

WORDS = "image caption image_id sentence label images annotations identifier sentences True 42 / ."
WORDS = st.sampled_from([*WORDS.split(), "", IMAGE, "\ud83d", "a\0b"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4)
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_json_gives_items_or_a_mistake_of_the_user(folder, name, data):
    """A good record with some other values, or anything."""
    good = FILES[name]
    record = (good if isinstance(good, list) else good["annotations"])[0]
    changes = st.dictionaries(st.sampled_from(sorted(record)), VALUES, max_size=2)
    rows = changes.map(lambda change: [record, record | change])
    rows = rows if isinstance(good, list) else rows.map(lambda rows: {"annotations": rows})
    try:
        build(folder, name, json.dumps(data.draw(rows | VALUES)))
    except UserError as mistake:
        assert str(folder) in str(mistake)
