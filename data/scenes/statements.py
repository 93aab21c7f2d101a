"""Statements about pairs of scenes in NLVR2's sense, each with a true and a false pair."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from data.captions import OTHER_SIDE
from data.scenes.pictures import Scene, SceneObject
from data.scenes.words import NUMBERS, PLURALS, STATEMENTS
from utils import UserError

ATTEMPTS = 1000  # statements in a row without a pair of the other label before giving up
TRIES = 20  # images tried for the pair of the other label before a statement is given up
Description = tuple[str, ...]  # for instance ("red", "circle") or ("red", "shape")


def descriptions(item: SceneObject) -> list[Description]:
    """The ways in which a statement may speak of an object."""
    return [(item.colour, "shape"), (item.colour, item.kind)]


@dataclass(frozen=True)
class Statement:
    """A statement about two images; see `STATEMENTS` for the wording of each family."""

    family: str
    x: Description
    y: Description
    side: str
    number: int

    def text(self) -> str:
        """The statement in words."""
        one = self.number == 1 and self.family == "total"
        return STATEMENTS["total one" if one else self.family].format(
            x=" ".join(self.x) if one else with_article(self.x),
            y=with_article(self.y),
            xs=" ".join([*self.x[:-1], PLURALS[self.x[-1]]]),
            side=self.side,
            other=OTHER_SIDE[self.side],
            number=NUMBERS[self.number],
        )

    def holds(self, left: Counter, right: Counter) -> bool:
        """Whether the statement is true of two images, given as counts of descriptions."""
        this, that = (left, right) if self.side == "left" else (right, left)
        return MEANINGS[self.family](this[self.x], that[self.x], that[self.y], self.number)


# by family, from the counts of x in `side` and in the other image, of y in the other, the number
MEANINGS = {
    "left and right": lambda this, that, y, number: this > 0 and y > 0,
    "one and other": lambda this, that, y, number: this > 0 and y > 0,
    "both": lambda this, that, y, number: this > 0 and that > 0,
    "neither": lambda this, that, y, number: this == that == 0,
    "either": lambda this, that, y, number: this > 0 or that > 0,
    "only": lambda this, that, y, number: this > 0 and that == 0,
    "more": lambda this, that, y, number: this > that,
    "fewer": lambda this, that, y, number: this < that,
    "total": lambda this, that, y, number: this + that == number,
}


def with_article(words: Description) -> str:
    """The description after a or an."""
    return f"{'an' if words[0] == 'orange' else 'a'} {' '.join(words)}"


def random_pairs(
    scenes: list[Scene], count: int, rng: random.Random
) -> list[tuple[Statement, tuple[int, int], bool]]:
    """Makes `count` statements about pairs of scenes, exactly half of them true.

    Every statement comes twice, with a pair of which it is true and one of which it is false, so
    its text says nothing about its label. The two pairs share one image on the same side, so that
    one image does not suffice either.

    Returns:
        (statement, indices of the left and the right scene, truth), in random order.
    """
    counts = [Counter(x for item in scene.objects for x in descriptions(item)) for scene in scenes]
    showing = defaultdict(list)  # scenes by what they show
    for index, shown in enumerate(counts):
        for words in shown:
            showing[words].append(index)
    rows, failed = [], 0
    while len(rows) < count:
        if failed == ATTEMPTS:
            raise UserError(
                f"{len(scenes)} scenes are too few for statements that are true of one pair and "
                "false of another: make more, or no statements"
            )
        pair = tuple(rng.sample(range(len(scenes)), 2))
        items = [item for index in pair for item in scenes[index].objects]
        family = rng.choice(list(MEANINGS))
        x, y = (rng.choice(descriptions(rng.choice(items))) for _ in range(2))
        statement = Statement(family, x, y, rng.choice(list(OTHER_SIDE)), rng.randint(1, 3))
        truth = statement.holds(*(counts[index] for index in pair))
        failed += 1
        for attempt in range(TRIES):  # half of the images show what it speaks of; few others do
            spoken_of = showing[rng.choice([statement.x, statement.y])]
            image = rng.randrange(len(counts)) if attempt % 2 else rng.choice(spoken_of)
            other = list(pair)
            other[rng.randrange(2)] = image
            left, right = other
            if left != right and statement.holds(counts[left], counts[right]) != truth:
                rows += [(statement, pair, truth), (statement, (left, right), not truth)]
                failed = 0
                break
    rng.shuffle(rows)
    return rows
