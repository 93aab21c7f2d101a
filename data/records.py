"""What the records of each annotation file must hold, and files of such records, read and checked.

Everything is checked when a file is read, so that a wrong record is told at the start of a run and
not when its turn comes. What can be meant in one way only is read: ids as texts, labels in any
case, one record a line.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError, mistaken_for

SHOWN = 5  # records, images or ids in a message, at most
LABELS = {"false": 0, "true": 1, "0": 0, "1": 1}
NUMBER_AT_END = re.compile(r"(?<!\d)0*(\d{1,18})(?:\.[a-z]\w*)?\s*$", re.ASCII | re.IGNORECASE)


# --- values: from what is written to what is used, or None where it is not allowed ----------------


def read_string(value: Any) -> str | None:
    """Any text that can be encoded, the empty one included."""
    if not isinstance(value, str):
        return None
    if not value.isascii():
        try:
            value.encode()  # half of a surrogate pair is valid JSON, but no character
        except UnicodeEncodeError:
            return None
    return value


def read_text(value: Any) -> str | None:
    """A text that is not blank."""
    return read_string(value) if isinstance(value, str) and value.strip() else None


def read_texts(value: Any) -> list[str] | None:
    """One or several texts that are not blank."""
    texts = [read_text(text) for text in value] if isinstance(value, list) else [None]
    return texts if texts and all(texts) else None


def read_name(value: Any) -> str | None:
    """What tells records apart: a text that is not blank, or a whole number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole else read_text(value)


def read_image(value: Any) -> str | None:
    """The path of an image, also as Windows writes it; records of one image share the string."""
    text = read_text(value)
    return text and sys.intern(text.replace("\\", "/"))


def read_pair(value: Any) -> list[str] | None:
    """The paths of two images."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    pair = list(map(read_image, value))
    return pair if all(pair) else None


def read_label(value: Any) -> int | None:
    """1 if a statement is true, 0 if it is false."""
    return LABELS.get(str(value).strip().lower()) if isinstance(value, str | int) else None


def read_id(value: Any) -> int | None:
    """A number, or the one at the end of a text: 42 of "42", "coco_42", "COCO_000042.jpg"."""
    if isinstance(value, str):
        number = NUMBER_AT_END.search(value)
        return number and int(number[1])
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 10**18 else None


# --- layouts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One value of a record.

    Attributes:
        read: From the value as written to the value to use; None where it is not allowed.
        must_be: What is allowed, for the user.
        instead: The key whose value is read where the record lacks this one.
    """

    read: Callable[[Any], Any]
    must_be: str
    instead: str | None = None


@dataclass(frozen=True)
class Layout:
    """The values that are used of a record, and a record that has them."""

    fields: dict[str, Field]
    example: str


_IMAGE = Field(read_image, "the path of an image below the config's image_root")
_TEXT = Field(read_text, "one text that is not blank")
_ID = Field(read_id, "a number below 10^18, or a text that ends in one")
_EVALUATION_ID = Field(read_id, "a number below 10^18, or end the image's file name", "image")

CAPTION_TRAINING = Layout(
    {"image": _IMAGE, "caption": _TEXT},
    '{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "a dog on a bed"}',
)
CAPTION_EVALUATION = Layout(
    {"image": _IMAGE, "image_id": _EVALUATION_ID},
    '{"image": "val2014/COCO_val2014_000000000042.jpg", "image_id": 42}',
)
REFERENCES = Layout(
    {"image_id": _ID, "caption": _TEXT},
    '{"image_id": 42, "caption": "a dog on a bed"}',
)
RESULTS = Layout(
    {"image_id": _ID, "caption": Field(read_string, "one text")},
    '{"image_id": 42, "caption": "a dog on a bed"}',
)
RETRIEVAL_TRAINING = Layout(
    {
        "image": _IMAGE,
        "caption": _TEXT,
        "image_id": Field(read_name, "a text that is not blank, or a whole number", "image"),
    },
    '{"image": "flickr30k-images/1000092795.jpg", "caption": "two men in a garden", '
    '"image_id": "1000092795"}',
)
RETRIEVAL_EVALUATION = Layout(
    {"image": _IMAGE, "caption": Field(read_texts, "a list of texts that are not blank")},
    '{"image": "flickr30k-images/1007129816.jpg", "caption": ["a man in a hat", "..."]}',
)
STATEMENTS = Layout(
    {
        "sentence": _TEXT,
        "label": Field(read_label, '"True" or "False"'),
        "images": Field(read_pair, "a list of two paths below the config's image_root"),
    },
    '{"sentence": "there is a dog", "label": "True", '
    '"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"]}',
)


# --- files ---------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, or the list of its lines' contents where each line is JSON.

    Args:
        path: UTF-8, with or without a byte order mark, or UTF-16 or UTF-32.

    Raises:
        UserError: The file cannot be read.
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


def read_records(path: str | Path, layout: Layout) -> list[dict]:
    """Reads a file that is a list of records.

    Returns:
        Dictionaries of the layout's fields, with the values to use.

    Raises:
        UserError: The file cannot be read, or not all its records are of the layout.
    """
    return check_records(path, read_json(path), layout)


def check_records(path: str | Path, content: Any, layout: Layout) -> list[dict]:
    """The records of `content`, which is changed in place; see `read_records`.

    Args:
        path: Where the content was read, for messages.
        content: What should be a list of records.
        layout: What they should hold.

    Raises:
        UserError: Not all records are of the layout; tells the first of them.
    """
    if foreign := foreign_layout(content):
        what, where = foreign
        raise UserError(f"{path} is {what}. Write records like {layout.example}, {where}")
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} has no records; it must hold a list of records {layout.example}")
    faults = []
    for number, record in enumerate(content):
        content[number] = values = {}
        fault = _read_fields(record, layout, values)
        if fault:
            faults.append(f"record {number}: {fault}")
    if faults:
        told = "; ".join(faults[:SHOWN]) + ("; ..." if len(faults) > SHOWN else "")
        raise UserError(
            f"{path}: {len(faults)} of {len(content)} records are wrong (the first is record 0). "
            f"{told}. Mend or remove them; a record is like {layout.example}"
        )
    return content


def _read_fields(record: Any, layout: Layout, values: dict) -> str:
    """Fills `values` from a record; returns what is wrong with it, or an empty string."""
    if not isinstance(record, dict):
        return f"{_short(record)} is no record"
    for key, field in layout.fields.items():
        written = record.get(key, record.get(field.instead))
        values[key] = value = field.read(written)
        if value is None:
            found = f"is {_short(record[key])}" if key in record else "is missing"
            of_image = f" (image {_short(record['image'])})" if "image" in record else ""
            return f"{key} {found}, but must be {field.must_be}{of_image}"
    return ""


def _short(value: Any) -> str:
    """A value as a user knows it: as JSON, cut after 60 characters."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def foreign_layout(content: Any) -> tuple[str, str] | None:
    """What a file of another well-known layout is, and where our values are in it."""
    rows = content.get("images") if isinstance(content, dict) else content
    first = rows[0] if isinstance(rows, list) and rows else None
    first = first if isinstance(first, dict) else {}
    if "sentences" in first and "image" not in first:
        return (
            "the Karpathy split in its original layout (dataset_coco.json)",
            "from each image whose split is the wanted one (restval belongs to train) and, where a "
            "caption is needed, from each of its sentences; image is filepath/filename, image_id "
            "is cocoid, caption is raw",
        )
    if isinstance(content, dict) and "annotations" in content:
        return (
            "in COCO's own layout",
            "from each of its annotations; image is the file_name of that image_id in its images",
        )
    if "identifier" in first and "images" not in first:
        return (
            "NLVR2 in its original layout, which names no image files",
            "from each record; images are the identifier without its last number, followed by "
            "-img0.png and -img1.png, in the folder where they are",
        )
    return None


def read_references(path: str | Path) -> dict[int, list[str]]:
    """Reads references in COCO's format: `{"annotations": [{"image_id", "caption"}, ...]}`.

    Returns:
        Image id to its captions, in the order of the file.

    Raises:
        UserError: The file cannot be read, or not all its annotations can be used.
    """
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        content = content["annotations"]
    elif not foreign_layout(content):
        raise UserError(
            f'{path} has no "annotations"; references are written '
            f'{{"annotations": [{REFERENCES.example}, ...]}}'
        )
    references: dict[int, list[str]] = {}
    for record in check_records(path, content, REFERENCES):
        references.setdefault(record["image_id"], []).append(record["caption"])
    return references


def read_all(*readers: Callable[[], Any]) -> list:
    """Calls each reader; the mistakes that they find are told together.

    Raises:
        UserError: Some found one.
    """
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
