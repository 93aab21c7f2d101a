"""The language of the embedded scenes: captions, their meaning, and the words of the vocabulary."""

import random
import re

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
KINDS = ("circle", "square", "triangle", "cross", "star", "ring")
BACKGROUNDS = ("black", "gray", "white", "brown")  # shared with no object, so a colour is clear

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PHRASES = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# {a} is one object, {b} the others, {rel} how {a} lies to {b}, {inv} how {b} lies to {a}
RELATED = (
    "{a} {rel} {b}",
    "there is {a} {rel} {b}",
    "the picture shows {a} {rel} {b}",
    "{a} sitting {rel} {b}",
    "{a} placed {rel} {b} on a {ground} background",
    "on a {ground} background {a} {rel} {b}",
    "{number} shapes with {a} {rel} {b}",
    "{b} {inv} {a}",
    "there is {b} {inv} {a}",
    "{number} shapes on a {ground} background with {b} {inv} {a}",
)
SINGLE = (
    "{a} on a {ground} background",
    "there is {a} on a {ground} background",
    "the picture shows {a} on a {ground} background",
    "{a} in front of a {ground} background",
    "one shape which is {a} on a {ground} background",
    "{a} alone on a {ground} background",
    "a {ground} background with {a}",
    "on a {ground} background there is {a}",
)
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

# {x} and {y} are descriptions with an article, {xs} a plural
STATEMENTS = {
    "left and right": "the {side} image contains {x} and the {other} image contains {y}",
    "one and other": "the {side} image contains {x} and the other image contains {y}",
    "both": "both images contain {x}",
    "neither": "neither image contains {x}",
    "either": "at least one image contains {x}",
    "only": "only the {side} image contains {x}",
    "more": "the {side} image contains more {xs} than the {other} image",
    "fewer": "the {side} image contains fewer {xs} than the {other} image",
    "total": "there are exactly {number} {xs} in the two images",
    "total one": "there is exactly one {x} in the two images",
}
PLURALS = {"cross": "crosses"} | {noun: noun + "s" for noun in ("shape", *KINDS) if noun != "cross"}

Attributes = tuple[str, str, str]  # size, colour, kind

MENTION = re.compile(  # size, colour and kind; what is not mentioned is ""
    rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(KINDS)})\b"
)


def describe(
    objects: list[Attributes], side: str | None, background: str, count: int, rng: random.Random
) -> list[str]:
    """Captions of different templates; the first object lies on that `side` of all others."""
    first, *rest = [f"a {' '.join(words)}" for words in objects]
    words = {"a": first, "b": " and ".join(rest), "ground": background}
    if side is None:
        return [template.format(**words) for template in rng.sample(SINGLE, count)]
    return [
        template.format(
            **words,
            rel=rng.choice(PHRASES[side]),
            inv=rng.choice(PHRASES[OPPOSITE[side]]),
            number=NUMBERS[len(objects)],
        )
        for template in rng.sample(RELATED, count)
    ]


def vocabulary() -> list[str]:
    """The WordPiece vocabulary in the order of token ids, which are part of trained models."""
    templates = (*RELATED, *SINGLE, *STATEMENTS.values())
    text = " ".join([re.sub(r"{\w+}", "", template) for template in templates])
    words = {*text.split(), *SIZES, *COLOURS, *KINDS, *BACKGROUNDS, *NUMBERS.values()}
    words |= {word for phrases in PHRASES.values() for phrase in phrases for word in phrase.split()}
    words |= {*PLURALS.values(), "shape", "an", "a", "picture", "of"}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
