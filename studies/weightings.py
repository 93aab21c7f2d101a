"""The numbers that weight a layer's scores: IDs, and controls that are IDs in all but one respect.

Each is a profile, layer name to number, as `--id_profile` takes it; the pruner learns nothing new.
Only the ratios between the numbers matter, for the threshold is global.
"""

import random
import re
from collections import defaultdict
from pathlib import Path

from models.layers import modality
from utils import UserError, write_json

NONE, ID, SHUFFLED = "none", "ID", "shuffled"
WITHIN, MEAN, INVERSE = "shuffled within modality", "modality mean", "1/ID"
WEIGHTINGS = (NONE, ID, SHUFFLED, WITHIN, MEAN, INVERSE)
POWER = re.compile(r"^ID\^(-?\d+(?:\.\d+)?)$")  # "ID^0.5"


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
    modalities = defaultdict(list)
    for name in ids:
        modalities[modality(name)].append(name)
    if weighting == NONE:
        return None
    if weighting == ID:
        return dict(ids)
    if weighting == SHUFFLED:
        return shuffle(ids, list(ids), seed)
    if weighting == WITHIN:
        shuffled = [shuffle(ids, names, seed) for names in modalities.values()]
        merged = {name: value for part in shuffled for name, value in part.items()}
        return {name: merged[name] for name in ids}
    if weighting == MEAN:
        means = {kind: sum(map(ids.get, names)) / len(names) for kind, names in modalities.items()}
        return {name: means[modality(name)] for name in ids}
    if weighting == INVERSE:
        return {name: 1 / value for name, value in ids.items()}
    if power := POWER.match(weighting):
        return {name: value ** float(power.group(1)) for name, value in ids.items()}
    raise UserError(f"weighting {weighting!r} is none of {', '.join(WEIGHTINGS)} and ID^A")


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
