"""ID profiles: the intrinsic dimension of every layer, and the files that hold it."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dimension.twonn import (
    BLOCK_COUNTS,
    ENOUGH_POINTS,
    ESTIMATORS,
    block_analyses,
    draw_permutations,
)
from utils import UserError, atomic_write, write_json

PROFILE = "profile.json"
DISTANCES = "distances"
# A layer with a larger share of duplicates is remarked on. COCO has five captions an image, so that
# the layers that see the image have some 30 duplicates among 2000 samples of its 566,747.
MANY_DUPLICATES = 0.1
TOO_MUCH = 0.5  # of what makes an ID doubtful, for a remark


class TooFewPoints(UserError):
    """A layer in which too few samples differ for any estimate."""


@dataclass
class LayerID:
    """What was measured of a layer.

    Attributes:
        id: intrinsic dimension.
        error: standard deviation over 20 blocks, or as many as had enough points; None below two.
        block_means: mean dimension at 1, 2, ..., 20 blocks; None where blocks are too small.
        points: samples used.
        duplicates: samples dropped because another has the same representation.
        features: elements in the representation of a sample.
        kind: "vision", "language" or "other" if the layer's name does not show it.
        estimates: intrinsic dimension by estimator; `id` is that of the profile's own.
        same_length: share of the samples whose nearest neighbour has a text as long, in tokens.
        by_chance: that share if neighbours were random; both are None without texts.
        largest_channel: share of the variance that the channel with the most has.
    """

    id: float
    error: float | None
    block_means: list[float | None]
    points: int
    duplicates: int
    features: int
    kind: str | None = None
    estimates: dict[str, float] = field(default_factory=dict)
    same_length: float | None = None
    by_chance: float | None = None
    largest_channel: float | None = None


@dataclass(frozen=True)
class Estimation:
    """How distances become IDs: estimator and fraction of `estimate_id`; the seed of the blocks."""

    fraction: float = 1.0
    seed: int = 0
    estimator: str = "twonn"

    def __post_init__(self):
        """Raises UserError if an argument is out of range."""
        if self.estimator not in ESTIMATORS:
            raise UserError(f"estimator {self.estimator!r} is none of {', '.join(ESTIMATORS)}")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction {self.fraction} is not in (0, 1]")
        if self.fraction < 1 and self.estimator != "twonn":
            raise UserError(f"fraction {self.fraction}: {self.estimator} takes all points, give 1")

    @property
    def settings(self) -> dict:
        """What a profile records."""
        chosen = {"estimator": self.estimator, "fraction": self.fraction}
        return chosen | {"enough_points": ENOUGH_POINTS}

    def measure(self, name: str, features: int, distances: Tensor) -> LayerID:
        """`measure_layer`, with the same blocks for all layers."""
        permutations = block_permutations(len(distances), self.seed)
        return measure_layer(name, features, distances, self.fraction, permutations, self.estimator)


def block_permutations(n: int, seed: int) -> Tensor:
    """The blocks (20, n) of a seed, which are drawn apart from its samples."""
    return draw_permutations(n, torch.Generator().manual_seed(seed + 1))


def measure_layer(
    name: str,
    features: int,
    distances: Tensor,
    fraction: float,
    permutations: Tensor,
    estimator: str = "twonn",
) -> LayerID:
    """Block analysis of a layer, over the levels whose blocks have `ENOUGH_POINTS` points.

    The original averages over all levels; with 400 samples or more the numbers are the same.
    `features` are the elements in a sample's representation; the rest is as in `block_analysis`.
    The other estimators' IDs are recorded, too. TooFewPoints: there is no estimate.
    """
    found = block_analyses(distances, permutations, ENOUGH_POINTS, fraction, ESTIMATORS)
    analysis = found[estimator]
    if math.isnan(analysis.id):
        different = "different " if analysis.duplicates else ""
        raise TooFewPoints(
            f"layer {name}: {analysis.points} of {len(distances)} samples have two neighbours at "
            f"different distances ({analysis.duplicates} are duplicates), and three are needed; "
            f"take more {different}samples"
        )
    error = None if math.isnan(analysis.error) else analysis.error
    means = [None if math.isnan(mean) else mean for mean in analysis.mean.tolist()]
    ids = {key: other.id for key, other in found.items() if not math.isnan(other.id)}
    counts = analysis.points, analysis.duplicates
    return LayerID(analysis.id, error, means, *counts, features, estimates=ids)


@dataclass
class IDProfile:
    """IDs of a model's layers, in forward order; how they were measured; remarks."""

    settings: dict
    layers: dict[str, LayerID] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> "IDProfile":
        """Reads the JSON of `write`, or a folder that holds it."""
        path, content = _read_json(path)
        try:
            layers = {name: LayerID(**values) for name, values in content["layers"].items()}
            return cls(content["settings"], layers, content.get("remarks", []))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no profile that ComputeID.py wrote: {error}") from error

    def kinds(self) -> dict[str, str]:
        """Layer name to kind, for layers whose names do not show it."""
        return {name: layer.kind for name, layer in self.layers.items() if layer.kind}

    def write(self, folder: str | Path) -> None:
        """Writes the JSON and the original's four text files, one line a layer."""
        folder = Path(folder)
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        content = {"settings": self.settings, "remarks": self.remarks, "layers": layers}
        write_json(folder / PROFILE, content)
        found = self.layers.values()
        columns = {
            "ID.txt": self.layers,
            "result_id.txt": [x.id for x in found],
            "result_bar.txt": [math.nan if x.error is None else x.error for x in found],
            "dim.txt": [x.features for x in found],
        }
        for name, values in columns.items():
            with atomic_write(folder / name) as file:
                file.writelines(f"{value}\n" for value in values)


def load_profile(path: str | Path) -> dict[str, float]:
    """Layer name to ID, from a published profile (`{name: ID}`) or one that ComputeID.py wrote."""
    path, content = _read_json(path)
    if "layers" in content:
        return {name: layer.id for name, layer in IDProfile.read(path).layers.items()}
    if not content or not all(isinstance(value, int | float) for value in content.values()):
        raise UserError(f"{path} is no ID profile: expected a mapping of layer names to IDs")
    return content


def load_kinds(path: str | Path) -> dict[str, str]:
    """Layer name to kind, for layers of a profile whose names do not show it."""
    path, content = _read_json(path)
    return IDProfile.read(path).kinds() if "layers" in content else {}


def _read_json(path: str | Path) -> tuple[Path, dict]:
    """The profile's file, which may be given by its folder, and its content."""
    path = Path(path)
    path = path / PROFILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the ID profile {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no ID profile: expected a mapping")
    return path, content


def make_remarks(n: int, layers: dict[str, LayerID], bad: int = 0) -> list[str]:
    """Sentences on unreliable IDs; `bad` samples were passed over as unreadable."""
    remarks, most = [], BLOCK_COUNTS[-1]
    if bad:
        remarks.append(
            f"{bad} samples were passed over for others, because their images cannot be read"
        )
    used = min(max(1, n // ENOUGH_POINTS), most)
    if used < most:
        bars = " and have no error bars" if used == 1 else ""
        remarks.append(
            f"{n} samples are few: blocks of fewer than {ENOUGH_POINTS} have no reliable dimension,"
            f" so the IDs average over {used} of {most} levels{bars}; "
            f"-n {most * ENOUGH_POINTS} is enough for all levels, and 2000 are usual"
        )

    doubtful = (  # what it is, from where on it is remarked, and the remark
        (
            lambda x: x.duplicates / n,
            MANY_DUPLICATES,
            "many samples have the same representation as another ({}) and are left out, so these "
            "IDs are unreliable; see whether images or captions are listed twice",
        ),
        (
            lambda x: (x.same_length - x.by_chance) / (1 - x.by_chance or 1),
            TOO_MUCH,
            "neighbours have texts of the same length far more often than by chance ({} of the way "
            "from chance to always), so these IDs tell how long texts are; measure with texts of "
            "one length (--one_length)",
        ),
        (
            lambda x: x.largest_channel,
            TOO_MUCH,
            "a single channel has most of the variance ({}), so distances are mostly its own; of "
            "texts, see whether those of one length (--one_length) give other IDs",
        ),
        (
            lambda x: x.error / x.id,
            TOO_MUCH,
            "the error bar is near the ID ({}); take more samples",
        ),
    )
    for value, limit, words in doubtful:
        found = {}
        for name, layer in layers.items():
            with suppress(TypeError, ZeroDivisionError):  # what is None, and an ID of 0
                found[name] = value(layer) or 0.0
        if many := [name for name, share in found.items() if share > limit]:
            worst = max(many, key=found.__getitem__)
            words = words.format(f"most in {worst}: {found[worst]:.0%}")
            remarks.append(f"in {len(many)} of {len(layers)} layers {words}: {', '.join(many)}")
    return remarks


def partial_profiles(folder: str | Path) -> list[tuple[Path, IDProfile]]:
    """The files that `PartialProfile` left in a folder, whatever their settings."""
    return [(path, IDProfile.read(path)) for path in sorted(Path(folder).glob("partial_*.json"))]


class PartialProfile:
    """The finished layers of an unfinished run, so that it can go on if it is stopped.

    Every process writes a file of its own, and reads all files with the same settings.
    """

    def __init__(self, folder: str | Path, settings: dict, rank: int = 0):
        self.folder, self.settings, self.rank = Path(folder), settings, rank
        self.mine: dict[str, LayerID] = {}
        self.found: dict[str, LayerID] = {}
        for _, profile in partial_profiles(folder):
            if profile.settings == settings:
                self.found |= profile.layers

    def add(self, name: str, layer: LayerID) -> None:
        """Writes a finished layer, with the layers found at the start, to this process's file."""
        self.mine[name] = layer
        layers = {name: asdict(layer) for name, layer in (self.found | self.mine).items()}
        path = self.folder / f"partial_{self.rank}.json"
        write_json(path, {"settings": self.settings, "layers": layers})

    def clear(self) -> None:
        """Removes all files."""
        for path, _ in partial_profiles(self.folder):
            path.unlink()


def clear_distances(folder: str | Path) -> None:
    """Removes all files of `save_distances`."""
    for path in Path(folder, DISTANCES).glob("*.pt"):
        path.unlink()


def save_distances(folder: str | Path, name: str, distances: Tensor) -> None:
    """Keeps the upper half of a layer's distances (n, n), in float64."""
    n = len(distances)
    above = torch.ones(n, n, dtype=torch.bool, device=distances.device).triu_(1)
    with atomic_write(Path(folder, DISTANCES, f"{name}.pt"), "wb") as file:
        torch.save(distances[above].cpu(), file)


def load_distances(folder: str | Path, name: str) -> Tensor:
    """Distances (n, n) of `save_distances`, to the bit."""
    path = Path(folder, DISTANCES, f"{name}.pt")
    try:
        values = torch.load(path, weights_only=True)
    except OSError as error:
        raise UserError(f"-s needs --save_distances before it: {path} is not there") from error
    n = round((1 + math.sqrt(1 + 8 * len(values))) / 2)
    distances = torch.zeros(n, n, dtype=torch.float64)
    distances[torch.ones(n, n, dtype=torch.bool).triu_(1)] = values
    return distances + distances.T
