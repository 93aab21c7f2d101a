"""Draws the embedded scenes: coloured shapes on a textured background."""

import math
import random
from dataclasses import dataclass
from itertools import combinations, product
from operator import attrgetter

import numpy as np
from PIL import Image, ImageDraw

from data.scenes.words import BACKGROUNDS, COLOURS, KINDS, OPPOSITE, SIZES, Attributes

SIDE = 64  # pixels
OVERSAMPLING = 4  # drawn at this multiple and averaged down, which smooths the edges
NOISE = 6  # largest change of a pixel by the texture, of 255
RADII = {"small": (5.5, 6.5), "large": (10.0, 12.0)}  # pixels
OBJECT_WEIGHTS = {1: 0.3, 2: 0.4, 3: 0.3}
CLEARANCE = 2  # pixels at least between the boxes of two objects
MARGIN = 4  # pixels by which an object is clear of the others on the side that captions name
LEAD = 3  # pixels by which that margin exceeds every other one, so that the side is unmistakable

PAINT = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 214, 40),
    "orange": (244, 132, 24),
    "purple": (128, 44, 172),
    "cyan": (40, 206, 214),
    "pink": (248, 136, 190),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "white": (238, 238, 238),
    "brown": (96, 62, 38),
}


@dataclass(frozen=True)
class SceneObject:
    """A shape inscribed in the square of half side `radius` around (x, y), in pixels; y is down."""

    size: str
    colour: str
    kind: str
    x: float
    y: float
    radius: float

    @property
    def attributes(self) -> Attributes:
        """Size, colour and kind."""
        return self.size, self.colour, self.kind


@dataclass(frozen=True)
class Scene:
    """One to three objects, no two alike, on a background.

    The first object is the one that captions start from: it lies on that `side` of all others,
    which follow from left to right, or from top to bottom where that spreads them more. A single
    object has no side.
    """

    background: str
    objects: list[SceneObject]
    side: str | None


def gap(a: SceneObject, b: SceneObject, side: str) -> float:
    """Pixels between the boxes of two objects when `a` is on that side of `b`; else negative."""
    if side in ("right", "below"):
        return gap(b, a, OPPOSITE[side])
    distance = b.x - a.x if side == "left" else b.y - a.y
    return distance - a.radius - b.radius


def margins(objects: list[SceneObject]) -> dict[tuple[int, str], float]:
    """For every object and side, the pixels by which it lies on that side of all others."""
    # of two objects, only the left and the upper one is considered
    sides = ("left", "above") if len(objects) == 2 else tuple(OPPOSITE)
    return {
        (index, side): min(gap(item, other, side) for other in objects if other is not item)
        for index, item in enumerate(objects)
        for side in sides
    }


def random_scene(rng: random.Random) -> Scene:
    """Chooses what the scene shows, then places it anew until one relation is unmistakable."""
    (count,) = rng.choices(list(OBJECT_WEIGHTS), list(OBJECT_WEIGHTS.values()))
    background = rng.choice(BACKGROUNDS)
    attributes = rng.sample(list(product(SIZES, COLOURS, KINDS)), count)
    while True:
        objects = [place(words, rng) for words in attributes]
        if count == 1:
            return Scene(background, objects, None)
        if is_clear(objects):
            by_relation = margins(objects)
            first, side = max(by_relation, key=by_relation.get)
            rest = objects[:first] + objects[first + 1 :]
            across, down = np.ptp([(item.x, item.y) for item in rest], axis=0)
            rest.sort(key=attrgetter("x" if across >= down else "y"))  # as one reads
            return Scene(background, [objects[first], *rest], side)


def place(words: Attributes, rng: random.Random) -> SceneObject:
    """Puts an object anywhere inside the picture."""
    radius = rng.uniform(*RADII[words[0]])
    return SceneObject(*words, *(rng.uniform(radius + 1, SIDE - radius - 1) for _ in "xy"), radius)


def is_clear(objects: list[SceneObject]) -> bool:
    """Whether two or more objects are apart and one relation stands out."""
    pairs = combinations(objects, 2)
    if any(max(gap(a, b, side) for side in OPPOSITE) < CLEARANCE for a, b in pairs):
        return False
    second, first = sorted(margins(objects).values())[-2:]
    return first >= MARGIN and first - second >= LEAD


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Paints a scene, with slightly varied colours and a grain all over it."""
    side = SIDE * OVERSAMPLING
    image = Image.new("RGB", (side, side), shade(scene.background, rng))
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        paint(draw, item, shade(item.colour, rng))
    pixels = np.asarray(image.reduce(OVERSAMPLING), dtype=np.int16)
    grain = np.frombuffer(rng.randbytes(SIDE * SIDE), dtype=np.uint8).reshape(SIDE, SIDE, 1)
    grain = grain.astype(np.int16) % (2 * NOISE + 1) - NOISE
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    """The colour in RGB, a little lighter or darker."""
    change = rng.randint(-12, 12)
    return tuple(min(255, max(0, level + change)) for level in PAINT[colour])


def paint(draw: ImageDraw.ImageDraw, item: SceneObject, colour: tuple[int, ...]) -> None:
    """Draws one object."""
    x, y, radius = (OVERSAMPLING * value for value in (item.x, item.y, item.radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.kind == "circle":
        draw.ellipse(box, fill=colour)
    elif item.kind == "ring":
        draw.ellipse(box, outline=colour, width=round(0.4 * radius))
    else:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[item.kind]], colour)


ARM = 0.32  # half the width of a cross's arms
STAR = [((1.0, 0.42)[i % 2], math.pi * i / 5) for i in range(10)]  # radius and angle of corners
OUTLINES = {  # in the square around the unit circle; y is down
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "cross": [
        *[(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)],
        *[(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    ],
    "star": [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in STAR],
}
