"""The state of a training run: built, saved, and resumed to the bit."""

import hashlib
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from configs import read_med_config
from engine import checkpoints
from engine.digests import model_hash
from engine.loading import train_loader
from engine.plan import StepPlan, plan_steps
from engine.processes import barrier, gather_from_processes, seed_everything
from engine.reporter import Reporter
from engine.run import Run
from models.clip import OPENAI_TOKENIZER
from models.text import vocabulary_file
from pruners.pruner import Pruner
from utils import UserError

TORCHRUN_GRACE = 30  # seconds; torchrun's --shutdown-timeout

# What a resumed run must have in common with the run that wrote the checkpoint.
_IDENTITY_CONFIG = (
    "vit clip queue_size momentum alpha image_size prompt max_words max_tokens "
    "augment init_lr min_lr weight_decay"
).split()
_IDENTITY_FLAGS = (
    "seed amp pruner_name beta1 beta2 deltaT initial_threshold final_threshold initial_warmup "
    "final_warmup gradient_accumulation_steps"
).split()


@dataclass
class Progress:
    """Where the run is: `step_in_epoch` steps of `epoch` are done, `step` steps in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    remaining_ratio: float = 1.0
    loss_sum: float = 0.0  # over this epoch's steps
    bad_images: int = 0  # samples that were skipped in this epoch, of all processes
    history: list[dict] = field(default_factory=list)  # of the finished epochs, as in log.txt


@dataclass
class TrainState:
    """Everything that a training step reads or changes."""

    model: nn.Module  # plain
    engine: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None  # None where nothing is to be pruned
    plan: StepPlan
    loader: DataLoader
    identity: dict  # what a resumed run must have in common
    progress: Progress = field(default_factory=Progress)
    unread_losses: list[torch.Tensor] = field(default_factory=list)  # of the last steps, on device
    replaced: list[Path] = field(default_factory=list)  # checkpoints that the next one replaces
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0  # that the last checkpoint took
    reporter: Reporter | None = None


def build_state(run: Run, model: nn.Module, dataset: Dataset) -> TrainState:
    """Plan, optimizer, pruner, loader and data-parallel wrapper, at step 0.

    Args:
        run: of `prepare_run`.
        model: on its device, with its initial weights.
        dataset: training set.

    Raises:
        UserError: the schedule, the ID profile or the disk space does not fit.
    """
    args, config, process = run.args, run.config, run.process
    plan = plan_steps(args, len(dataset), run.samples_per_step, config["max_epoch"])
    if hasattr(model, "check_batch"):  # a queue takes whole batches
        model.check_batch(config["batch_size"] * process.world_size)
    pruner = build_pruner(run, model, plan) if args.final_threshold < 1 else None
    if process.is_main:
        averages = 3 * pruner.numel if pruner and args.pruner_name == "PLATON" else 0
        checkpoints.check_disk_space(run.folder, model, averages, args.keep_checkpoints)
    identity = run_identity(run, model, dataset, plan)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["init_lr"], weight_decay=config["weight_decay"], fused=True
    )
    if args.compile:
        model.compile()
    engine = model
    if process.world_size > 1:
        on_cpu = process.device.type == "cpu"
        devices = None if on_cpu else [process.device.index]
        engine = DistributedDataParallel(
            model, devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
    loader = train_loader(run, dataset)
    return TrainState(model, engine, optimizer, pruner, plan, loader, identity)


def build_pruner(run: Run, model: nn.Module, plan: StepPlan) -> Pruner:
    """The pruner that the flags describe.

    Raises:
        UserError: the schedule does not fit the run, or the ID profile is not of this model.
    """
    args = run.args
    return Pruner(
        model,
        layers=None,
        method=args.pruner_name,
        total_steps=plan.total_steps,
        delta_t=args.deltaT,
        beta1=args.beta1,
        beta2=args.beta2,
        initial_threshold=args.initial_threshold,
        final_threshold=args.final_threshold,
        initial_warmup=args.initial_warmup,
        final_warmup=args.final_warmup,
        warmup_steps=plan.warmup_steps,
        steps_per_epoch=plan.steps_per_epoch,
        layer_id=run.layer_id,
    )


def run_identity(run: Run, model: nn.Module, dataset: Dataset, plan: StepPlan) -> dict:
    """All that the result depends on. Files count by their content, not by their names."""
    identity = {key: run.config[key] for key in _IDENTITY_CONFIG if key in run.config}
    identity |= {key: getattr(run.args, key) for key in _IDENTITY_FLAGS}
    identity |= {
        "batch_size": run.config["batch_size"],
        "processes": run.process.world_size,
        "samples": len(dataset),
        **asdict(plan),
        "content of the starting weights": model_hash(model),
        "content of the tokenizer": vocabulary_hash(run.config["tokenizer"]),
        "content of the training annotation": content_hash(dataset.records),
        "content of the ID profile": content_hash(run.layer_id),
    }
    if "med_config" in run.config:
        fields = read_med_config(run.config["med_config"])
        identity["content of med_config"] = content_hash(sorted(fields.items()))
    return identity


def vocabulary_hash(tokenizer: str) -> str:
    """SHA-256 of a tokenizer's vocabulary; CLIP's own, which comes with its library, by name."""
    if tokenizer == OPENAI_TOKENIZER:
        return tokenizer
    return content_hash(vocabulary_file(tokenizer).read_bytes())


def content_hash(content) -> str:
    """SHA-256 of plain values, so that equal contents have equal hashes whatever their files."""
    digest = hashlib.sha256()
    for part in content if isinstance(content, list) else [content]:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def save(run: Run, state: TrainState) -> None:
    """Writes a checkpoint. Every process calls it, for each has a random state of its own."""
    begun = time.monotonic()
    if state.pruner:
        state.pruner.check_masks_equal()
    rng = gather_from_processes(checkpoints.rng_state(run.process.device))
    if run.process.is_main:
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "pruner": state.pruner.state_dict() if state.pruner else None,
            "progress": asdict(state.progress),
            "identity": state.identity,
            "rng": rng,
        }
        keep = run.args.keep_checkpoints
        checkpoints.save_checkpoint(
            run.checkpoints, state.progress.step, content, keep, state.replaced
        )
    barrier()
    first = state.save_seconds == 0
    state.saved_at = time.monotonic()
    state.save_seconds = state.saved_at - begun
    if first:
        run.say(f"a checkpoint takes {state.save_seconds:.1f} s{grace_hint(state.save_seconds)}")


def grace_hint(save_seconds: float) -> str:
    """What to set where a checkpoint takes too much of the time that a stopped job is given.

    A stop waits for the step and then for the checkpoint. Torchrun passes SIGTERM on and kills what
    still lives `TORCHRUN_GRACE` seconds later.
    """
    if save_seconds < TORCHRUN_GRACE / 3:
        return ""
    return (
        f": a stop needs that and a step. Under torchrun set --shutdown-timeout "
        f"{math.ceil(3 * save_seconds)} (it is {TORCHRUN_GRACE}), and give the job as long between "
        "SIGTERM and SIGKILL"
    )


def resume(run: Run, state: TrainState) -> None:
    """Continues from a checkpoint, if --resume finds one: everything that `save` wrote.

    Raises:
        UserError: no checkpoint is whole, or it is of another run.
    """
    seed_everything(run.args.seed + run.process.rank)  # each process draws its own dropout
    if run.process.is_main:
        checkpoints.remove_unfinished(run.checkpoints)
    found = find_checkpoint(run)
    if found is not None:
        content, path = found
        check_identity(content["identity"], state.identity, path)
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        for averages in state.optimizer.state.values():
            for name, value in averages.items():
                averages[name] = value.clone()  # which so far lies in the checkpoint's mapped file
        if state.pruner:
            state.pruner.load_state_dict(content["pruner"])
        state.progress = Progress(**content["progress"])
        checkpoints.set_rng_state(content["rng"][run.process.rank], run.process.device)
        done, total = state.progress.step, state.plan.total_steps
        run.say(f"resumed from {path}: {done} of {total} steps done")
    state.replaced = checkpoints.later_than(run.checkpoints, state.progress.step)


def find_checkpoint(run: Run) -> tuple[dict, Path] | None:
    """What --resume names: a checkpoint's content and its path; None to start at step 0."""
    if run.args.resume == "off":
        return None
    if run.args.resume != "auto":
        path = Path(run.args.resume)
        return checkpoints.read_checkpoint(path), path
    found = checkpoints.load_newest(run.checkpoints)
    if found is None:
        return None
    content, path, broken = found
    for sentence in broken:
        run.say(f"{sentence}; falling back to the one before")
    return content, path


def check_identity(saved: dict, own: dict, path: Path) -> None:
    """Refuses the checkpoint of another run.

    Args:
        saved: identity in the checkpoint; what an older version did not save is not compared.
        own: of this run.
        path: of the checkpoint.

    Raises:
        UserError: names every difference.
    """
    differences = [
        f"the {key} differs"
        if key.startswith("content")
        else f"{key} was {saved[key]!r}, is {value!r}"
        for key, value in own.items()
        if key in saved and saved[key] != value
    ]
    if differences:
        raise UserError(
            f"{path} is of another run: {'; '.join(differences)}. Use the same settings, another "
            "--model_dir, or --resume off to start again"
        )
