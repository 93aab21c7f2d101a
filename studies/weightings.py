"""The numbers that weight a layer's scores: IDs, and controls that are IDs in all but one respect.

Each is a profile, layer name to number, as `--id_profile` takes it; the pruner learns nothing new.
Only the ratios between the numbers matter, for the threshold is global.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from utils import UserError, write_json

NONE, ID, SHUFFLED = "none", "ID", "shuffled"
WITHIN, MEAN, INVERSE = "shuffled within modality", "modality mean", "1/ID"
WEIGHTINGS = (NONE, ID, SHUFFLED, WITHIN, MEAN, INVERSE)
POWER = re.compile(r"^ID\^(-?\d+(?:\.\d+)?)$")  # "ID^0.5"


def check_weighting(weighting: str) -> None:
    """Passes the names that `weigh` takes.

    Raises:
        UserError: it is none of them.
    """
    if weighting not in WEIGHTINGS and not POWER.match(weighting):
        raise UserError(f"weighting {weighting!r} is none of {', '.join(WEIGHTINGS)} and ID^A")


def weigh(weighting: str, ids: dict[str, float], seed: int) -> dict[str, float] | None:
    """The profile of a weighting.

    Args:
        weighting: one of WEIGHTINGS, or "ID^A" with a number A.
        ids: layer name to ID, all positive.
        seed: of the shuffles; other seeds shuffle otherwise.

    Returns:
        Layer name to number, in the order of `ids`; None for no weighting.

    Raises:
        UserError: there is no such weighting.
    """
    check_weighting(weighting)
    if weighting == NONE:
        return None
    if weighting == SHUFFLED:
        return shuffle(ids, list(ids), seed)
    if weighting in (WITHIN, MEAN):
        parts = [
            shuffle(ids, names, seed)
            if weighting == WITHIN
            else dict.fromkeys(names, sum(map(ids.get, names)) / len(names))
            for names in by_modality(ids)
        ]
        merged = {name: value for part in parts for name, value in part.items()}
        return {name: merged[name] for name in ids}
    power = {ID: 1.0, INVERSE: -1.0}.get(weighting)
    if power is None:
        power = float(POWER.match(weighting).group(1))
    return {name: value**power for name, value in ids.items()}


def by_modality(names: Iterable[str]) -> list[list[str]]:
    """The layers of each modality."""
    from models.layers import modality  # torch takes seconds to import

    found = defaultdict(list)
    for name in names:
        found[modality(name)].append(name)
    return list(found.values())


def shuffle(ids: dict[str, float], names: list[str], seed: int) -> dict[str, float]:
    """Gives the IDs of some layers to the same layers in a random order."""
    values = [ids[name] for name in names]
    random.Random(seed).shuffle(values)
    return dict(zip(names, values, strict=True))


def write_weighting(path: Path, weighting: str, ids: dict[str, float], seed: int) -> Path | None:
    """Writes a weighting's profile as a file for `--id_profile`; arguments as `weigh`.

    Returns:
        The file; None, and no file, for no weighting.
    """
    profile = weigh(weighting, ids, seed)
    if profile is None:
        return None
    write_json(path, profile)
    return path
