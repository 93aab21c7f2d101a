"""What the training scripts leave in the folder of a run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

PRUNED_FILE = "pruned.safetensors"
CHECKPOINTS = "checkpoints"  # a folder
LOG_FILE = "log.txt"  # a line of JSON for each epoch
# of results/: what is read here; a validation in training writes others beside them
SHOWN = ("accuracy.json", "recalls.json", "test_scores.json", "test.json")
CAPTION_SCORES = {"CIDEr": "CIDEr", "BLEU-4": "Bleu_4"}  # column: pycocoevalcap's name
RECALLS = {"TR@1": "txt_r1", "TR@5": "txt_r5", "IR@1": "img_r1", "IR@5": "img_r5", "mean": "r_mean"}


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it; None and empty stand for what is not there.

    Attributes:
        folder: of the run.
        sparsity: of `pruners.sparsity_report`.
        scores: column to formatted value; captions' and recalls are of the test split.
        trained: "config" and "flags" of training.
        evaluated: "config" and "flags" of the last evaluation.
        captions: of the test split, by image id.
        remarks: sentences about what is not as it seems.
    """

    folder: Path
    sparsity: dict | None
    scores: dict[str, str]
    trained: dict | None
    evaluated: dict | None
    captions: dict[int, str]
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def config(self) -> dict | None:
        """Of the evaluation, or else of training."""
        known = self.evaluated or self.trained
        return known and known["config"]

    @property
    def weights(self) -> Path | None:
        """What was evaluated, or else what training wrote, if it is a file or folder here."""
        place = self.folder / PRUNED_FILE
        if self.evaluated:
            place = self.evaluated["flags"]["pruned"] or self.evaluated["config"]["pretrained"]
        return Path(place) if place and Path(place).exists() else None

    @property
    def id_profile(self) -> str:
        """The path of the profile that weighted the scores; "" if none did."""
        if not self.trained:
            return ""
        flags, config = self.trained["flags"], self.trained["config"]
        return flags["id_profile"] or (config["id_profile"] if flags["useID"] else "")


def read_run(folder: Path) -> RunFolder:
    """Reads what is in a run's folder.

    Raises:
        UserError: it is no run's folder, or a file in it is damaged.
    """
    results = folder / "results"
    run = RunFolder(
        folder,
        _read(folder / "sparsity.json"),
        _scores(results),
        _read(folder / "config.json"),
        _read(folder / "evaluation.json"),
        {row["image_id"]: row["caption"] for row in _read(results / "test.json") or []},
    )
    run.remarks.extend(_remarks(run))
    if run.sparsity is None and run.trained is None:
        raise UserError(
            f"{folder} holds no run: name folders that the training scripts wrote, of training or "
            "of --evaluate"
        )
    return run


def _remarks(run: RunFolder) -> Iterator[str]:
    """Says whether training has not ended, and whether scores may be of earlier weights."""
    if run.trained and (asked := run.trained["flags"].get("final_threshold")) is not None:
        left = (_read(run.folder / LOG_FILE, last_line=True) or {}).get("remaining_ratio", 1.0)
        if left > asked + 1e-6:
            yield (
                f"the training of {run.name} has not ended: {left:.0%} of the weights remain, "
                f"{asked:.0%} are asked for"
            )
    weights = run.folder / PRUNED_FILE
    shown = [run.folder / "results" / name for name in SHOWN]
    written = [path.stat().st_mtime for path in shown if path.exists()]
    if written and weights.exists() and min(written) < weights.stat().st_mtime:
        yield (
            f"the scores and captions of {run.name} are older than its weights: run --evaluate "
            "again if it was trained again"
        )


def _scores(results: Path) -> dict[str, str]:
    """The scores of an evaluation of any task."""
    if accuracy := _read(results / "accuracy.json"):
        return {f"{split} accuracy": f"{share:.1%}" for split, share in accuracy.items()}
    if recalls := _read(results / "recalls.json"):
        return {column: f"{recalls['test'][name]:.1f}%" for column, name in RECALLS.items()}
    found = (_read(results / "test_scores.json") or {}).get("scores", {})
    return {col: f"{found[name]:.3f}" for col, name in CAPTION_SCORES.items() if name in found}


def _read(path: Path, last_line: bool = False) -> dict | list | None:
    """A JSON file, or the JSON of its last line; None if it is not there."""
    try:
        text = path.read_text()
        return json.loads(text.splitlines()[-1] if last_line and text else text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): run training or --evaluate again") from error
