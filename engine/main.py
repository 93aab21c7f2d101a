"""What all training scripts do: check what a run needs, then train or evaluate in its folder."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from dimension.profile import load_profile
from engine.experiment import Run
from engine.loading import eval_options
from engine.loop import already_finished, train
from engine.processes import (
    computes_bf16,
    init_distributed,
    keep_freed_memory,
    main_process_first,
    seed_everything,
)
from engine.reporter import screen
from engine.state import build_state, find_checkpoint, resume
from models.checkpoint import load_checkpoint, load_trained
from models.layers import prunable_layers
from models.weight_files import fetch
from pruners.sparsity import sparsity_report
from reports.runs import write_scores
from sparse.linear import sparsify_
from utils import UserError, write_json

LOOKED_AT = 5000  # training texts whose length is counted, at most


def run_task(experiment: Run) -> None:
    """Trains and prunes, or with --evaluate scores weights. A refused command writes nothing."""
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
        with recorded(run, "config.json", identity=state.identity):
            train(run, state, held_out)


def start(experiment: Run) -> Run:
    """Joins the other processes and seeds."""
    flags = experiment.flags
    if flags.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    process = init_distributed("cpu" if flags.sparse else flags.device)
    keep_freed_memory(process.device)
    seed_everything(flags.seed)
    bf16 = flags.amp == "bf16" or (flags.amp == "auto" and computes_bf16(process.device))
    return replace(experiment, process=process, bf16=bf16)


def prepare(run: Run) -> tuple[nn.Module, Dataset, dict[str, Dataset], dict[str, float] | None]:
    """Builds and checks data, weights and the ID profile. Writes nothing.

    Returns the model with its weights on its device, the training set, the held-out sets by name
    (with --split, this one alone), and the IDs by layer name that weight scores, if any do.
    """
    flags, task, mistakes = run.flags, run.task, []

    def tried(call: Callable, *args):
        """What a call returns; None where it raises a mistake, so that all are named at once."""
        try:
            return call(*args)
        except UserError as error:
            mistakes.append(str(error))

    sets = tried(task.build_datasets, run.config, flags.seed) or []
    held_out = dict(zip(task.held_out, sets[1:], strict=bool(sets)))
    held_out = {name: held_out[name] for name in held_out if flags.split in (None, name)}
    for dataset in held_out.values():
        dataset.keep_first(flags.eval_samples or len(dataset))
    for dataset in sets[:1]:
        dataset.skip_bad_images = flags.skip_bad_images  # evaluation needs every image
    for dataset in (*held_out.values(), *sets[: not flags.evaluate]):
        tried(dataset.check)
    model = tried(task.build_model, run.config)
    layer_id = tried(load_profile, run.id_profile) if run.id_profile else None
    weights = tried(find_weights, run)
    if model is not None and weights is not None:
        load = load_trained if flags.evaluate else load_checkpoint
        tried(lambda: run.say(str(load(model, weights))))
    if mistakes:
        raise UserError("\n       ".join(dict.fromkeys(mistakes)))
    device = run.process.device
    run.say(f"computes on {device} in {'bfloat16 autocast' if run.bf16 else 'float32'}")
    if not flags.evaluate and run.process.is_main:
        say_truncated(run, model, sets[0])
    return model.to(device), sets[0], held_out, layer_id


def find_weights(run: Run) -> Path | None:
    """What --pruned or the config's `pretrained` names, downloaded if it is an address."""
    if named := run.flags.pruned or run.config["pretrained"]:
        with main_process_first():
            return fetch(named)
    if run.flags.evaluate:
        raise UserError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
    return None


def say_truncated(run: Run, model: nn.Module, dataset: Dataset) -> None:
    """Prints how many training texts the model cuts; of very many, a sample is counted."""
    indices = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    if cut := model.count_cut([dataset.text(index) for index in indices]):
        texts = f"{len(indices)} training texts{' looked at' * (len(indices) < len(dataset))}"
        longer = f"are longer than max_tokens {model.max_tokens} and are cut"
        run.say(f"{cut} of {texts} {longer}")


@contextmanager
def recorded(run: Run, name: str, **more) -> Iterator[None]:
    """Holds the results folder in the block, on the main process, with the run's record in it."""
    with locked(run.folder) if run.process.is_main else nullcontext():
        if run.process.is_main:
            run.write(run.folder / name, **more)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it until the block or this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        remedy = "choose another --output_dir or --model_dir"
        raise UserError(f"cannot write to {folder}: {error.strerror}; {remedy}") from error
    with lock:
        try:  # the lock is the process's own: loading processes do not inherit it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
                remedy = "wait for it, or choose another --model_dir"
                raise UserError(f"another process is writing to {folder}: {remedy}") from None
        yield


def evaluate(run: Run, model: nn.Module, held_out: dict[str, Dataset]) -> None:
    """Scores held-out sets, prints the scores and writes them to `results/`."""
    options = eval_options(run, meteor=True, spice=getattr(run.flags, "spice", False))
    results, notes = options.results, {}
    if run.process.is_main:
        write_json(run.folder / "sparsity.json", sparsity_report(prunable_layers(model)))
    if run.flags.sparse:
        run.say(str(sparsify_(model)))
    for split, dataset in held_out.items():
        report = run.task.evaluate(model, dataset, split, options)
        if run.process.is_main:
            write_scores(results, split, report["scores"], *run.task.results)
        run.say(f"{split}: {screen(report['scores'])}")
        notes |= dict.fromkeys(report.get("notes", []))
    run.say("\n".join([*notes, f"wrote {results}"]))
