"""Annotation files: what their records must hold, read and checked before a run begins.

What can mean one thing only is read: ids as texts, labels in any case, one record a line.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from utils import UserError, mistaken_for

SHOWN = 5  # records, images or ids in a message, at most
LABELS = {"false": 0, "true": 1, "0": 0, "1": 1}
HALF = re.compile(r"[\ud800-\udfff]")  # of a surrogate pair: valid JSON, but no character
NUMBER_AT_END = re.compile(r"(?<!\d)0*(\d{1,18})(?:\.[a-z]\w*)?\s*$", re.ASCII | re.IGNORECASE)


# --- values: from what is written to what is used, or None where it is not allowed


def read_text(value: Any, blank: bool = False) -> str | None:
    """A text of whole characters, which is not blank unless it may be."""
    if not isinstance(value, str) or HALF.search(value):
        return None
    return value if blank or value.strip() else None


def read_texts(value: Any) -> list[str] | None:
    """One or several texts that are not blank."""
    return value if isinstance(value, list) and value and all(map(read_text, value)) else None


def read_name(value: Any) -> str | None:
    """A text that is not blank, or a whole number."""
    return str(value) if type(value) is int else read_text(value)


def read_image(value: Any) -> str | None:
    """The path of an image, also as Windows writes it; records of one image share the string."""
    text = read_text(value)
    return text and sys.intern(text.replace("\\", "/"))


def read_pair(value: Any) -> list[str] | None:
    """The paths of two images."""
    pair = [read_image(name) for name in value] if isinstance(value, list) else []
    return pair if len(pair) == 2 and all(pair) else None


def read_label(value: Any) -> int | None:
    """1 if a statement is true, 0 if it is false."""
    return LABELS.get(str(value).strip().lower()) if isinstance(value, str | int) else None


def read_id(value: Any) -> int | None:
    """A number, or the one at the end of a text: 42 of "42", "coco_42", "COCO_000042.jpg"."""
    if isinstance(value, str):
        number = NUMBER_AT_END.search(value)
        return number and int(number[1])
    return value if type(value) is int and 0 <= value < 10**18 else None


# --- layouts: the values that are used of a record, by key


class Field(NamedTuple):
    """One value of a record."""

    read: Callable[[Any], Any]  # from the value as written to the value to use, or None
    must_be: str  # what is allowed
    example: Any  # a value as written
    instead: str | None = None  # key whose value is read where the record lacks this one


Layout = dict[str, Field]
BELOW = "below the config's image_root"
NUMBER = "a number below 10^18, or"
_IMAGE = Field(read_image, f"the path of an image {BELOW}", "val2014/COCO_val2014_000000000042.jpg")
_ANY_TEXT = Field(partial(read_text, blank=True), "one text", "a dog on a bed")
_TEXT = Field(read_text, "one text that is not blank", "a dog on a bed")
_ID = Field(read_id, f"{NUMBER} a text that ends in one", 42)
_IMAGE_ID = Field(read_id, f"{NUMBER} end the image's file name", 42, "image")
_NAME = Field(read_name, "a text that is not blank, or a whole number", "1000092795", "image")
_TEXTS = Field(read_texts, "a list of texts that are not blank", ["a man in a hat", "..."])
_LABEL = Field(read_label, '"True" or "False"', "True")
_PAIR = Field(read_pair, f"a list of two paths {BELOW}", ["dev/0-img0.png", "dev/0-img1.png"])

CAPTION_TRAINING: Layout = {"image": _IMAGE, "caption": _TEXT}
CAPTION_EVALUATION: Layout = {"image": _IMAGE, "image_id": _IMAGE_ID}
REFERENCES: Layout = {"image_id": _ID, "caption": _TEXT}
RESULTS: Layout = {"image_id": _ID, "caption": _ANY_TEXT}
RETRIEVAL_TRAINING: Layout = {"image": _IMAGE, "caption": _TEXT, "image_id": _NAME}
RETRIEVAL_EVALUATION: Layout = {"image": _IMAGE, "caption": _TEXTS}
STATEMENTS: Layout = {"sentence": _TEXT, "label": _LABEL, "images": _PAIR}

FOREIGN = {  # layouts that others publish the same data in, by a key that they alone have
    "sentences": "; it is the Karpathy split in its original layout (dataset_coco.json)",
    "annotations": "; it is in COCO's own layout",
    "identifier": "; it is NLVR2 in its original layout",
}


def _example(layout: Layout) -> str:
    return json.dumps({key: field.example for key, field in layout.items()})


def _foreign(content: Any) -> str:
    """The published layout that wrong content is in, as a clause; or ""."""
    rows = content.get("images") if isinstance(content, dict) else content
    first = rows[0] if isinstance(rows, list) and rows else None
    keys = {key for part in (content, first) if isinstance(part, dict) for key in part}
    return next((clause for key, clause in FOREIGN.items() if key in keys), "")


# --- files


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, or the list of its lines' contents where each line is JSON.

    UTF-8, with or without a byte order mark, UTF-16 and UTF-32 are read.
    """
    try:
        raw = Path(path).read_bytes()
        try:
            return json.loads(raw)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            return [json.loads(line) for line in raw.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        why = mistaken_for(path) or f"{error}; write it anew, in UTF-8"
        raise UserError(f"{path} is not valid JSON: {why}") from error


def read_records(path: str | Path, layout: Layout, content: Any = None) -> list[dict]:
    """Reads a list of records: dictionaries of the layout's fields, with the values to use.

    `content` is that of the file, if it has been read, and changes in place.
    """
    content = read_json(path) if content is None else content
    foreign = _foreign(content)
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{path} has no records{foreign}; it must hold a list of records {_example(layout)}"
        )
    faults = []
    for number, record in enumerate(content):
        content[number] = values = {}
        if fault := _read_fields(record, layout, values):
            faults.append(f"record {number}: {fault}")
    if faults:
        shown = "; ".join(faults[:SHOWN]) + "; ..." * (len(faults) > SHOWN)
        raise UserError(
            f"{path}: {len(faults)} of {len(content)} records are wrong (the first is record 0)"
            f"{foreign}. {shown}. Mend or remove them; a record is like {_example(layout)}"
        )
    return content


def _read_fields(record: Any, layout: Layout, values: dict) -> str:
    """Fills `values` from a record; returns what is wrong with it, or an empty string."""
    if not isinstance(record, dict):
        return f"{_short(record)} is no record"
    for key, field in layout.items():
        written = record.get(key, record.get(field.instead))
        values[key] = value = field.read(written)
        if value is None:
            found = f"is {_short(record[key])}" if key in record else "is missing"
            of_image = f" (image {_short(record['image'])})" if "image" in record else ""
            return f"{key} {found}, but must be {field.must_be}{of_image}"
    return ""


def _short(value: Any) -> str:
    """A value as JSON, cut after 60 characters."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_references(path: str | Path) -> dict[int, list[str]]:
    """Image id to captions, of `{"annotations": [{"image_id", "caption"}, ...]}` as COCO has it."""
    content = read_json(path)
    if not isinstance(content, dict) or "annotations" not in content:
        raise UserError(
            f'{path} has no "annotations"; references are written '
            f'{{"annotations": [{_example(REFERENCES)}, ...]}}'
        )
    references: dict[int, list[str]] = {}
    for record in read_records(path, REFERENCES, content["annotations"]):
        references.setdefault(record["image_id"], []).append(record["caption"])
    return references


def read_all(*readers: Callable[[], Any]) -> list:
    """Calls each reader, and raises the mistakes of all in one."""
    results, mistakes = [], []
    for reader in readers:
        try:
            results.append(reader())
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return results


def listed(items: list) -> str:
    """The first of some items, for a message."""
    return ", ".join(map(str, items[:SHOWN])) + (", ..." if len(items) > SHOWN else "")
