"""ID profiles: the intrinsic dimension of every layer, and the files that hold it."""

import json
import math
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from dimension.twonn import BlockAnalysis, block_analysis
from utils import UserError, atomic_write, write_json

PROFILE = "profile.json"
DISTANCES = "distances"


@dataclass
class LayerID:
    """What is known of a layer.

    Attributes:
        id: intrinsic dimension.
        error: error bar, the standard deviation over 20 blocks.
        block_means: mean dimension at 1, 2, ..., 20 blocks; None where blocks are too small.
        points: samples used.
        duplicates: samples dropped because another has the same representation.
        features: numbers in the representation of a sample.
    """

    id: float
    error: float
    block_means: list[float | None]
    points: int
    duplicates: int
    features: int


@dataclass
class IDProfile:
    """IDs of a model's layers, in forward order, and how they were measured."""

    settings: dict
    layers: dict[str, LayerID] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "IDProfile":
        """Reads the JSON of `write`, or a folder that holds it.

        Raises:
            ValueError: there is no such file, or it is no profile of ours.
        """
        path = Path(path)
        path = path / PROFILE if path.is_dir() else path
        content = _read_json(path)
        try:
            layers = {name: LayerID(**values) for name, values in content["layers"].items()}
            return cls(content["settings"], layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no profile that ComputeID.py wrote: {error}") from error

    def write(self, folder: str | Path) -> None:
        """Writes the JSON and the original's four text files, one line a layer."""
        folder = Path(folder)
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        write_json(folder / PROFILE, {"settings": self.settings, "layers": layers})
        columns = {
            "ID.txt": list(self.layers),
            "result_id.txt": [layer.id for layer in self.layers.values()],
            "result_bar.txt": [layer.error for layer in self.layers.values()],
            "dim.txt": [layer.features for layer in self.layers.values()],
        }
        for name, values in columns.items():
            with atomic_write(folder / name) as file:
                file.writelines(f"{value}\n" for value in values)


def load_profile(path: str | Path) -> dict[str, float]:
    """Layer name to ID, of a published profile (`{name: ID}`) or of one that ComputeID.py wrote.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    path = Path(path)
    path = path / PROFILE if path.is_dir() else path
    content = _read_json(path)
    if "layers" in content:
        return {name: layer.id for name, layer in IDProfile.read(path).layers.items()}
    if not content or not all(isinstance(value, int | float) for value in content.values()):
        raise UserError(f"{path} is no ID profile: expected a mapping of layer names to IDs")
    return content


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the ID profile {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no ID profile: expected a mapping")
    return content


def measure_layer(
    name: str, features: int, distances: Tensor, fraction: float, permutations: Tensor
) -> LayerID:
    """Block analysis of a layer.

    Args:
        name: of the layer, for messages.
        features: numbers in the representation of a sample.
        distances: (n, n).
        fraction: of the points, see `twonn.estimate_id`.
        permutations: (20, n).

    Raises:
        ValueError: too few different samples for any estimate.
    """
    analysis: BlockAnalysis = block_analysis(distances, fraction, permutations)
    if math.isnan(analysis.id):
        raise UserError(
            f"layer {name}: {analysis.points} of {len(distances)} samples have two neighbours at "
            "different distances, and three are needed; take more samples (-n)"
        )
    means = [None if math.isnan(mean) else mean for mean in analysis.mean.tolist()]
    return LayerID(
        analysis.id, analysis.error, means, analysis.points, analysis.duplicates, features
    )


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights, the same whatever file they came from."""
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def partial_profiles(folder: str | Path) -> list[tuple[Path, IDProfile]]:
    """The files of `PartialProfile` in a folder, of whatever settings: a run that was stopped."""
    return [(path, IDProfile.read(path)) for path in sorted(Path(folder).glob("partial_*.json"))]


class PartialProfile:
    """The layers that a running profile has finished, kept so that it can go on where it stopped.

    Every process keeps a file of its own; all read them all.
    """

    def __init__(self, folder: str | Path, settings: dict, rank: int = 0):
        """Reads what earlier processes with the same settings have left.

        Args:
            folder: of the profile.
            settings: all that the IDs depend on.
            rank: of this process.
        """
        self.folder, self.settings, self.rank = Path(folder), settings, rank
        self.mine: dict[str, LayerID] = {}
        self.found: dict[str, LayerID] = {}
        for _, profile in partial_profiles(folder):
            if profile.settings == settings:
                self.found |= profile.layers

    def add(self, name: str, layer: LayerID) -> None:
        """Keeps a finished layer, and what was found with it in one file."""
        self.mine[name] = layer
        layers = {name: asdict(layer) for name, layer in (self.found | self.mine).items()}
        path = self.folder / f"partial_{self.rank}.json"
        write_json(path, {"settings": self.settings, "layers": layers})

    def clear(self) -> None:
        """Removes all files."""
        for path, _ in partial_profiles(self.folder):
            path.unlink()


def clear_distances(folder: str | Path) -> None:
    """Removes all that `save_distances` kept."""
    for path in Path(folder, DISTANCES).glob("*.pt"):
        path.unlink()


def save_distances(folder: str | Path, name: str, distances: Tensor) -> None:
    """Keeps a layer's distances (n, n) as the float64 numbers above the diagonal."""
    n = len(distances)
    above = torch.ones(n, n, dtype=torch.bool, device=distances.device).triu_(1)
    with atomic_write(Path(folder, DISTANCES, f"{name}.pt"), "wb") as file:
        torch.save(distances[above].cpu(), file)


def load_distances(folder: str | Path, name: str) -> Tensor:
    """Distances (n, n) of `save_distances`.

    Raises:
        ValueError: they were not kept.
    """
    path = Path(folder, DISTANCES, f"{name}.pt")
    try:
        values = torch.load(path, weights_only=True)
    except OSError as error:
        raise UserError(
            f"-s needs the distances that a run with --save_distances keeps, but {path} is not "
            "there"
        ) from error
    n = round((1 + math.sqrt(1 + 8 * len(values))) / 2)
    distances = torch.zeros(n, n, dtype=torch.float64)
    distances[torch.ones(n, n, dtype=torch.bool).triu_(1)] = values
    return distances + distances.T
