"""Annotation files of every kind that users have: read, or refused with what is wrong with them."""

import json

import pytest
from PIL import Image

from data.caption_dataset import build_caption_datasets
from data.flickr_dataset import build_flickr_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.records import read_id, read_label
from utils import UserError

IMAGE = "COCO_val2014_000000000042.jpg"
TRAIN = {"image": IMAGE, "caption": "A dog.", "image_id": "coco_42"}
EVAL = {"image": IMAGE, "caption": ["a dog"] * 5}
REFERENCE = {"image_id": "42", "id": 1, "caption": "a dog"}
STATEMENT = {"sentence": "There is a dog.", "label": "True", "images": [IMAGE, IMAGE]}
FILES = dict.fromkeys(["nlvr_train", "nlvr_dev", "nlvr_test"], [STATEMENT])
FILES |= dict.fromkeys(["coco_karpathy_train", "flickr30k_train"], [TRAIN])
FILES |= {f"{data}_{n}": [EVAL] for data in ("coco_karpathy", "flickr30k") for n in ("val", "test")}
TRAINING, VALIDATION, TRUTH = (f"coco_karpathy_{part}" for part in ("train", "val", "val_gt"))
FILES |= {name: {"annotations": [REFERENCE]} for name in (TRUTH, "coco_karpathy_test_gt")}
BUILDERS = {"nlvr": build_nlvr_datasets, "coco": build_caption_datasets}
BUILDERS |= {"flickr30k": build_flickr_datasets}


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
        (folder / f"{other}.json").write_text(json.dumps(good))
    (folder / f"{name}.json").write_bytes(text.encode(encoding))
    config = {
        **dict.fromkeys(("image_root", "ann_root", "coco_gt_root"), str(folder)),
        **{"image_size": 8, "augment": False, "prompt": "a picture of ", "max_words": 8},
    }
    datasets = BUILDERS[name.split("_")[0]](config)
    for dataset in datasets:
        dataset.check()
        dataset[0]
    return datasets


@pytest.mark.parametrize(
    "read, values, expected",
    [
        (read_label, ["True", "true", " TRUE", True, 1, "1"], 1),
        (read_label, ["False", "false", "FALSE\n", False, 0, "0"], 0),
        (read_label, ["yes", "", None, 2, -1, 1.0, ["True"], {"True": 1}], None),
        (read_id, [42, "42", " 42 ", "000042", "coco_42", IMAGE, "v/s_0042.png"], 42),
        (read_id, ["a/v1.2/img-42.JPEG"], 42),
        (read_id, ["kitten.jpg", "", "42 dogs", True, None, 4.2, -1, 10**18, [42], "٤٢"], None),
        (read_id, ["9" * 19, "9" * 5000], None),
    ],
)
def test_labels_and_ids(read, values, expected):
    assert [read(value) for value in values] == [expected] * len(values)


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
    _, dev, _ = build(folder, "nlvr_dev", f"{lines}\n\n")
    assert [dev[0][3].item(), dev[1][3].item()] == [1, 0]


@pytest.mark.parametrize(
    "name, change, message",
    [
        (TRAINING, {"caption": None}, "caption is null, .* one text"),
        (TRAINING, {"caption": "\ud83d"}, r'caption is "\\ud83d"'),
        (TRAINING, {"image": 5}, "image is 5, .*below the config's image_root"),
        (VALIDATION, {"image": "a.jpg"}, "image_id is missing, .*a.jpg"),
        (VALIDATION, {"image_id": -5}, "image_id is -5, .*number"),
        ("nlvr_train", {"images": [IMAGE]}, "images is a list of 1, .*two paths"),
        ("nlvr_dev", {"images": [IMAGE, None]}, "images is a list of 2"),
        ("nlvr_dev", {"label": "yes"}, 'label is "yes", but must be "True" or "False"'),
        ("flickr30k_val", {"caption": "a"}, 'caption is "a", but must be a list'),
        ("flickr30k_test", {"caption": []}, "caption is a list of 0, but must be a list"),
        ("flickr30k_test", {"caption": ["a", " "]}, "caption is a list of 2, but must be"),
        (TRUTH, {"caption": None}, "caption is null"),
        (TRUTH, {"image_id": None}, "image_id is null"),
    ],
)
def test_a_wrong_record_is_named(name, change, message, folder):
    good = REFERENCE if name == TRUTH else FILES[name][0]
    rows = [good, good | change]
    with pytest.raises(UserError, match=rf"{name}.json: 1 of 2 .* record 0\). record 1: {message}"):
        build(folder, name, {"annotations": rows} if name == TRUTH else rows)


def test_of_many_wrong_records_the_first_are_named(folder):
    with pytest.raises(UserError, match="7 of 8 records are wrong") as error:
        build(folder, TRAINING, [TRAIN, {"image": IMAGE}, *[None] * 6])
    assert "record 1: caption is missing" in str(error.value)
    assert "record 2: null is no record" in str(error.value)
    assert "record 5" in str(error.value) and "record 6" not in str(error.value)


def test_mistakes_in_several_files_are_named_together(folder):
    with pytest.raises(UserError) as error:
        build(folder, TRAINING, "{", **{TRUTH: {}, "coco_karpathy_test": []})
    lines = str(error.value).splitlines()
    wrong = (TRAINING, TRUTH, "coco_karpathy_test")
    assert [line.split()[0] for line in lines] == [f"{folder / name}.json" for name in wrong]


OTHER = REFERENCE | {"image_id": 43}
OTHERS = [EVAL, *(EVAL | {"image": f"{number}.jpg"} for number in range(90, 97))]
KARPATHY = {"images": [{"filepath": "val2014", "filename": IMAGE, "sentences": [{"raw": "a"}]}]}
COCO = {"images": [{"id": 42, "file_name": IMAGE}], "annotations": [REFERENCE]}
NLVR2 = {"identifier": "dev-850-0-0", "sentence": "a", "label": "True", "left_url": "http://a"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        (TRUTH, {"annotations": [REFERENCE, OTHER]}, "1 of the references .*ids: 43"),
        (TRUTH, {"annotations": [OTHER]}, "1 of the split's images .*ids: 42"),
        (TRUTH, {"annotations": []}, "has no records"),
        (TRUTH, {"images": [{"id": 42}]}, 'has no "annotations"'),
        (TRUTH, [EVAL], 'has no "annotations"'),
        (VALIDATION, OTHERS, r"7 of the split's .*90, 91, 92, 93, 94, [.]{3}\).*0 of the"),
        (VALIDATION, [EVAL, EVAL | {"image": f"b/{IMAGE}"}], f" b/{IMAGE} both have the id 42"),
        (TRAINING, KARPATHY, "it is .*Karpathy split in its original layout"),
        (VALIDATION, KARPATHY["images"], "it is .*Karpathy split in its original layout"),
        (TRAINING, COCO, "it is .*COCO's own layout"),
        ("nlvr_dev", [NLVR2], "it is .*NLVR2 in its original layout"),
        (TRAINING, "version https://git-lfs.github.com/spec/v1", "not valid JSON: .*git lfs pull"),
        (TRAINING, "[" * 100_000, "not valid JSON"),
        (TRAINING, '[{"a": 1}]\n[{', "not valid JSON"),
        (TRAINING, "{}", "has no records"),
    ],
)
def test_a_file_of_other_content_is_named(name, content, message, folder):
    with pytest.raises(UserError, match=f"{name}.*{message}") as error:
        build(folder, name, content)
    assert "delete" not in str(error.value)  # it may be the user's own
