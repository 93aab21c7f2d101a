"""What both trainers share: flags, checks before the first step, the loop, resuming, reports.

A trainer calls `start`, builds its model and data sets, and then `train` with its own evaluation.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import checkpointing
from data import EvalSampler, TrainBatchSampler
from models import load_checkpoint, prunable_layers
from pruners import Pruner, plot_sparsity, sparsity_report
from pruners.profile import load_profile
from utils import (
    Process,
    atomic_write,
    barrier,
    init_distributed,
    load_config,
    seed_everything,
    write_json,
)

EXIT_STOPPED = 75  # sysexits.h, EX_TEMPFAIL: stopped by a signal, checkpoint saved, run again
LOG_STEPS = 50
PRUNED_FILE = "pruned.safetensors"
BEST_FILE = "pruned_best.safetensors"

# What a resumed run must have in common with the one that wrote the checkpoint.
_RESUME_CONFIG = (
    "vit med_config image_size pretrained prompt max_words augment init_lr min_lr weight_decay "
    "max_epoch".split()
)
_RESUME_FLAGS = (
    "seed amp pruner_name beta1 beta2 deltaT initial_threshold final_threshold initial_warmup "
    "final_warmup gradient_accumulation_steps useID id_profile".split()
)


# --- flags and start -----------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, config: str, warmups: tuple[int, int]) -> None:
    """Adds the flags of both trainers.

    Args:
        parser: gets them.
        config: default of --config.
        warmups: defaults of --initial_warmup and --final_warmup, in units of --warmup_steps.
    """
    run = parser.add_argument_group("the run")
    run.add_argument("--config", default=config, help="YAML file of the experiment")
    run.add_argument("--output_dir", default="output", help="results go to OUTPUT_DIR/MODEL_DIR")
    run.add_argument("--model_dir", default=Path(config).stem, help="folder of this run's results")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--seed", type=int, default=42)
    run.add_argument("--evaluate", action="store_true", help="no training: scores of val and test")
    run.add_argument("--pruned", help="with --evaluate: weights, or the folder of a run")
    run.add_argument("--resume", default="auto", help="auto (newest checkpoint), off, or a file")
    run.add_argument("--checkpoint_steps", type=int, default=0, help="besides each epoch; 0: none")
    run.add_argument("--keep_checkpoints", type=int, default=2)
    run.add_argument("--eval_epochs", type=int, default=1, help="validate every N epochs; 0: never")
    run.add_argument("--skip_bad_images", action="store_true", help="count them and go on")
    run.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto", help="auto: on GPU")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1, metavar="BATCHES")
    run.add_argument("--max_steps", type=int, help="optimizer steps, instead of max_epoch epochs")

    override = parser.add_argument_group("in place of the config's values")
    override.add_argument("--pretrained", help="weights to start from; '' starts from random ones")
    override.add_argument("--init_lr", type=float)
    override.add_argument("--max_epoch", type=int)
    override.add_argument("--batch_size", type=int, help="of one process in training")
    override.add_argument("--num_workers", type=int, help="image loading processes")

    prune = parser.add_argument_group("pruning")
    prune.add_argument("--pruner_name", choices=["PLATON", "Taylor", "Magnitude"], default="PLATON")
    prune.add_argument("--beta1", type=float, default=0.85, help="decay of the importance")
    prune.add_argument("--beta2", type=float, default=0.95, help="decay of the uncertainty")
    prune.add_argument("--deltaT", type=int, default=10, help="steps between mask events")
    prune.add_argument("--initial_threshold", type=float, default=1.0, help="remaining at first")
    prune.add_argument(
        "--final_threshold", type=float, default=0.2, help="remaining; 1: no pruning"
    )
    prune.add_argument("--warmup_steps", type=int, help="default: one epoch of the data")
    prune.add_argument("--initial_warmup", type=int, default=warmups[0], help="in warmup_steps")
    prune.add_argument("--final_warmup", type=int, default=warmups[1], help="in warmup_steps")
    prune.add_argument("--useID", action="store_true", help="weight scores by intrinsic dimension")
    prune.add_argument("--id_profile", help="profile for --useID, which this implies")

    ignored = parser.add_argument_group("accepted for compatibility; torchrun sets what they said")
    for flag in ("--n_gpu", "--world_size", "--dist_url", "--distributed"):
        ignored.add_argument(flag, nargs="?", help=argparse.SUPPRESS)


@dataclass
class Run:
    """What a trainer's functions need to know: flags, config, this process, the results folder."""

    args: argparse.Namespace
    config: dict
    process: Process
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def batch_size(self) -> int:
        """Training samples of one process at one forward pass."""
        return self.config.get("batch_size") or self.config["batch_size_train"]

    def say(self, message: str) -> None:
        """Prints on the main process only."""
        if self.process.is_main:
            print(message, flush=True)

    def autocast(self):
        """The context of a forward pass: bf16 on a GPU unless --amp says otherwise."""
        on_gpu = self.process.device.type == "cuda"
        wanted = self.args.amp == "bf16" or (self.args.amp == "auto" and on_gpu)
        return torch.autocast(self.process.device.type, torch.bfloat16, enabled=wanted)


def start(args: argparse.Namespace, task: str) -> Run:
    """Reads the config, joins the other processes, seeds, and makes the results folder.

    Args:
        args: flags of `add_flags`.
        task: "caption" or "nlvr".

    Raises:
        ValueError: a flag or the config is wrong.
    """
    batch_key = "batch_size" if task == "caption" else "batch_size_train"
    overrides = {key: getattr(args, key) for key in ("pretrained", "init_lr", "max_epoch")}
    overrides |= {batch_key: args.batch_size, "num_workers": args.num_workers}
    config = load_config(args.config, overrides, task)
    check_flags(args)
    args.useID = args.useID or args.id_profile is not None
    args.id_profile = (args.id_profile or config["id_profile"]) if args.useID else None
    run = Run(args, config, init_distributed(args.device), Path(args.output_dir, args.model_dir))
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {run.folder}: {error}; set --output_dir") from error
    if run.process.is_main:
        write_json(run.folder / "config.json", {"config": config, "flags": vars(args)})
    seed_everything(args.seed)
    return run


def check_flags(args: argparse.Namespace) -> None:
    """Checks the flags that nothing else checks.

    Raises:
        ValueError: naming the flag.
    """
    for flag, least in [
        ("gradient_accumulation_steps", 1),
        ("keep_checkpoints", 1),
        ("deltaT", 1),
        ("checkpoint_steps", 0),
        ("eval_epochs", 0),
    ]:
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    if args.pruned and not args.evaluate:
        raise ValueError("--pruned goes with --evaluate; training starts from --pretrained")
    if args.useID and args.final_threshold == 1:
        raise ValueError("--useID needs something to prune: set --final_threshold below 1")


def load_weights(run: Run, model: nn.Module) -> None:
    """Loads what --pruned or the config's `pretrained` names, and says what became of it.

    Raises:
        ValueError: it does not fit, or there is nothing to evaluate.
    """
    path = run.args.pruned or run.config["pretrained"]
    if path:
        report = load_checkpoint(model, path)
        run.say(str(report))
        if run.args.evaluate and report.initialised:
            raise ValueError(f"{path} is a start for training: it has no {report.initialised}")
    elif run.args.evaluate:
        raise ValueError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
    model.to(run.process.device)


def eval_loader(run: Run, dataset, batch_size: int) -> DataLoader:
    """Loads this process's share of a split, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EvalSampler(len(dataset), run.process.rank, run.process.world_size),
        **_loader_options(run),
    )


def _loader_options(run: Run) -> dict:
    workers = run.config["num_workers"]
    return {
        "num_workers": workers,
        "worker_init_fn": _ignore_signals if workers else None,
        "pin_memory": run.process.device.type == "cuda",
        # the loader draws its workers' base seed from here and not from the generator of dropout
        "generator": torch.Generator().manual_seed(run.args.seed),
    }


def _ignore_signals(worker: int) -> None:
    """A stop is the trainer's to handle; it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The run's length, in optimizer steps."""

    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int


def plan_steps(args: argparse.Namespace, samples: int, global_batch: int, max_epoch: int) -> Plan:
    """Counts the optimizer steps and checks that the pruning schedule fits into them.

    Args:
        args: `max_steps`, `gradient_accumulation_steps` and the schedule's flags.
        samples: in the training set.
        global_batch: samples of one forward pass over all processes.
        max_epoch: epochs, unless `max_steps` is set.

    Raises:
        ValueError: an epoch has no step, or the warm-ups leave no step to prune in.
    """
    per_step = global_batch * args.gradient_accumulation_steps
    steps_per_epoch = samples // per_step
    if steps_per_epoch < 1:
        raise ValueError(
            f"an optimizer step takes {per_step} samples (batch size x processes x accumulation), "
            f"but the training set has {samples}: lower one of them"
        )
    total = args.max_steps or max_epoch * steps_per_epoch
    warmup = steps_per_epoch if args.warmup_steps is None else args.warmup_steps
    outside = (args.initial_warmup + args.final_warmup) * warmup
    if args.final_threshold < 1 and outside >= total:
        raise ValueError(
            f"the pruning schedule is longer than the run: ({args.initial_warmup} initial + "
            f"{args.final_warmup} final) x {warmup} warm-up steps = {outside}, but the run has "
            f"{total} steps ({steps_per_epoch} an epoch): lower --warmup_steps or train longer"
        )
    return Plan(steps_per_epoch, math.ceil(total / steps_per_epoch), total, warmup)


def learning_rate(epoch: int, epochs: int, init_lr: float, min_lr: float) -> float:
    """Cosine from `init_lr` at epoch 0 towards `min_lr` at epoch `epochs`, constant in an epoch."""
    return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


# --- state ---------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where the run is. `step_in_epoch` steps of `epoch` are done, `step` steps in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    remaining_ratio: float = 1.0
    loss_sum: float = 0.0  # of this epoch's steps
    history: list[dict] = field(default_factory=list)  # one record an epoch, as in log.txt


@dataclass
class TrainState:
    """Everything that a training step reads or changes."""

    model: nn.Module  # plain
    engine: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    plan: Plan
    progress: Progress
    identity: dict  # what a resumed run must have in common
    unread_losses: list[torch.Tensor] = field(default_factory=list)  # of the last steps, on device


def build_state(run: Run, model: nn.Module, samples: int) -> TrainState:
    """Optimizer, pruner and data-parallel wrapper for a model that is on its device.

    Args:
        run: of `start`.
        model: with its initial weights.
        samples: in the training set.

    Raises:
        ValueError: the schedule, the ID profile or the disk space does not fit.
    """
    args, config, process = run.args, run.config, run.process
    plan = plan_steps(args, samples, run.batch_size * process.world_size, config["max_epoch"])
    pruner = None
    if args.final_threshold < 1:
        pruner = Pruner(
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
            layer_id=load_profile(args.id_profile) if args.useID else None,
        )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["init_lr"], weight_decay=config["weight_decay"], fused=True
    )
    if process.is_main:
        prunable = sum(p.numel() for m in prunable_layers(model).values() for p in m.parameters())
        averages = 3 if args.pruner_name == "PLATON" else 0
        checkpointing.check_disk_space(
            run.checkpoints, model, averages * prunable if pruner else 0, args.keep_checkpoints
        )
    if args.compile:
        model.compile()
    engine = model
    if process.world_size > 1:
        on_gpu = process.device.type == "cuda"
        engine = DistributedDataParallel(
            model,
            device_ids=[process.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
    identity = {key: config[key] for key in _RESUME_CONFIG if key in config}
    identity |= {key: getattr(args, key) for key in _RESUME_FLAGS}
    identity |= {"batch_size": run.batch_size, "processes": process.world_size, "samples": samples}
    identity |= asdict(plan)
    return TrainState(model, engine, optimizer, pruner, plan, Progress(), identity)


def save(run: Run, state: TrainState) -> None:
    """Writes a checkpoint; every process calls it, for each has its own random state."""
    rng = [checkpointing.rng_state()]
    if run.process.world_size > 1:
        rng = [None] * run.process.world_size
        dist.all_gather_object(rng, checkpointing.rng_state())
    if run.process.is_main:
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "pruner": state.pruner.state_dict() if state.pruner else None,
            "progress": asdict(state.progress),
            "identity": state.identity,
            "rng": rng,
        }
        checkpointing.save_checkpoint(
            run.checkpoints, state.progress.step, content, run.args.keep_checkpoints
        )
    barrier()


def resume(run: Run, state: TrainState) -> None:
    """Continues from a checkpoint if --resume finds one: weights, averages, position, randomness.

    Raises:
        ValueError: no checkpoint is whole, or it is of another run.
    """
    if run.args.resume == "off":
        return
    if run.args.resume == "auto":
        found = checkpointing.load_newest(run.checkpoints)
        if found is None:
            return
        content, path, broken = found
        for sentence in broken:
            run.say(f"{sentence}; falling back to the one before")
    else:
        path = Path(run.args.resume)
        content = checkpointing.load_checkpoint_file(path)
    differences = [
        f"{key} {content['identity'].get(key)!r} -> {value!r}"
        for key, value in state.identity.items()
        if content["identity"].get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{path} is of another run: {', '.join(differences)}. Use the same settings, another "
            "--model_dir, or --resume off to start again"
        )
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    if state.pruner:
        state.pruner.load_state_dict(content["pruner"])
    state.progress = Progress(**content["progress"])
    checkpointing.set_rng_state(content["rng"][run.process.rank])
    run.say(f"resumed from {path}: {state.progress.step} of {state.plan.total_steps} steps done")


# --- the loop ------------------------------------------------------------------------------------


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that the loop asks after each step."""

    def __init__(self):
        """Not requested."""
        self.requested = False

    @contextmanager
    def listening(self):
        """Catches the signals inside the block."""

        def request(number, frame):
            self.requested = True

        before = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(
    run: Run,
    model: nn.Module,
    dataset,
    validate: Callable[[], dict[str, float]],
    best_by: str,
    model_inputs: Callable[[tuple], tuple] = tuple,
) -> None:
    """Trains and prunes, from the newest checkpoint if there is one, to the end.

    Args:
        run: of `start`.
        model: on its device. `model(*inputs)` is the mean loss of a batch over
            `model.loss_terms(*inputs)` terms.
        dataset: training set, indexed by (index, epoch).
        validate: called by every process at the end of epochs; its numbers go to log.txt.
        best_by: the number of `validate` (the higher the better) that chooses the weights of
            `pruned_best.safetensors` among the epochs at the final remaining ratio.
        model_inputs: what of a batch the model takes.

    Raises:
        ValueError: a check before the first step failed.
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT and a checkpoint.
    """
    args, process = run.args, run.process
    state = build_state(run, model, len(dataset))
    sampler = TrainBatchSampler(
        len(dataset), run.batch_size, args.seed, process.rank, process.world_size
    )
    dataset.skip_bad_images = args.skip_bad_images
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        persistent_workers=run.config["num_workers"] > 0,
        **_loader_options(run),
    )
    if process.is_main:
        checkpointing.remove_unfinished(run.checkpoints)
    seed_everything(args.seed + process.rank)  # each process has its own dropout
    resume(run, state)
    reporter = Reporter(run, state)
    for epoch in range(state.progress.epoch, state.plan.epochs):
        if epoch > state.progress.epoch:
            state.progress.epoch, state.progress.step_in_epoch = epoch, 0
            state.progress.loss_sum = 0.0
        sampler.set_epoch(epoch, state.progress.step_in_epoch * args.gradient_accumulation_steps)
        train_one_epoch(run, state, loader, model_inputs, reporter)
        finish_epoch(run, state, validate, best_by, reporter, int(dataset.bad_images))
    reporter.close()


def train_one_epoch(
    run: Run, state: TrainState, loader: DataLoader, model_inputs: Callable, reporter: "Reporter"
) -> None:
    """Takes the epoch's remaining steps, and a checkpoint at its end.

    Raises:
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT and a checkpoint.
    """
    args, plan, progress = run.args, state.plan, state.progress
    steps = min(plan.steps_per_epoch, plan.total_steps - progress.epoch * plan.steps_per_epoch)
    if progress.step_in_epoch == steps:  # resumed between the last step and its evaluation
        return
    lr = learning_rate(progress.epoch, plan.epochs, run.config["init_lr"], run.config["min_lr"])
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.engine.train()
    batches = iter(loader)
    with StopRequest().listening() as stop:
        while progress.step_in_epoch < steps:
            parts = [
                move(model_inputs(next(batches)), run.process.device)
                for _ in range(args.gradient_accumulation_steps)
            ]
            must_stop = train_step(run, state, parts, stop)
            at_end = progress.step_in_epoch == steps
            save_now = (
                at_end
                or must_stop
                or (args.checkpoint_steps and progress.step % args.checkpoint_steps == 0)
            )
            if save_now or progress.step % LOG_STEPS == 0:
                reporter.step(lr)
            if save_now:
                save(run, state)
            if must_stop and not at_end:
                run.say(f"stopped by a signal after step {progress.step}; run again to go on")
                raise SystemExit(EXIT_STOPPED)


def train_step(run: Run, state: TrainState, parts: list[tuple], stop: StopRequest) -> bool:
    """One optimizer step: gradients of all parts and processes, AdamW, pruner.

    The loss is the mean over all terms (predicted tokens, statements) of the step, whatever parts
    and processes they are spread over; a mean of means would depend on the spread.

    Args:
        run: of `start`.
        state: changed in place.
        parts: inputs of the model, one forward pass each.
        stop: asked before the step, so that all processes agree on the last one.

    Returns:
        Whether a process was told to stop.
    """
    terms = [state.model.loss_terms(*part) for part in parts]
    all_terms, votes = sum_over_processes(run, [sum(terms), stop.requested])
    loss = torch.zeros((), device=run.process.device)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        quiet = nullcontext() if last or state.engine is state.model else state.engine.no_sync()
        with quiet:
            with run.autocast():
                # data parallelism divides gradients by the number of processes
                weight = terms[i] * run.process.world_size / all_terms
                part_loss = state.engine(*part) * weight
            part_loss.backward()
        loss += part_loss.detach()
    state.optimizer.step()
    progress = state.progress
    progress.step += 1
    progress.step_in_epoch += 1
    if state.pruner:
        progress.remaining_ratio, _ = state.pruner.step(progress.step)
    state.optimizer.zero_grad()
    state.unread_losses.append(loss)
    return votes > 0


def sum_over_processes(run: Run, numbers: list[float]) -> list[float]:
    """Sums host numbers over all processes, without waiting for a GPU.

    It also notices at every step when another process has died: its connection is closed.
    """
    if run.process.world_size == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def move(inputs: tuple, device: torch.device) -> tuple:
    """The same inputs with tensors on the device; a copy from pinned memory does not wait."""
    return tuple(
        x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in inputs
    )


def finish_epoch(
    run: Run,
    state: TrainState,
    validate: Callable[[], dict[str, float]],
    best_by: str,
    reporter: "Reporter",
    bad_images: int,
) -> None:
    """Writes weights, sparsity and the epoch's line of log.txt; validates."""
    args, progress = run.args, state.progress
    if run.process.is_main:
        checkpointing.save_weights(state.model, run.folder / PRUNED_FILE)
    sparsity = reporter.sparsity()
    last = progress.step == state.plan.total_steps
    wanted = args.eval_epochs and ((progress.epoch + 1) % args.eval_epochs == 0 or last)
    scores = {}
    if wanted:
        state.model.eval()
        scores = validate()
    (skipped,) = sum_over_processes(run, [bad_images])
    record = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss": progress.loss_sum / progress.step_in_epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "remaining_ratio": progress.remaining_ratio,
        "sparsity": sparsity["overall"],
        "sparsity_by_modality": sparsity["modality"],
        **({"bad_images": int(skipped)} if args.skip_bad_images else {}),
        **scores,
    }
    final_ratio = progress.remaining_ratio <= args.final_threshold
    rivals = [r[best_by] for r in progress.history if r.get("at_final_ratio") and best_by in r]
    if best_by in scores and final_ratio:
        record["at_final_ratio"] = True
        if run.process.is_main and scores[best_by] > max(rivals, default=-math.inf):
            checkpointing.save_weights(state.model, run.folder / BEST_FILE)
    progress.history = [*progress.history, record]
    reporter.epoch(record)


# --- reports -------------------------------------------------------------------------------------


class Reporter:
    """Tells people how the run goes: a progress line, TensorBoard, log.txt. Only rank 0 speaks."""

    def __init__(self, run: Run, state: TrainState):
        """Starts the clock.

        Args:
            run: of `start`.
            state: of `build_state`, after `resume`.
        """
        self.run, self.state = run, state
        self.started, self.first_step = time.monotonic(), state.progress.step
        self.board = None
        if run.process.is_main:
            self.board = SummaryWriter(
                str(run.folder / "tensorboard"), purge_step=state.progress.step + 1
            )

    def step(self, lr: float) -> None:
        """Reads the losses since the last call, checks them, and prints the progress line.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        run, state, progress = self.run, self.state, self.state.progress
        losses = torch.stack(state.unread_losses).double().cpu()
        state.unread_losses.clear()
        if run.process.world_size > 1:
            dist.all_reduce(losses)
            losses /= run.process.world_size
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the loss of step {progress.step - len(losses) + 1 + first} is {losses[first]}"
            )
        progress.loss_sum += float(losses.sum())
        if not run.process.is_main:
            return
        seconds = time.monotonic() - self.started
        rate = (progress.step - self.first_step) / seconds
        samples = run.batch_size * run.process.world_size * run.args.gradient_accumulation_steps
        left = time.strftime(
            "%H:%M:%S", time.gmtime((state.plan.total_steps - progress.step) / rate)
        )
        loss = float(losses.mean())
        run.say(
            f"epoch {progress.epoch}  step {progress.step}/{state.plan.total_steps}  "
            f"loss {loss:.4f}  lr {lr:.2e}  remaining {progress.remaining_ratio:.3f}  "
            f"{rate * samples:.1f} samples/s  ETA {left}  memory {memory_gb(run):.2f} GB"
        )
        scalars = {"loss": loss, "lr": lr, "remaining_ratio": progress.remaining_ratio}
        for name, value in scalars.items():
            self.board.add_scalar(f"train/{name}", value, progress.step)

    def sparsity(self) -> dict:
        """Counts the zeros, writes them as sparsity.json and as a figure, and returns them."""
        report = sparsity_report(prunable_layers(self.state.model))
        if self.run.process.is_main:
            write_json(self.run.folder / "sparsity.json", report)
            plot_sparsity(report, self.run.folder / "sparsity.png")
            step = self.state.progress.step
            self.board.add_scalar("sparsity/overall", report["overall"], step)
            for name, value in report["modality"].items():
                self.board.add_scalar(f"sparsity/{name}", value, step)
        return report

    def epoch(self, record: dict) -> None:
        """Rewrites log.txt, one JSON line an epoch, so that a resumed epoch has one line too."""
        if not self.run.process.is_main:
            return
        with atomic_write(self.run.folder / "log.txt") as file:
            file.writelines(json.dumps(r) + "\n" for r in self.state.progress.history)
        self.run.say(json.dumps(record))
        self.board.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self.board:
            self.board.close()


def memory_gb(run: Run) -> float:
    """Peak memory of this process so far: of the GPU, or resident on the CPU."""
    if run.process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.process.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs a script's `main`; a user's mistake ends it with one sentence instead of a traceback.

    Exit codes: 0 done, 1 failed, 2 a user's mistake, EXIT_STOPPED (75) stopped by a signal with a
    checkpoint to resume from.
    """
    try:
        main(args)
    except (ValueError, FileNotFoundError) as error:
        project = Path(__file__).parent
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if project not in raised_in.parents:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
