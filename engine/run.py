"""From a command line to a run: processes, checked data, weights, results folder, exit codes."""

import argparse
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from dimension.profile import load_profile
from engine.flags import read_experiment, results_folder
from engine.processes import (
    Process,
    init_distributed,
    keep_freed_memory,
    main_process_first,
    seed_everything,
)
from models.checkpoint import load_checkpoint, load_trained
from models.layers import prunable_layers
from models.weight_files import fetch
from pruners.sparsity import sparsity_report
from reports.runs import CHECKPOINTS
from sparse.linear import sparsify_
from utils import UserError, available_cpus, write_json

LOOKED_AT = 5000  # training texts whose length is counted, at most


@dataclass
class Run:
    """What a trainer's functions need to know.

    Attributes:
        args: flags.
        task: record of the task.
        config: of `load_config`.
        process: this one of the run's processes.
        folder: of the results.
        id_profile: path of the profile that weights scores; "" weights none.
        layer_id: the profile, layer name to ID.
        weights: file or folder that the run starts from or evaluates; None for random ones.
    """

    args: argparse.Namespace
    task: "Task"
    config: dict
    process: Process
    folder: Path
    id_profile: str
    layer_id: dict[str, float] | None = None
    weights: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def samples_per_step(self) -> int:
        """Training samples of all processes and accumulated batches at one optimizer step."""
        batches = self.process.world_size * self.args.gradient_accumulation_steps
        return self.config["batch_size"] * batches

    @property
    def loading_processes(self) -> int:
        """How many load images for each loader: no more than this process may use CPUs."""
        return min(self.config["num_workers"], available_cpus())

    def say(self, message: str) -> None:
        """Prints on the main process only."""
        if self.process.is_main:
            print(message, flush=True)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: bf16 on an accelerator unless --amp says otherwise."""
        device = self.process.device.type
        wanted = self.args.amp == "bf16" or (self.args.amp == "auto" and device != "cpu")
        return torch.autocast(device, torch.bfloat16, enabled=wanted)


@dataclass(frozen=True)
class Task:
    """What sets one task apart from another.

    Attributes:
        name: a key of `configs.SCHEMAS`.
        script: that trains it.
        build_datasets: (config, seed) -> training set and two held-out sets.
        held_out: names of the two held-out splits; the first validates.
        build_model: config -> model with random weights. `model.prepare(*inputs)` turns a batch of
            the training set into the arguments of `model(...)`, which returns the mean loss, and
            counts the terms of that mean; `model.count_cut(texts)` counts the texts that are longer
            than `model.max_tokens`. Optional: `model.on_step(epochs, parts)`, called before the
            forward passes of an optimizer step, with the epochs that are done (whole and in part)
            and the arguments of those passes on this process; `model.check_batch(samples)`, called
            once before training, with the samples of a step in all processes.
        images: names of the model's image inputs, for profiling.
        evaluate: (run, model, held-out set, its name) -> report with "scores" (name to value), on
            the main process at least; all processes call it.
        best_by: the score, the higher the better, that chooses among the epochs' weights.
    """

    name: str
    script: str
    build_datasets: Callable[[dict, int], tuple[Dataset, Dataset, Dataset]]
    held_out: tuple[str, str]
    build_model: Callable[[dict], nn.Module]
    images: tuple[str, ...]
    evaluate: Callable[[Run, nn.Module, Dataset, str], dict]
    best_by: str


class Mistakes:
    """Collects users' mistakes, so that a command names all of them at once."""

    def __init__(self):
        """None yet."""
        self.sentences: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A `UserError` in the block is kept and ends the block."""
        try:
            yield
        except UserError as error:
            self.sentences.append(str(error))

    def raise_all(self) -> None:
        """Raises what was collected, a line each.

        Raises:
            UserError: there was a mistake.
        """
        if self.sentences:
            raise UserError("\n       ".join(dict.fromkeys(self.sentences)))


def prepare_run(
    args: argparse.Namespace, task: Task
) -> tuple[Run, nn.Module, Dataset, dict[str, Dataset]]:
    """From flags to a run, a model with its weights on its device, and checked data.

    Returns:
        The run, the model, the training set, and the held-out sets by name.

    Raises:
        UserError: flags, config, data or weights are wrong; names all that was found.
    """
    run = start(args, task)
    keep_freed_memory(run.process.device)
    mistakes = Mistakes()
    datasets, model = (), None
    with mistakes.collect():
        datasets = task.build_datasets(run.config, args.seed)
        datasets[0].skip_bad_images = args.skip_bad_images  # evaluation needs every image
    for dataset in datasets[1:] if args.evaluate else datasets:
        with mistakes.collect():
            dataset.check()
    with mistakes.collect():
        model = task.build_model(run.config)
    with mistakes.collect():
        run.layer_id = load_profile(run.id_profile) if run.id_profile else None
    with mistakes.collect():
        run.weights = find_weights(run)
    if model is not None and run.weights is not None:
        with mistakes.collect():
            load_weights(run, model)
    mistakes.raise_all()
    if hint := shared_memory_hint(run):
        run.say(hint)
    model.to(run.process.device)
    if not args.evaluate:
        say_truncated(run, model, datasets[0])
    if args.evaluate and run.process.is_main:
        write_json(run.folder / "sparsity.json", sparsity_report(prunable_layers(model)))
    if args.sparse:
        run.say(str(sparsify_(model)))
    train_set, *held_out = datasets
    return run, model, train_set, dict(zip(task.held_out, held_out, strict=True))


def shared_memory_hint(run: Run, folder: str = "/dev/shm") -> str | None:
    """What to say where loading processes may find too little shared memory for their batches.

    They hand batches over through it, two ahead each. Docker gives 64 MB unless told otherwise;
    a process that finds none left dies of a bus error.

    Args:
        run: of `start`.
        folder: where the system keeps shared memory.
    """
    config = run.config
    samples = config["eval_batch_size"]
    if not run.args.evaluate:
        samples = max(samples, config["batch_size"])
    image = 3 * config["image_size"] ** 2 * 4  # bytes, float32
    ahead = 2 * run.loading_processes * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # batches
    needed = ahead * samples * len(run.task.images) * image
    if not needed or not os.path.isdir(folder) or shutil.disk_usage(folder).free >= needed:
        return None
    free = shutil.disk_usage(folder).free
    return (
        f"hint: image loading processes may hold {needed / 1e9:.2g} GB of batches in {folder}, "
        f"where {free / 1e9:.2g} GB are free: if one dies of a bus error, enlarge it (docker run "
        "--shm-size) or lower --num_workers"
    )


def start(args: argparse.Namespace, task: Task) -> Run:
    """Reads the config, joins the other processes, seeds, and takes the results folder.

    Raises:
        UserError: a flag, the config or the folder is wrong.
    """
    config, id_profile = read_experiment(args, task.name)
    process = init_distributed("cpu" if args.sparse else args.device)
    run = Run(args, task, config, process, results_folder(args), id_profile)
    if process.is_main:
        take_folder(run.folder)
        if not args.check:
            name = "evaluation.json" if args.evaluate else "config.json"
            write_json(run.folder / name, {"config": config, "flags": vars(args)})
    seed_everything(args.seed)
    return run


def take_folder(folder: Path) -> None:
    """Makes a results folder and locks it until this process ends, however it ends.

    The lock is the process's own: loading processes do not inherit it, and a later run of the same
    process passes.

    Raises:
        UserError: the folder cannot be written, or another process that lives writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY, 0o666)  # closed by the system
    except OSError as error:
        why = error.strerror
        raise UserError(f"cannot write to {folder}: {why}; choose --output_dir") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
            raise UserError(
                f"another process is writing to {folder}: wait for it, or choose another "
                "--model_dir"
            ) from None


def say_truncated(run: Run, model: nn.Module, dataset: Dataset) -> None:
    """Says how many training texts the model cuts; of very many, a share is estimated."""
    if not run.process.is_main:
        return
    indices = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    cut = model.count_cut([dataset.text(index) for index in indices])
    if cut:
        run.say(
            f"{cut} of {len(indices)} training texts {'looked at ' * (len(indices) < len(dataset))}"
            f"are longer than max_tokens {model.max_tokens} and are cut"
        )


def find_weights(run: Run) -> Path | None:
    """What --pruned or the config's `pretrained` names, downloaded if it is an address.

    All processes call it; afterwards no process needs to wait for another to have the file.

    Raises:
        UserError: it is not there, or there is nothing to evaluate.
    """
    named = run.args.pruned or run.config["pretrained"]
    if not named:
        if run.args.evaluate:
            raise UserError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
        return None
    with main_process_first():
        return fetch(named)


def load_weights(run: Run, model: nn.Module) -> None:
    """Loads the run's weights, and says what became of them.

    Raises:
        UserError: they do not fit, or they are a start for training and not to be evaluated.
    """
    load = load_trained if run.args.evaluate else load_checkpoint
    run.say(str(load(model, run.weights)))
