"""The state of a training run: built, saved, and resumed to the bit."""

import argparse
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from engine import checkpoints
from engine.digests import content_hash, data_digests, model_hash
from engine.loading import train_loader
from engine.plan import StepPlan, plan_steps
from engine.processes import barrier, gather_from_processes, seed_everything
from engine.reporter import Reporter
from engine.run import Run
from pruners.pruner import Pruner
from utils import UserError


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

    def begin(self, epoch: int) -> None:
        """Goes on to an epoch; nothing where the run is in it already."""
        if epoch > self.epoch:
            self.epoch, self.step_in_epoch = epoch, 0
            self.loss_sum, self.bad_images = 0.0, 0


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


def build_state(
    run: Run, model: nn.Module, dataset: Dataset, layer_id: dict[str, float] | None
) -> TrainState:
    """A state at step 0, from a model on its device with its initial weights."""
    flags, config, process = run.flags, run.config, run.process
    plan = plan_steps(flags, len(dataset), run.samples_per_step, config["max_epoch"])
    if hasattr(model, "check_batch"):  # a queue takes whole batches
        model.check_batch(run.samples_per_step)
    pruner = build_pruner(flags, model, plan, layer_id) if flags.final_threshold < 1 else None
    if process.is_main:
        averages = 3 * pruner.numel if pruner and flags.pruner_name == "PLATON" else 0
        checkpoints.check_disk_space(run.folder, model, averages, flags.keep_checkpoints)
    identity = {
        **run.identity(),
        "processes": process.world_size,
        "samples": len(dataset),
        **asdict(plan),
        **data_digests(config, dataset.records),
        "content of the starting weights": model_hash(model),
        "content of the ID profile": content_hash(layer_id),
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["init_lr"], weight_decay=config["weight_decay"], fused=True
    )
    if flags.compile:
        model.compile()
    engine = model
    if process.world_size > 1:
        on_cpu = process.device.type == "cpu"
        devices = None if on_cpu else [process.device.index]
        engine = DistributedDataParallel(
            model, devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
    loader = train_loader(config, dataset, flags.seed, process)
    return TrainState(model, engine, optimizer, pruner, plan, loader, identity)


def build_pruner(
    flags: argparse.Namespace, model: nn.Module, plan: StepPlan, layer_id: dict[str, float] | None
) -> Pruner:
    """The pruner that the flags describe. Raises `UserError` where schedule or IDs do not fit."""
    same = "beta1 beta2 initial_threshold final_threshold initial_warmup final_warmup".split()
    try:
        return Pruner(
            model,
            method=flags.pruner_name,
            total_steps=plan.total_steps,
            delta_t=flags.deltaT,
            warmup_steps=plan.warmup_steps,
            steps_per_epoch=plan.steps_per_epoch,
            layer_id=layer_id,
            **{name: getattr(flags, name) for name in same},
        )
    except UserError as error:  # which names arguments of Pruner
        sentence = re.sub(rf"\b({'|'.join(same)}|warmup_steps)\b", r"--\1", str(error))
        sentence = sentence.replace("delta_t", "--deltaT")
        raise UserError(sentence.replace("total_steps", "--max_steps, --max_epoch")) from None


def find_checkpoint(run: Run, identity: dict) -> dict | None:
    """Content and path of the checkpoint that --resume names; None to start at step 0."""
    if run.flags.resume == "off":
        return None
    if run.flags.resume != "auto":
        path = Path(run.flags.resume)
        content = checkpoints.read_checkpoint(path)
    elif found := checkpoints.load_newest(run.checkpoints):
        content, path, broken = found
        for sentence in broken:
            run.say(f"{sentence}; falling back to the one before")
    else:
        return None
    check_identity(content["identity"], identity, path)
    return {**content, "path": path}


def check_identity(saved: dict, own: dict, path: Path) -> None:
    """Refuses the checkpoint of another run; what an older version did not save is not compared."""
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


def resume(run: Run, state: TrainState, found: dict | None) -> None:
    """Puts what `find_checkpoint` found into a state at step 0: all that `save` wrote."""
    seed_everything(run.flags.seed + run.process.rank)  # each process draws its own dropout
    if found is not None:
        state.model.load_state_dict(found["model"])
        state.optimizer.load_state_dict(found["optimizer"])
        for averages in state.optimizer.state.values():
            for name, value in averages.items():
                averages[name] = value.clone()  # which so far lies in the checkpoint's mapped file
        if state.pruner:
            state.pruner.load_state_dict(found["pruner"])
        state.progress = Progress(**found["progress"])
        checkpoints.set_rng_state(found["rng"][run.process.rank], run.process.device)
        done, total = state.progress.step, state.plan.total_steps
        run.say(f"resumed from {found['path']}: {done} of {total} steps done")
    state.replaced = checkpoints.later_than(run.checkpoints, state.progress.step)


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
        step, keep = state.progress.step, run.flags.keep_checkpoints
        checkpoints.save_checkpoint(run.checkpoints, step, content, keep, state.replaced)
    barrier()
    if state.save_seconds == 0:
        run.say(f"a checkpoint takes {time.monotonic() - begun:.1f} s")
    state.saved_at = time.monotonic()
    state.save_seconds = state.saved_at - begun
