"""The training loop of both trainers: plan, state, steps, checkpoints, resuming.

A trainer gets its run from `launching.prepare` and calls `train` with its own evaluation. All
steps are optimizer steps.
"""

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dimension.profile import load_profile
from engine import checkpoints as checkpointing
from engine.reporter import Reporter
from engine.run import Run, move, sum_over_processes, train_loader
from models import prunable_layers
from pruners import Pruner, sparsity_report
from utils import UserError, barrier, seed_everything

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, run again to go on
LOG_SECONDS = 10.0  # between progress lines
PRUNED_FILE = "pruned.safetensors"
BEST_FILE = "pruned_best.safetensors"

# What a resumed run must have in common with the run that wrote the checkpoint.
_RESUME_CONFIG = (
    "vit med_config image_size pretrained prompt max_words augment init_lr min_lr weight_decay"
).split()
_RESUME_FLAGS = (
    "seed amp pruner_name beta1 beta2 deltaT initial_threshold final_threshold initial_warmup "
    "final_warmup gradient_accumulation_steps id_profile"
).split()


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The run's length, in optimizer steps."""

    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int


def plan_steps(
    args: argparse.Namespace, samples: int, samples_per_step: int, max_epoch: int
) -> Plan:
    """Counts the steps and checks that the pruning schedule fits into them.

    Args:
        args: `max_steps` and the schedule's flags.
        samples: in the training set.
        samples_per_step: over all processes and accumulated batches.
        max_epoch: epochs, unless `max_steps` is set.

    Raises:
        ValueError: an epoch has no step, or the warm-ups leave no step to prune in.
    """
    steps_per_epoch = samples // samples_per_step
    if steps_per_epoch < 1:
        raise UserError(
            f"an optimizer step takes {samples_per_step} samples (batch size x processes x "
            f"accumulation), but the training set has {samples}: lower one of them"
        )
    total = args.max_steps or max_epoch * steps_per_epoch
    warmup = steps_per_epoch if args.warmup_steps is None else args.warmup_steps
    outside = (args.initial_warmup + args.final_warmup) * warmup
    if args.final_threshold < 1 and outside >= total:
        raise UserError(
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
    """Where the run is: `step_in_epoch` steps of `epoch` are done, `step` steps in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    remaining_ratio: float = 1.0
    loss_sum: float = 0.0  # over this epoch's steps
    history: list[dict] = field(default_factory=list)  # of the finished epochs, as in log.txt


@dataclass
class TrainState:
    """Everything that a training step reads or changes."""

    model: nn.Module  # plain
    engine: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None  # None where nothing is to be pruned
    plan: Plan
    identity: dict  # what a resumed run must have in common
    progress: Progress = field(default_factory=Progress)
    unread_losses: list[torch.Tensor] = field(default_factory=list)  # of the last steps, on device


def build_state(run: Run, model: nn.Module, samples: int) -> TrainState:
    """Plan, optimizer, pruner and data-parallel wrapper of a model that is on its device.

    Args:
        run: of `launching.prepare`.
        model: with its initial weights.
        samples: in the training set.

    Raises:
        ValueError: the schedule, the ID profile or the disk space does not fit.
    """
    args, config, process = run.args, run.config, run.process
    plan = plan_steps(args, samples, run.samples_per_step, config["max_epoch"])
    pruner = build_pruner(args, model, plan) if args.final_threshold < 1 else None
    if process.is_main:
        prunable = sum(p.numel() for m in prunable_layers(model).values() for p in m.parameters())
        averages = 3 * prunable if pruner and args.pruner_name == "PLATON" else 0
        checkpointing.check_disk_space(run.folder, model, averages, args.keep_checkpoints)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["init_lr"], weight_decay=config["weight_decay"], fused=True
    )
    if args.compile:
        model.compile()
    engine = model
    if process.world_size > 1:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        engine = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    identity = {key: config[key] for key in _RESUME_CONFIG if key in config}
    identity |= {key: getattr(args, key) for key in _RESUME_FLAGS}
    identity |= {"batch_size": run.batch_size, "processes": process.world_size, "samples": samples}
    identity |= asdict(plan)
    return TrainState(model, engine, optimizer, pruner, plan, identity)


def build_pruner(args: argparse.Namespace, model: nn.Module, plan: Plan) -> Pruner:
    """The pruner that the flags describe.

    Raises:
        ValueError: the ID profile is not of this model.
    """
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
        layer_id=load_profile(args.id_profile) if args.id_profile else None,
    )


def save(run: Run, state: TrainState) -> None:
    """Writes a checkpoint. Every process calls it, for each has a random state of its own."""
    if state.pruner:
        state.pruner.check_masks_equal()
    rng = [checkpointing.rng_state()] * run.process.world_size
    if run.process.world_size > 1:
        dist.all_gather_object(rng, rng[0])
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
    """Continues from a checkpoint, if --resume finds one: everything that `save` wrote.

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
        content = checkpointing.read_checkpoint(path)
    differences = [
        f"{key} was {content['identity'].get(key)!r}, is {value!r}"
        for key, value in state.identity.items()
        if content["identity"].get(key) != value
    ]
    if differences:
        raise UserError(
            f"{path} is of another run: {'; '.join(differences)}. Use the same settings, another "
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


def train(
    run: Run,
    model: nn.Module,
    dataset: Dataset,
    validate: Callable[[], dict[str, float]],
    best_by: str,
    model_inputs: Callable[[tuple], tuple] = tuple,
) -> None:
    """Trains and prunes, from the newest checkpoint if there is one, to the end.

    Args:
        run: of `launching.prepare`.
        model: on its device. `model(*inputs)` is the mean loss of a batch over its
            `model.loss_terms(*inputs)` terms.
        dataset: training set, indexed by (index, epoch).
        validate: called by every process at the end of epochs; its numbers go to log.txt.
        best_by: the number of `validate` (the higher the better) that chooses the weights of
            `pruned_best.safetensors` among the epochs at the final remaining ratio.
        model_inputs: takes from a batch what the model takes.

    Raises:
        ValueError: a check before the first step failed.
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT: in an epoch with a checkpoint, in a
            validation at once, for the epoch's checkpoint is there.
    """
    args, process = run.args, run.process
    state = build_state(run, model, len(dataset))
    loader = train_loader(run, dataset)
    if process.is_main:
        checkpointing.remove_unfinished(run.checkpoints)
    seed_everything(args.seed + process.rank)  # each process draws its own dropout
    resume(run, state)
    progress = state.progress
    reporter = Reporter(run, state)
    with stop_signals_to(exit_stopped):
        for epoch in range(progress.epoch, state.plan.epochs):
            if epoch > progress.epoch:
                progress.epoch, progress.step_in_epoch, progress.loss_sum = epoch, 0, 0.0
            train_one_epoch(run, state, loader, model_inputs, reporter)
            finish_epoch(run, state, validate, best_by, reporter, int(dataset.bad_images))
    reporter.close()


def train_one_epoch(
    run: Run, state: TrainState, loader: DataLoader, model_inputs: Callable, reporter: Reporter
) -> None:
    """Takes the remaining steps of the epoch, with a checkpoint at its end.

    Raises:
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT and a checkpoint.
    """
    args, plan, progress, config = run.args, state.plan, state.progress, run.config
    steps = min(plan.steps_per_epoch, plan.total_steps - progress.epoch * plan.steps_per_epoch)
    if progress.step_in_epoch == steps:  # resumed between the last step and its validation
        return
    lr = learning_rate(progress.epoch, plan.epochs, config["init_lr"], config["min_lr"])
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    loader.batch_sampler.set_epoch(
        progress.epoch, progress.step_in_epoch * args.gradient_accumulation_steps
    )
    state.engine.train()
    with listen_for_stop() as stop:
        batches = iter(loader)  # here, for its processes start with these handlers of signals
        while progress.step_in_epoch < steps:
            parts = [
                move(model_inputs(next(batches)), run.process.device)
                for _ in range(args.gradient_accumulation_steps)
            ]
            terms = [state.model.loss_terms(*part) for part in parts]
            # what the processes must agree on travels in one message
            all_terms, stops, log = sum_over_processes(
                run, [sum(terms), stop.requested, reporter.is_due(LOG_SECONDS)]
            )
            weights = [n * run.process.world_size / all_terms for n in terms]
            try:
                train_step(run, state, parts, weights)
            except ValueError:  # of the pruner: scores that are not numbers
                read_losses(run, state, loader)  # tells why, if the loss was not finite
                raise
            at_end = progress.step_in_epoch == steps
            save_now = at_end or stops or is_multiple(progress.step, args.checkpoint_steps)
            if save_now or log:
                reporter.progress(read_losses(run, state, loader), lr)
            if save_now:
                save(run, state)
            if stops:
                run.say(f"stopped by a signal after step {progress.step}: run again to go on")
                raise SystemExit(EXIT_STOPPED)


def is_multiple(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, 0 being never, happens now."""
    return interval > 0 and step % interval == 0


def train_step(run: Run, state: TrainState, parts: list[tuple], weights: list[float]) -> None:
    """One optimizer step: gradients of all parts and processes, AdamW, pruner.

    The loss is the mean over all terms (predicted tokens, statements) of the step, so that it does
    not depend on how they are spread over parts and processes. (The original takes the mean of the
    processes' means.)

    Args:
        run: of `launching.prepare`.
        state: changed in place.
        parts: inputs of the model, one forward pass each.
        weights: of each part's mean loss: its share of all terms times the number of processes,
            by which data parallelism divides.
    """
    progress = state.progress
    loss = torch.zeros((), device=run.process.device)
    for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        last = i == len(parts) - 1
        plain = state.engine is state.model
        with nullcontext() if last or plain else state.engine.no_sync():
            with run.autocast():
                part_loss = state.engine(*part) * weight
            part_loss.backward()
        loss += part_loss.detach()
    state.unread_losses.append(loss)
    state.optimizer.step()
    progress.step += 1
    progress.step_in_epoch += 1
    if state.pruner:
        progress.remaining_ratio, _ = state.pruner.step(progress.step)
    state.optimizer.zero_grad()


def read_losses(run: Run, state: TrainState, loader: DataLoader) -> float:
    """Fetches the losses of the steps since the last call, which waits for the device.

    Returns:
        Their mean.

    Raises:
        FloatingPointError: one is not finite; names the step, its image files and the checkpoint.
    """
    own = torch.stack(state.unread_losses).double().cpu()  # (steps,)
    state.unread_losses.clear()
    losses = sum_over_processes(run, own.tolist())
    losses = [loss / run.process.world_size for loss in losses]
    for loss in losses:  # one by one, so that the sum does not depend on when it is read
        state.progress.loss_sum += loss
    if all(map(math.isfinite, losses)):
        return sum(losses) / len(losses)
    first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
    steps_ago = len(losses) - 1 - first
    files = [] if own[first].isfinite() else images_of_step(run, state, loader, steps_ago)
    if run.process.world_size > 1:
        gathered = [None] * run.process.world_size
        dist.all_gather_object(gathered, files)
        files = sum(gathered, [])
    saved = [str(path) for path in checkpointing.step_files(run.checkpoints)[:1]]
    raise FloatingPointError(
        f"the loss of step {state.progress.step - steps_ago} is {losses[first]}. "
        f"Images of the step: {', '.join(files)}. Last checkpoint: {(saved or ['none'])[0]}. "
        "Look at these images; a lower learning rate (--init_lr) or --amp off may help"
    )


def images_of_step(run: Run, state: TrainState, loader: DataLoader, steps_ago: int) -> list[str]:
    """The image files that this process read for a step, 0 being the one just taken."""
    parts = run.args.gradient_accumulation_steps
    first = (state.progress.step_in_epoch - 1 - steps_ago) * parts
    loader.batch_sampler.set_epoch(state.progress.epoch, first)
    batches = [batch for batch, _ in zip(loader.batch_sampler, range(parts), strict=False)]
    return [path for batch in batches for i, _ in batch for path in loader.dataset.image_paths(i)]


def finish_epoch(
    run: Run,
    state: TrainState,
    validate: Callable[[], dict[str, float]],
    best_by: str,
    reporter: Reporter,
    bad_images: int,
) -> None:
    """Writes weights, sparsity and the epoch's line of log.txt; validates."""
    args, progress = run.args, state.progress
    if run.process.is_main:
        checkpointing.save_weights(state.model, run.folder / PRUNED_FILE)
    sparsity = sparsity_report(prunable_layers(state.model))
    reporter.sparsity(sparsity)
    record = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss": progress.loss_sum / progress.step_in_epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "remaining_ratio": progress.remaining_ratio,
        "sparsity": sparsity["overall"],
        "sparsity_by_modality": sparsity["by_modality"],
    }
    if args.skip_bad_images:
        (record["bad_images"],) = map(int, sum_over_processes(run, [bad_images]))
    last = progress.step == state.plan.total_steps
    if args.eval_epochs and (last or is_multiple(progress.epoch + 1, args.eval_epochs)):
        state.model.eval()
        record |= validate()
        barrier()
    if run.process.is_main and is_best(record, progress.history, best_by, args.final_threshold):
        checkpointing.save_weights(state.model, run.folder / BEST_FILE)
    progress.history.append(record)
    reporter.epoch(progress.history)


def is_best(record: dict, history: list[dict], best_by: str, final_ratio: float) -> bool:
    """Whether an epoch's score is the best of those at the final remaining ratio.

    Epochs before are no rivals: of a run that prunes, the least pruned epoch scores best.
    """

    def score(epoch: dict) -> float:
        return (
            epoch.get(best_by, -math.inf) if epoch["remaining_ratio"] <= final_ratio else -math.inf
        )

    return score(record) > max(map(score, history), default=-math.inf)


# --- stopping ------------------------------------------------------------------------------------


@dataclass
class StopRequest:
    """Whether the process was told to stop."""

    requested: bool = False


@contextmanager
def stop_signals_to(handler: Callable) -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT call `handler(number, frame)`."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def exit_stopped(number: int, frame: FrameType | None) -> None:
    """A handler of signals: ends the process with EXIT_STOPPED."""
    raise SystemExit(EXIT_STOPPED)


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Inside the block SIGTERM and SIGINT are noted, and do not end the process.

    A signal that nobody acted on, for it came in an epoch's last step, does so at the end.

    Raises:
        SystemExit: with EXIT_STOPPED, at the end.
    """
    stop = StopRequest()

    def note(number, frame):
        stop.requested = True

    with stop_signals_to(note):
        yield stop
    if stop.requested:
        raise SystemExit(EXIT_STOPPED)
