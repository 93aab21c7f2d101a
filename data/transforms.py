"""BLIP's image transforms, composed from torchvision's."""

from collections.abc import Callable
from functools import partial

import compat  # noqa: F401

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEVEL = 5 / 10  # strength of every operation of the augmentation, as a fraction of its largest


def build_transform(image_size: int, augment: bool) -> Callable:
    """The transform from an RGB PIL image to a normalised float tensor (3, image_size, image_size).

    With `augment` it crops, flips and distorts at random, by torch's global generator, as BLIP's
    training does; else it resizes the whole image, whatever its aspect ratio.
    """
    bicubic = InterpolationMode.BICUBIC
    if augment:
        crop = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=bicubic)
        geometry = [crop, v2.RandomHorizontalFlip(), random_operation(), random_operation()]
    else:
        geometry = [v2.Resize((image_size, image_size), interpolation=bicubic)]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*geometry, *to_float, v2.Normalize(CLIP_MEAN, CLIP_STD)])


def random_operation() -> Callable:
    """One of the ten operations, with probability 0.5."""
    return v2.RandomApply([v2.RandomChoice(list(operations().values()))], p=0.5)


def operations() -> dict[str, Callable]:
    """The ten operations of RandAugment (Cubuk et al., 2020) that BLIP takes, by name."""
    factor = 0.1 + 1.8 * LEVEL  # 1, as in BLIP: brightness and sharpness change nothing
    shear, shift, angle = 0.3 * LEVEL, round(10 * LEVEL), 30 * LEVEL  # slope, pixels, degrees
    slope = torch.rad2deg(torch.atan(torch.tensor(shear))).item()
    return {
        "identity": v2.Identity(),
        "autocontrast": v2.RandomAutocontrast(p=1.0),
        "brightness": v2.ColorJitter(brightness=(factor, factor)),
        "sharpness": v2.RandomAdjustSharpness(factor, p=1.0),
        "equalize": v2.RandomEqualize(p=1.0),
        "shear x": either_sign(lambda sign: affine(shear=[sign * slope, 0.0], center=[0, 0])),
        "shear y": either_sign(lambda sign: affine(shear=[0.0, sign * slope], center=[0, 0])),
        "translate x": either_sign(lambda sign: affine(translate=[sign * shift, 0])),
        "translate y": either_sign(lambda sign: affine(translate=[0, sign * shift])),
        "rotate": either_sign(lambda sign: affine(angle=sign * angle)),
    }


def either_sign(operation: Callable[[int], Callable]) -> Callable:
    """Applies `operation(1)` or `operation(-1)`, each half of the time."""
    return v2.RandomChoice([operation(1), operation(-1)])


def affine(**change) -> Callable:
    """An affine map with bilinear interpolation that is the identity but for `change`."""
    identity = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return partial(
        F.affine, **(identity | change), interpolation=InterpolationMode.BILINEAR, fill=[128] * 3
    )
