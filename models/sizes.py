"""Checks of the sizes that a config gives for a transformer, before a library meets them."""

from utils import UserError


def choose_sizes(config: dict, key: str, known: dict, heads: dict, **optional: float) -> dict:
    """The sizes that a config names or gives under a key; `optional` has defaults of some."""
    sizes = config[key]
    if isinstance(sizes, str):
        if sizes not in known:
            raise UserError(f"{key}: {sizes!r} is none of {sorted(known)} and no mapping of sizes")
        sizes = known[sizes]
    keys = known["large"].keys()
    if not keys - optional <= set(sizes) <= keys:
        raise UserError(f"{key}: a mapping needs {sorted(keys)}; got {sorted(sizes)}")
    sizes = optional | sizes
    check_sizes(key, sizes, heads, optional)
    size, patch = config["image_size"], sizes["patch_size"]
    if size < 1 or size % patch:
        raise UserError(f"image_size: {size} is no multiple of patch_size {patch}")
    return sizes


def check_sizes(key: str, sizes: dict, heads: dict[str, str], fractions) -> None:
    """Checks numbers, those of `fractions` in [0, 1), and that `heads` divide widths."""
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
