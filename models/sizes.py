"""Checks of the sizes that a config gives for a transformer."""

from collections.abc import Iterable

from utils import UserError


def check_sizes(
    key: str, sizes: dict, counts: Iterable[str], fractions: Iterable[str], width: str, heads: str
) -> None:
    """Checks values and relations, so that no library meets what it cannot build.

    Args:
        key: of the config, for the message.
        sizes: name to value; what is in none of the lists is left alone.
        counts: names of whole numbers above 0.
        fractions: names of numbers in [0, 1).
        width: name of the width, which the heads share.
        heads: name of the number of heads.

    Raises:
        UserError: naming key, name and value.
    """
    for name in counts:
        value = sizes[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}: {name} is {value!r}, but must be a whole number above 0")
    for name in fractions:
        value = sizes[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise UserError(f"{key}: {name} is {value!r}, but must be a number in [0, 1)")
    if sizes[width] % sizes[heads]:
        raise UserError(f"{key}: {width} {sizes[width]} is no multiple of {heads} {sizes[heads]}")
