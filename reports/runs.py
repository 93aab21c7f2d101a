"""The folder of a run: the names of its files, and what they hold. Imports nothing heavy."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, write_json

PRUNED_FILE = "pruned.safetensors"
PRUNING_FILE = "pruning.json"  # of `prune.py`
REPORT_FILE = "sparsity.json"  # of every run, beside its weights
CHECKPOINTS = "checkpoints"  # a folder
LOG_FILE = "log.txt"  # a line of JSON for each epoch
# what an evaluation writes into results/, and a validation during training does not
EVALUATED = ("accuracy.json", "recalls.json", "test_scores.json", "test.json")

ROOT = Path(__file__).parents[1]  # the project, whose own files configs name
PATHS = "ann_root image_root med_config tokenizer pretrained id_profile pruned".split()
# scores that tables show, and their columns; recalls are percentages
RECALLS = {"txt_r1": "TR@1", "txt_r5": "TR@5", "img_r1": "IR@1", "img_r5": "IR@5", "r_mean": "mean"}
COLUMNS = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", **RECALLS}


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder has it; None and empty stand for what is not there."""

    folder: Path
    sparsity: dict | None  # a `pruners.sparsity_report`
    results: dict[str, dict[str, float]]  # {split: {score: value}}
    # training's and the last evaluation's "config", "flags" and, in newer runs, "argv"; their paths
    # lead to where the files lie now
    records: list[dict]
    config: dict | None  # the last record's
    weights: Path  # what was evaluated, a file or folder; else what training wrote
    id_profile: str  # path of the profile that weighted the scores
    captions: dict[int, str]  # test split, by image id
    references: dict[int, list[str]]  # test split, by image id
    remarks: list[str]  # sentences on scores or weights that may mislead
    at_once: dict[str, dict]  # what `prune.py` recorded, by layer name

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name.encode("utf-8", "replace").decode()

    @property
    def scores(self) -> dict[str, str]:
        """Accuracies of all splits, or other scores of the test split, by column."""
        accuracies = {split: x["accuracy"] for split, x in self.results.items() if "accuracy" in x}
        if accuracies:
            return {f"{split} accuracy": f"{share:.1%}" for split, share in accuracies.items()}
        test = self.results.get("test", {})
        shown = [name for name in COLUMNS if name in test] or test
        forms = {name: "{:.1f}%" if name in RECALLS else "{:.3f}" for name in shown}
        return {COLUMNS.get(name, name): form.format(test[name]) for name, form in forms.items()}

    @property
    def shares(self) -> dict[str, str]:
        """Shares of zeros by column: among all prunable weights, and in each modality."""
        report = self.sparsity
        found = {"sparsity": report["overall"], **report["by_modality"]} if report else {}
        return {column: f"{share:.1%}" for column, share in found.items()}


def read_run(folder: Path) -> RunFolder:
    """Reads a run's folder, also of an earlier version. UserError: no run, or a damaged file."""
    sparsity = _read(folder / REPORT_FILE)
    trained, evaluated = (_record(folder / f"{name}.json") for name in ("config", "evaluation"))
    trained = trained or _record(folder / PRUNING_FILE)
    if sparsity is None and trained is None:
        remedy = "name folders that the training scripts (also with --evaluate) or prune.py wrote"
        raise UserError(f"{folder} holds no run: {remedy}")
    flags, config = (trained[key] if trained else {} for key in ("flags", "config"))
    profile = flags.get("id_profile") or (config["id_profile"] if flags.get("useID") else "")
    weights = folder / PRUNED_FILE
    if evaluated:
        config = evaluated["config"]
        weights = Path(evaluated["flags"].get("pruned") or config["pretrained"])
    captions, images = (_read(folder / f"results/test{x}.json") or [] for x in ("", "_images"))
    return RunFolder(
        folder,
        sparsity,
        _results(folder / "results"),
        [record for record in (trained, evaluated) if record],
        config or None,
        weights,
        profile,
        {row["image_id"]: row["caption"] for row in captions},
        {row["image_id"]: row["references"] for row in images},
        list(_remarks(folder, flags.get("final_threshold"))),
        (trained or {}).get("layers", {}),
    )


def _record(path: Path) -> dict | None:
    """The record of a command, with the paths where its files lie now.

    A file is sought at its place relative to the run's folder, which may have moved; then from the
    working folder; then among the project's files.
    """
    record, folder = _read(path), path.parent.resolve()
    if record is None or "flags" not in record:  # Hugging Face's folders have a config.json too
        return None
    flags = record["flags"]
    before = Path(flags["output_dir"], flags.get("model_dir") or Path(flags["config"]).stem)
    pruned = "" if flags.get("model_dir") else flags.get("pruned") or ""
    if pruned and before.name != folder.name and not pruned.endswith((".safetensors", ".pth")):
        before = Path(pruned)  # a run's folder, into which its evaluation writes
    for settings in (flags, record["config"]):
        for key in PATHS:
            if (named := settings.get(key)) and isinstance(named, str):
                places = [Path(named), ROOT / named]
                if places[0].is_absolute() == before.is_absolute():
                    moved = os.path.normpath(folder / os.path.relpath(named, before))
                    places.insert(0, Path(moved))
                settings[key] = str(next((x for x in places if x.exists()), named))
    return record


def _remarks(folder: Path, final_threshold: float | None) -> Iterator[str]:
    """Sentences on a training that has not ended, and on scores that may be of earlier weights."""
    name, weights = folder.resolve().name, folder / PRUNED_FILE
    if final_threshold is not None:
        left = (_read(folder / LOG_FILE, last_line=True) or {}).get("remaining_ratio", 1.0)
        if left > final_threshold + 1e-6:
            shares = f"{left:.0%} of the weights remain, {final_threshold:.0%} are asked for"
            yield f"The training of {name} has not ended: {shares}."
    shown = [folder / "results" / name for name in EVALUATED]
    written = [path.stat().st_mtime for path in shown if path.exists()]
    if written and weights.exists() and min(written) < weights.stat().st_mtime:
        again = "run --evaluate again if it was trained again"
        yield f"The scores and captions of {name} are older than its weights: {again}."


def _results(folder: Path) -> dict[str, dict[str, float]]:
    """Scores by split, from the files of all tasks; newer runs have scores.json as well."""
    accuracies = _read(folder / "accuracy.json") or {}
    captions = _read(folder / "test_scores.json")
    found = {split: {"accuracy": share} for split, share in accuracies.items()}
    found |= _read(folder / "recalls.json") or {}
    found |= {"test": captions["scores"]} if captions else {}
    return found | (_read(folder / "scores.json") or {})


def _read(path: Path, last_line: bool = False) -> dict | list | None:
    """Content of a JSON file, or of its last line; None without a file."""
    try:
        text = path.read_text()
        return json.loads(text.splitlines()[-1] if last_line and text else text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): run training or --evaluate again") from error


def write_scores(
    folder: Path, split: str, scores: dict[str, float], file: str = "", score: str = ""
) -> None:
    """Adds a split's scores to `scores.json`, and all of them or one `score` to the task's file."""
    contents = {"scores.json": scores}
    if file:
        contents[file] = scores[score] if score else scores
    for name, content in contents.items():
        write_json(folder / name, (_read(folder / name) or {}) | {split: content})
