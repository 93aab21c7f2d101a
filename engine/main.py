"""What all training scripts do: check, take the results folder, then train or evaluate in it."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from engine.experiment import Experiment
from engine.loading import EvalOptions
from engine.loop import already_finished, train
from engine.run import Run, prepare, start
from engine.state import build_state, find_checkpoint, resume
from models.layers import prunable_layers
from pruners.sparsity import sparsity_report
from reports.runs import write_scores
from sparse.linear import sparsify_
from utils import UserError, write_json


def run_task(experiment: Experiment) -> None:
    """Trains and prunes, or with --evaluate scores weights. A refused command writes nothing.

    Raises:
        UserError: flags, config, data, weights or the results folder are wrong, or a checkpoint is
            of another run.
        FloatingPointError: a loss is not finite.
        SystemExit: SIGTERM or SIGINT came, see `engine.loop.train`.
    """
    run = start(experiment)
    model, train_set, held_out, layer_id = prepare(run)
    if run.flags.evaluate:
        with recorded(run, "evaluation.json"):
            evaluate(run, model.eval(), held_out)
        return
    state = build_state(run, model, train_set, layer_id)
    found = find_checkpoint(run, state.identity)
    if run.flags.check:
        run.say(f"all is there: {state.plan.total_steps} steps in {state.plan.epochs} epochs")
        return
    resume(run, state, found)
    del found  # whose tensors map the file
    if not already_finished(run, state):
        with recorded(run, "config.json"):
            train(run, state, held_out)


@contextmanager
def recorded(run: Run, name: str) -> Iterator[None]:
    """Holds the results folder in the block, on the main process, with the run's record in it."""
    if not run.process.is_main:
        yield
        return
    with locked(run.folder):
        run.write(run.folder / name)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it until the block or this process ends.

    The lock is the process's own: loading processes do not inherit it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY, 0o666)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another --output_dir or "
            "--model_dir"
        ) from error
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
                raise UserError(
                    f"another process is writing to {folder}: wait for it, or choose another "
                    "--model_dir"
                ) from None
        yield
    finally:
        os.close(lock)


def evaluate(run: Run, model: nn.Module, held_out: dict[str, Dataset]) -> None:
    """Scores held-out sets, prints the scores and writes them to `results/`."""
    results, notes = run.folder / "results", {}
    if run.process.is_main:
        write_json(run.folder / "sparsity.json", sparsity_report(prunable_layers(model)))
    if run.flags.sparse:
        run.say(str(sparsify_(model)))
    spice = getattr(run.flags, "spice", False)
    options = EvalOptions(
        run.config, run.process.device, run.bf16, results, True, spice, run.flags.eval_samples
    )
    for split, dataset in held_out.items():
        report = run.task.evaluate(model, dataset, split, options)
        if run.process.is_main:
            write_scores(results, split, report["scores"], *run.task.results)
        run.say(f"{split}: {json.dumps(report['scores'])}")
        notes |= dict.fromkeys(report.get("notes", []))
    for line in (*notes, f"wrote {results}"):
        run.say(line)
