"""A study: its cells in the order in which they run, and the JSON file that keeps it.

The file holds all that a cell needs, so that any machine with the data can run it or run it again.
"""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from utils import UserError, atomic_write

DENSE = "dense"  # the method of a cell that scores the weights it starts from
# flags of the training scripts that a cell sets, or that would make something else of it
CELL_FLAGS = "config output_dir model_dir seed final_threshold eval_epochs pruner_name".split()
CELL_FLAGS += "id_profile useID check evaluate".split()


@dataclass(frozen=True)
class Cell:
    """One run of a study. Cells that differ in the weighting alone are paired.

    Attributes:
        task: a key of `engine.tasks.TASKS`.
        method: a name of --pruner_name, or DENSE.
        remaining: fraction of the weights that remains, in (0, 1].
        weighting: a name of `studies.weightings`.
        seed: of the data's order and the dropout, and of a shuffle.
    """

    task: str
    method: str
    remaining: float
    weighting: str
    seed: int

    @property
    def name(self) -> str:
        """Fit for a folder."""
        weighting = self.weighting.replace("/", " over ").replace(" ", "_")
        return f"{self.task}-{self.method}-{self.remaining:g}-{weighting}-{self.seed}"


@dataclass(frozen=True)
class Setting:
    """How the cells of a task run.

    Attributes:
        config: YAML file of the experiment.
        id_profile: file of the layers' IDs.
        validation: samples of the validation split that score a cell; 0 takes all.
        flags: further ones of the task's training script.
    """

    config: str
    id_profile: str
    validation: int = 0
    flags: list[str] = field(default_factory=list)


@dataclass
class Study:
    """What runs, and what has come of it.

    Attributes:
        settings: by task.
        cells: in the order in which they run.
        results: of the finished cells; see `studies.cells.run_cell`.
        failures: why a cell has no result and gets none: its training diverged.
        notes: sentences that were written before the cells ran, such as the rule of the verdicts.
        pooled: remaining fractions over which each seed's mean is compared, too.
        digests: by task, of the content of what cells are computed from, once one has run.
    """

    settings: dict[str, Setting]
    cells: list[Cell]
    results: dict[Cell, dict] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    pooled: list[float] = field(default_factory=list)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Reads what `write` wrote.

        Raises:
            UserError: the file cannot be read or is no study.
        """
        try:
            content = json.loads(path.read_text())
            settings = {task: Setting(**values) for task, values in content["settings"].items()}
            study = cls(settings, [], notes=content["notes"], pooled=content["pooled"])
            study.digests = content.get("digests", {})  # older studies have none
            for record in content["cells"]:
                result, failure = record.pop("result", None), record.pop("failure", None)
                study.cells.append(cell := Cell(**record))
                if result is not None:
                    study.results[cell] = result
                if failure is not None:
                    study.failures[cell] = failure
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no study that study.py wrote: {error!r}") from error
        return study

    def write(self, path: Path) -> None:
        """Writes the study atomically, one line a cell."""
        lines = []
        for cell in self.cells:
            record = asdict(cell)
            if cell in self.results:
                record["result"] = self.results[cell]
            if cell in self.failures:
                record["failure"] = self.failures[cell]
            lines.append(json.dumps(record))
        settings = {task: asdict(setting) for task, setting in self.settings.items()}
        head = {"notes": self.notes, "pooled": self.pooled, "settings": settings}
        head |= {"digests": self.digests} if self.digests else {}
        start = json.dumps(head, indent=1).removesuffix("\n}")
        with atomic_write(path) as file:
            file.write(f'{start},\n "cells": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")

    def keep_digests(self, task: str, own: dict[str, str]) -> None:
        """Keeps the digests of a task's first cell, which those of later ones must equal.

        Args:
            task: of the cells.
            own: what a cell is computed from, to the digest of its content.

        Raises:
            UserError: the cells that ran before were computed from other content; names it.
        """
        kept = self.digests.setdefault(task, own)
        changed = [name for name in kept | own if kept.get(name) != own.get(name)]
        if changed:
            raise UserError(
                f"since the study's first {task} cell the content has changed of "
                f"{', '.join(changed)}: put it back, or give another --file for a new study"
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside the block no other process is in such a block for this file.

    Raises:
        UserError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path}: its file system cannot lock files ({error.strerror}), so that results of "
                "several jobs would be lost: choose a --file elsewhere"
            ) from error
        yield
    finally:
        os.close(handle)


@contextmanager
def changing(path: Path) -> Iterator[Study]:
    """The study of a file, written when the block ends; other processes wait for their turn."""
    with locked(path):
        study = Study.read(path)
        yield study
        study.write(path)


def open_study(path: Path, wanted: Study | None) -> None:
    """Writes the study that is wanted, unless the file holds it already.

    Args:
        path: of the study.
        wanted: without results; None takes what the file holds.

    Raises:
        UserError: there is no file, or it holds another study.
    """
    with locked(path):
        if wanted is not None and not path.exists():
            wanted.write(path)
            return
        kept = Study.read(path)
    if wanted is not None and (kept.cells, kept.settings) != (wanted.cells, wanted.settings):
        raise UserError(
            f"{path} is of another study: its cells or settings are not those that the flags ask "
            "for. Give another --file, or --file alone to go on with what it holds"
        )


def share(cells: list[Cell], part: str) -> list[Cell]:
    """The i-th of n shares of the cells, for `part` "i/n".

    Cells that are compared stay together, for shares may run on unlike machines. Of more shares
    than there are such blocks each gets single cells.

    Raises:
        UserError: `part` is no such share.
    """
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--cells {part}: give I/N, the I-th of N shares, from 1/N to N/N")
    blocks = defaultdict(list)
    for cell in cells:
        blocks[cell.task, cell.method, cell.remaining, cell.seed].append(cell)
    shares: list[list[Cell]] = [[] for _ in range(int(parts))]
    if len(blocks) < len(shares):
        return cells[int(number) - 1 :: len(shares)]
    for block in blocks.values():
        min(shares, key=len).extend(block)
    return shares[int(number) - 1]


def trainer_flags(cell: Cell, setting: Setting, folder: Path, profile: Path | None) -> list[str]:
    """The command line of the training script that runs a cell; the cell's own flags come last.

    Of a flag that is there twice the last one counts.

    Args:
        cell: to run.
        setting: of its task.
        folder: of all runs.
        profile: file of the weighting, if any.
    """
    flags = {
        "config": setting.config,
        "output_dir": folder,
        "model_dir": cell.name,
        "seed": cell.seed,
        "final_threshold": cell.remaining,
        "eval_epochs": 0,
    }
    if cell.method != DENSE:
        flags["pruner_name"] = cell.method
    if profile:
        flags["id_profile"] = profile
    return setting.flags + [f"--{name}={value}" for name, value in flags.items()]


def grid(task: str, methods, remaining, weightings, seeds) -> list[Cell]:
    """All combinations; those to be compared with each other follow each other."""
    combinations = product(seeds, methods, remaining, weightings)
    return [Cell(task, method, r, weighting, seed) for seed, method, r, weighting in combinations]
