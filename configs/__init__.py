"""The experiments: YAML files, published ID profiles, and the reader that checks a config."""

import argparse
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from utils import UserError

ROOT = Path(__file__).parents[1]  # the project
REQUIRED = object()


@dataclass(frozen=True)
class Number:
    """A number in a range, ends included: argparse's `type`, and a config's rule."""

    kind: type
    least: float = -math.inf
    most: float = math.inf

    def __call__(self, text: str) -> int | float:
        """The value of a flag."""
        try:
            return self.check(self.kind(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {self}, got {text!r}") from None

    def check(self, value) -> int | float:
        """The value of a config, whole numbers as floats; a ValueError says what it must be."""
        kinds = int if self.kind is int else int | float
        if isinstance(value, kinds) and not isinstance(value, bool):
            if self.least <= value <= self.most and abs(value) < math.inf:
                return self.kind(value)
        raise ValueError(f"must be {self}")

    def __str__(self) -> str:
        """The range in words."""
        what = "a whole number" if self.kind is int else "a number"
        if self.most < math.inf:
            return f"{what} from {self.least} to {self.most}"
        return f"{what} of at least {self.least}"


def text(value, words: tuple[str, ...] = ()) -> str:
    """A string, or one of a few words."""
    if isinstance(value, str) and (not words or value in words):
        return value
    raise ValueError(f"must be one of {', '.join(words)}" if words else "must be text")


def place(value) -> str:
    """A path or address, in which `~` and environment variables are replaced as in a shell."""
    return os.path.expandvars(os.path.expanduser(text(value)))


def switch(value) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def sizes(value, words: tuple[str, ...] = ()) -> str | dict:
    """A model's sizes: a name, a path, or a mapping, which the model's builder checks."""
    if isinstance(value, dict):
        return dict(value)
    try:
        return text(value, words)
    except ValueError as error:
        raise ValueError(f"{error}, or a mapping of sizes") from None


MANY = 10**9
COUNT, FROM_ZERO = Number(int, 1, MANY), Number(int, 0, MANY)
PIXELS, WORKERS = Number(int, 1, 4096), Number(int, 0, 1024)
RATE = Number(float, 0, 10)

# key -> (rule, default): a Number, or a function whose ValueError says what the value must be
_BLIP_KEYS = {
    "vit": (partial(sizes, words=("tiny", "base", "large")), REQUIRED),
    "vit_grad_ckpt": (switch, False),
    "vit_ckpt_layer": (FROM_ZERO, 0),
    "med_config": (sizes, "configs/med_config.json"),
    "tokenizer": (place, "bert-base-uncased"),
}
_RUN_KEYS = {
    "pretrained": (place, ""),
    "image_size": (PIXELS, REQUIRED),
    "image_root": (place, REQUIRED),
    "ann_root": (place, REQUIRED),
    "id_profile": (place, ""),
    "init_lr": (RATE, REQUIRED),
    "min_lr": (RATE, 0.0),
    "weight_decay": (RATE, 0.0),
    "max_epoch": (COUNT, REQUIRED),
    "batch_size": (COUNT, REQUIRED),
    "eval_batch_size": (COUNT, None),  # as batch_size
    "augment": (switch, True),
    "num_workers": (WORKERS, 4),
}
SCHEMAS = {
    "caption": {
        **_RUN_KEYS,
        **_BLIP_KEYS,
        "coco_gt_root": (place, REQUIRED),
        "prompt": (text, "a picture of "),
        "max_words": (COUNT, 30),
        "max_tokens": (Number(int, 2), 40),
        "max_length": (COUNT, 20),
        "min_length": (COUNT, 5),
        "num_beams": (COUNT, 3),
        "length_normalization": (partial(text, words=("total", "generated")), "total"),
    },
    "nlvr": {**_RUN_KEYS, **_BLIP_KEYS, "max_words": (COUNT, 40)},
    "retrieval": {
        **_RUN_KEYS,
        "clip": (partial(sizes, words=("large",)), REQUIRED),
        "tokenizer": (place, "clip"),
        "queue_size": (COUNT, 57600),
        "momentum": (Number(float, 0, 1), 0.995),
        "alpha": (Number(float, 0, 1), 0.4),
        "max_words": (COUNT, 30),
    },
}
# the originals' names of the two batch sizes
ALIASES = {"batch_size_train": "batch_size", "batch_size_test": "eval_batch_size"}


def load_config(path: str, overrides: dict | None = None, task: str | None = None) -> dict:
    """Reads an experiment from YAML 1.2 and checks keys, values and how they fit together.

    Relative paths are sought beside the file, beside its folder, here, and in the project.

    Args:
        path: the file.
        overrides: values that replace the file's; None values are passed over.
        task: a key of SCHEMAS; None takes the task whose keys the file has.

    Returns:
        Every key of the task, defaults filled in, plus "task".
    """
    raw = _read(path)
    if task is None:
        task = min(SCHEMAS, key=lambda name: sum(map(len, _problems(raw, SCHEMAS[name]))))
    overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
    raw |= overrides
    schema = SCHEMAS[task]
    unknown, missing = _problems(raw, schema)
    if unknown:
        raise UserError(f"{path}: unknown keys {unknown}; a {task} config has {sorted(schema)}")
    if missing:
        raise UserError(f"{path}: missing keys {missing} of a {task} config")
    config = {"task": task}
    for key, (rule, default) in schema.items():
        try:
            config[key] = getattr(rule, "check", rule)(raw[key]) if key in raw else default
        except ValueError as error:
            raise UserError(f"{path}: {key} is {raw[key]!r}, but {error}") from None
        if key not in overrides and (key == "med_config" or rule is place and key in raw):
            config[key] = _sought(config[key], Path(path).parent)
    config["eval_batch_size"] = config["eval_batch_size"] or config["batch_size"]
    if "med_config" in schema:
        _check_lengths(path, config)
    return config


def _read(path: str) -> dict:
    """The file's mapping, aliases replaced."""
    try:
        raw = YAML(typ="safe", pure=True).load(Path(path).read_bytes())  # UTF-8 or UTF-16
    except DuplicateKeyError as error:  # its own words go on about how to silence it
        sentence = f"cannot read the config {path}: {error.problem}{error.problem_mark}"
        raise UserError(sentence) from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"the config {path} must be a mapping of keys to values")
    for alias, key in ALIASES.items():
        if alias in raw and key in raw:
            raise UserError(f"{path}: {alias} and {key} mean the same: keep one of them")
    return {ALIASES.get(key, key): value for key, value in raw.items()}


def _sought(value, folder: Path):
    """Where a path of a config in `folder` leads; sizes and names of tokenizers as they are."""
    if not isinstance(value, str) or value in ("", "clip", "bert-base-uncased"):
        return value
    places = (folder / value, folder.parent / value, value, ROOT / value)
    return next((str(place) for place in places if os.path.exists(place)), value)


def _problems(raw: dict, schema: dict) -> tuple[list[str], list[str]]:
    """Unknown and missing keys."""
    required = {key for key, (_, default) in schema.items() if default is REQUIRED}
    return sorted(str(key) for key in raw if key not in schema), sorted(required - raw.keys())


def _check_lengths(path: str, config: dict) -> None:
    """Checks how lengths and beams fit the text transformer and each other."""
    med_config = read_med_config(config["med_config"])
    positions = med_config.get("max_position_embeddings", 512)
    vocabulary = med_config.get("vocab_size", 30524)
    for key, factor, of, most in [
        ("max_length", 1, "max_position_embeddings", positions),
        ("max_tokens", 1, "max_position_embeddings", positions),
        ("num_beams", 2, "vocab_size", vocabulary),  # a step looks at twice as many words
    ]:
        if isinstance(most, int) and factor * config.get(key, 0) > most:
            raise UserError(f"{path}: {key} is {config[key]}, but med_config has {of} {most}")
    least, most = config.get("min_length", 0), config.get("max_length", math.inf)
    if least > most:
        raise UserError(f"{path}: min_length {least} is above max_length {most}")


def read_med_config(med_config: str | dict) -> dict:
    """The text transformer's sizes, from a mapping or the path of a JSON file."""
    if isinstance(med_config, dict):
        return med_config
    try:
        fields = json.loads(Path(med_config).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"med_config: cannot read {med_config}: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"med_config: {med_config} must hold a mapping of BERT's fields")
    return fields
