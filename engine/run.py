"""A run: an experiment in one of its processes, and the checks of all that it needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from dimension.profile import load_profile
from engine.experiment import Experiment
from engine.processes import (
    Process,
    computes_bf16,
    init_distributed,
    keep_freed_memory,
    main_process_first,
    seed_everything,
)
from models.checkpoint import load_checkpoint, load_trained
from models.weight_files import fetch
from reports.runs import CHECKPOINTS
from utils import UserError

LOOKED_AT = 5000  # training texts whose length is counted, at most


@dataclass(frozen=True)
class Run(Experiment):
    """An experiment in one of its processes.

    Attributes:
        process: this one of the run's processes.
        bf16: whether products are computed in bfloat16 autocast.
    """

    process: Process
    bf16: bool

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def samples_per_step(self) -> int:
        """Training samples of all processes and accumulated batches at one optimizer step."""
        batches = self.process.world_size * self.flags.gradient_accumulation_steps
        return self.config["batch_size"] * batches

    def say(self, message: str) -> None:
        """Prints on the main process only."""
        if self.process.is_main:
            print(message, flush=True)


def start(experiment: Experiment) -> Run:
    """Joins the other processes and seeds."""
    flags = experiment.flags
    process = init_distributed("cpu" if flags.sparse else flags.device)
    keep_freed_memory(process.device)
    seed_everything(flags.seed)
    bf16 = flags.amp == "bf16" or (flags.amp == "auto" and computes_bf16(process.device))
    return Run(**vars(experiment), process=process, bf16=bf16)


def prepare(run: Run) -> tuple[nn.Module, Dataset, dict[str, Dataset], dict[str, float] | None]:
    """Builds and checks data, weights and the ID profile. Writes nothing.

    Returns:
        The model with its weights on its device, the training set, the held-out sets by name (with
        --split, this one alone), and the IDs by layer name that weight scores, if any do.
    """
    flags, task = run.flags, run.task
    mistakes, sets, model, weights, layer_id = [], [], None, None, None
    with collected(mistakes):
        sets = task.build_datasets(run.config, flags.seed)
        sets[0].skip_bad_images = flags.skip_bad_images  # evaluation needs every image
        for dataset in sets[1:] if flags.eval_samples else ():
            dataset.keep_first(flags.eval_samples)
    held_out = dict(zip(task.held_out, sets[1:], strict=bool(sets)))
    if flags.split and held_out:
        held_out = {flags.split: held_out[flags.split]}
    for dataset in (*held_out.values(), *sets[: not flags.evaluate]):
        with collected(mistakes):
            dataset.check()
    with collected(mistakes):
        model = task.build_model(run.config)
    with collected(mistakes):
        layer_id = load_profile(run.id_profile) if run.id_profile else None
    with collected(mistakes):
        weights = find_weights(run)
    with collected(mistakes):
        if model is not None and weights is not None:
            load = load_trained if flags.evaluate else load_checkpoint
            run.say(str(load(model, weights)))
    if mistakes:
        raise UserError("\n       ".join(dict.fromkeys(mistakes)))
    device = run.process.device
    run.say(f"computes on {device} in {'bfloat16 autocast' if run.bf16 else 'float32'}")
    if not flags.evaluate and run.process.is_main:
        say_truncated(model, sets[0])
    return model.to(device), sets[0], held_out, layer_id


@contextmanager
def collected(mistakes: list[str]) -> Iterator[None]:
    """Keeps the sentence of a UserError that ends the block, so that all are named at once."""
    try:
        yield
    except UserError as error:
        mistakes.append(str(error))


def find_weights(run: Run) -> Path | None:
    """What --pruned or the config's `pretrained` names, downloaded if it is an address.

    All processes call it; afterwards no process needs to wait for another to have the file.
    """
    named = run.flags.pruned or run.config["pretrained"]
    if named:
        with main_process_first():
            return fetch(named)
    if run.flags.evaluate:
        raise UserError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
    return None


def say_truncated(model: nn.Module, dataset: Dataset) -> None:
    """Prints how many training texts the model cuts; of very many, a sample is counted."""
    indices = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    if cut := model.count_cut([dataset.text(index) for index in indices]):
        sample = "looked at " if len(indices) < len(dataset) else ""
        print(
            f"{cut} of {len(indices)} training texts {sample}are longer than max_tokens "
            f"{model.max_tokens} and are cut",
            flush=True,
        )
