"""The scores of a run's held-out splits, in files of its results folder."""

import json
from pathlib import Path

from utils import write_json

SCORES = "scores.json"  # {split: {score: value}} of every task


def write_scores(
    folder: Path, split: str, scores: dict[str, float], file: str = "", score: str = ""
) -> None:
    """Adds a split's scores to `scores.json`, and to the task's own file.

    Args:
        folder: of the results.
        split: name of the split.
        scores: name to value.
        file: of the task; "" for none.
        score: the one that the task's file holds by split; "" for all of them.
    """
    _add(folder / SCORES, split, scores)
    if file:
        _add(folder / file, split, scores[score] if score else scores)


def _add(path: Path, split: str, value) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | {split: value})
