"""The state of a training run: planned, built, saved, and resumed to the bit."""

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from data.samplers import derived_seed
from engine import checkpoints
from engine.digests import content_hash, data_digests, model_hash
from engine.experiment import Run
from engine.loading import train_loader
from engine.processes import barrier, gather_from_processes, seed_everything
from engine.reporter import Reporter
from pruners.pruner import Pruner
from reports.runs import LOG_FILE
from utils import UserError


@dataclass(frozen=True)
class StepPlan:
    """The run's length, in optimizer steps."""

    steps_per_epoch: int
    epochs: int
    total_steps: int  # which may end the last epoch early
    warmup_steps: int

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch, from 0."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)


def plan_steps(
    flags: argparse.Namespace, samples: int, samples_per_step: int, max_epoch: int
) -> StepPlan:
    """Counts the steps of all processes, accumulated batches being one; --max_steps goes first."""
    steps_per_epoch = samples // samples_per_step
    if steps_per_epoch < 1:
        raise UserError(
            f"an optimizer step takes {samples_per_step} samples (batch size x processes x "
            f"accumulation), but the training set has {samples}: lower one of them"
        )
    total = flags.max_steps or max_epoch * steps_per_epoch
    warmup = steps_per_epoch if flags.warmup_steps is None else flags.warmup_steps
    return StepPlan(steps_per_epoch, math.ceil(total / steps_per_epoch), total, warmup)


@dataclass
class Progress:
    """Where the run is: `step_in_epoch` steps of `epoch` are done, `step` steps in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    remaining_ratio: float = 1.0
    loss_sum: float = 0.0  # over this epoch's steps
    bad_images: int = 0  # samples that all processes skipped in this epoch
    history: list[dict] = field(default_factory=list)  # lines of log.txt, of the finished epochs


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
        checkpoints.check_disk_space(run.folder, model, pruner, max(1, flags.keep_checkpoints))
    identity = {
        **run.identity(),
        "samples of a step": run.samples_per_step,
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
        devices = None if process.device.type == "cpu" else [process.device.index]
        engine = DistributedDataParallel(
            model, devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
    loader = train_loader(config, dataset, flags.seed, process)
    return TrainState(model, engine, optimizer, pruner, plan, loader, identity)


def build_pruner(
    flags: argparse.Namespace, model: nn.Module, plan: StepPlan, layer_id: dict[str, float] | None
) -> Pruner:
    """The pruner that the flags describe, whose mistakes name flags and not arguments."""
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
    except UserError as error:
        sentence = re.sub(rf"\b({'|'.join(same)}|warmup_steps)\b", r"--\1", str(error))
        sentence = sentence.replace("delta_t", "--deltaT")
        raise UserError(sentence.replace("total_steps", "--max_steps, --max_epoch")) from None


def find_checkpoint(run: Run, identity: dict) -> dict | None:
    """Content and "path" of the checkpoint that --resume names; None to start at step 0.

    With "auto" a broken checkpoint gives way to the one before.
    """
    named = run.flags.resume
    if named == "off":
        return None
    paths = checkpoints.step_files(run.checkpoints) if named == "auto" else [Path(named)]
    if not paths:  # they may be removed after the end
        check_identity(finished_identity(run), identity, run.folder)
    for path in paths:
        try:
            content = checkpoints.read_checkpoint(path)
        except UserError as error:
            if named != "auto":
                raise
            if path == paths[-1]:
                raise UserError(f"{error}; --resume off starts again") from error
            run.say(f"{error}; falling back to the one before")
            continue
        check_identity(content["identity"], identity, path)
        return {**content, "path": path}
    return None


def finished_identity(run: Run) -> dict:
    """The identity of the run that ended in this folder; empty where none did."""
    record, log = run.folder / "config.json", run.folder / LOG_FILE
    saved = json.loads(record.read_text()).get("identity", {}) if record.exists() else {}
    last = log.read_text().splitlines()[-1:] if log.exists() else []
    ended = [json.loads(line)["step"] for line in last] == [saved.get("total_steps")]
    return saved if ended else {}


def check_identity(saved: dict, own: dict, path: Path) -> None:
    """Refuses the checkpoint of another run; what an older version did not save is not compared."""
    differences = [
        f"the {key} differs" if key[:7] == "content" else f"{key} was {saved[key]!r}, is {value!r}"
        for key, value in own.items()
        if key in saved and saved[key] != value
    ]
    if differences:
        raise UserError(
            f"{path} is of another run: {'; '.join(differences)}. Use the same settings, another "
            "--model_dir, or --resume off to start again"
        )


def resume(run: Run, state: TrainState, found: dict | None) -> None:
    """Puts what `find_checkpoint` found into a state at step 0."""
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
        done, total = state.progress.step, state.plan.total_steps
        run.say(f"resumed from {found['path']}: {done} of {total} steps done")
        before, now = len(found["rng"]), run.process.world_size
        if before == now:
            rng, device = found["rng"][run.process.rank], run.process.device
            torch.set_rng_state(rng["cpu"])
            if device.type != "cpu" and device.type in rng:  # else the run was on another kind
                torch.get_device_module(device).set_rng_state(rng[device.type], device)
        else:
            seed_everything(derived_seed(run.flags.seed, done, run.process.rank) % 2**32)
            run.say(
                f"{now} process(es) where there were {before}: the same samples in each step, but "
                "sums of another order, and other draws of dropout"
            )
    # which would pass for the newest of this run
    state.replaced = checkpoints.step_files(run.checkpoints, after=state.progress.step)


def save(run: Run, state: TrainState) -> None:
    """Writes a checkpoint. Every process calls it, because each has a random state of its own."""
    begun = time.monotonic()
    if state.pruner:
        state.pruner.check_masks_equal()
    device, rng = run.process.device, {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        rng[device.type] = torch.get_device_module(device).get_rng_state(device)
    rng = gather_from_processes(rng)
    if run.process.is_main:
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "pruner": state.pruner.state_dict() if state.pruner else None,
            "progress": asdict(state.progress),
            "identity": state.identity,
            "rng": rng,
        }
        step, keep = state.progress.step, max(1, run.flags.keep_checkpoints)
        checkpoints.save_checkpoint(run.checkpoints, step, content, keep, state.replaced)
        state.replaced.clear()
    barrier()
    if state.save_seconds == 0:
        run.say(f"a checkpoint takes {time.monotonic() - begun:.1f} s")
    state.saved_at = time.monotonic()
    state.save_seconds = state.saved_at - begun
