"""Checks of the sizes that a config gives for a transformer, before a library meets them."""

from utils import UserError


def choose_sizes(key: str, sizes: str | dict, known: dict[str, dict], optional: str = "") -> dict:
    """The sizes that a config names or gives under a key; known["large"] has all of them."""
    if isinstance(sizes, str):
        if sizes not in known:
            raise UserError(f"{key}: {sizes!r} is none of {sorted(known)} and no mapping of sizes")
        sizes = known[sizes]
    keys = set(known["large"])
    if not keys - {optional} <= set(sizes) <= keys:
        raise UserError(f"{key}: a mapping needs {sorted(keys)}; got {sorted(sizes)}")
    return sizes


def check_sizes(key: str, sizes: dict, fractions: tuple, heads: dict[str, str]) -> None:
    """Checks whole numbers above 0, fractions in [0, 1), and widths that heads share.

    Args:
        key: of the config, for the message.
        sizes: name to value.
        fractions: names of the sizes that are fractions.
        heads: name of a width to the name of the number of its heads.
    """
    for name, value in sizes.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in fractions and not (number and 0 <= value < 1):
            raise UserError(f"{key}: {name} is {value!r}, but must be a number in [0, 1)")
        if name not in fractions and not (number and isinstance(value, int) and value > 0):
            raise UserError(f"{key}: {name} is {value!r}, but must be a whole number above 0")
    for width, number in heads.items():
        if sizes[width] % sizes[number]:
            raise UserError(
                f"{key}: {width} {sizes[width]} is no multiple of {number} {sizes[number]}"
            )


def check_image_size(image_size: int, patch_size: int) -> None:
    """Checks that patches fill an image. Sizes are in pixels."""
    if image_size < 1 or image_size % patch_size:
        raise UserError(f"image_size: {image_size} is no multiple of patch_size {patch_size}")
