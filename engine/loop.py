"""The training loop: epochs, steps, and what happens between them."""

import json
import math
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import Dataset

from engine import checkpoints
from engine.loading import move, read
from engine.plan import learning_rate
from engine.processes import barrier, gather_from_processes, sum_over_processes
from engine.reporter import Reporter
from engine.run import Run
from engine.state import TrainState, build_state, resume, save
from engine.stopping import EXIT_STOPPED, exit_stopped, listen_for_stop, stop_signals_to
from models.layers import prunable_layers
from pruners.pruner import NonFiniteScores
from pruners.sparsity import off_target, sparsity_report
from reports.runs import LOG_FILE, PRUNED_FILE

LOG_SECONDS = 10.0  # between progress lines
CHECKPOINT_SECONDS = 600.0  # between checkpoints within an epoch, if they are cheap
CHEAP = 0.05  # share of the time that such checkpoints may take
BEST_FILE = "pruned_best.safetensors"


def train(run: Run, model: nn.Module, dataset: Dataset, held_out: dict[str, Dataset]) -> None:
    """Trains and prunes, from the newest checkpoint if there is one, to the end.

    Args:
        run: of `prepare_run`.
        model: on its device; see `run.Task.build_model`.
        dataset: training set, indexed by (index, epoch).
        held_out: by name. The first, and with --eval_test all, are scored at the end of epochs; the
            first one's score chooses the weights of `pruned_best.safetensors` among the epochs at
            the final remaining ratio.

    Raises:
        UserError: a check before the first step failed, or an image cannot be read.
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT: in an epoch with a checkpoint, in a
            validation at once, for the epoch's checkpoint is there.
    """
    state = build_state(run, model, dataset)
    if run.args.check:
        run.say(f"all is there: {state.plan.total_steps} steps in {state.plan.epochs} epochs")
        return
    resume(run, state)
    progress = state.progress
    if progress.step == state.plan.total_steps and (record := finished(run, state)):
        run.say(f"already finished; the last epoch: {json.dumps(record)}\n{written(run)}")
        return
    state.reporter = Reporter(run, state)
    try:
        with stop_signals_to(exit_stopped):
            for epoch in range(progress.epoch, state.plan.epochs):
                if epoch > progress.epoch:
                    progress.epoch, progress.step_in_epoch = epoch, 0
                    progress.loss_sum, progress.bad_images = 0.0, 0
                train_one_epoch(run, state)
                finish_epoch(run, state, held_out)
    finally:
        state.reporter.close()
    run.say(written(run))


def finished(run: Run, state: TrainState) -> dict | None:
    """The last epoch's line of log.txt, which a run writes last of all; None if it is not there."""
    lines = (
        (run.folder / LOG_FILE).read_text().splitlines() if (run.folder / LOG_FILE).exists() else []
    )
    record = json.loads(lines[-1]) if lines else {}
    return record if record.get("step") == state.plan.total_steps else None


def written(run: Run) -> str:
    """Where the results are, and the command that evaluates them."""
    script = f"python {run.task.script} --config {run.args.config}"
    return (
        f"weights: {run.folder / PRUNED_FILE}; log, sparsity and curves beside it\n"
        f"next: {script} --evaluate --pruned {run.folder}"
    )


def train_one_epoch(run: Run, state: TrainState) -> None:
    """Takes the remaining steps of the epoch, with a checkpoint at its end.

    Raises:
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after SIGTERM or SIGINT and a checkpoint.
    """
    args, progress, config = run.args, state.progress, run.config
    steps = state.plan.steps_of(progress.epoch)
    if progress.step_in_epoch == steps:  # resumed between the last step and its validation
        return
    lr = learning_rate(progress.epoch, state.plan.epochs, config["init_lr"], config["min_lr"])
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    accumulated = args.gradient_accumulation_steps
    state.loader.batch_sampler.set_epoch(progress.epoch, progress.step_in_epoch * accumulated)
    state.engine.train()
    with listen_for_stop() as stop:
        # Loading processes inherit the signal handlers, so they start inside this block.
        batches = read(state.loader)
        while progress.step_in_epoch < steps:
            loaded = [next(batches) for _ in range(accumulated)]
            parts, terms = zip(*(state.model.prepare(*inputs) for inputs, _ in loaded), strict=True)
            parts = [move(part, run.process.device) for part in parts]
            # what the processes must agree on travels in one message
            all_terms, skipped, stops, log, due = sum_over_processes(
                [
                    sum(terms),
                    sum(count for _, count in loaded),
                    stop.requested,
                    state.reporter.is_due(LOG_SECONDS),
                    checkpoint_is_due(run, state),
                ]
            )
            progress.bad_images += int(skipped)
            if hasattr(state.model, "on_step"):
                with run.autocast():
                    state.model.on_step(progress.epoch + progress.step_in_epoch / steps, parts)
            take_step(run, state, parts, [n * run.process.world_size / all_terms for n in terms])
            save_now = progress.step_in_epoch == steps or stops or due
            if save_now or log:
                state.reporter.progress(read_losses(run, state), lr)
            if save_now:
                save(run, state)
            if stops:
                run.say(f"stopped by a signal after step {progress.step}: run again to go on")
                raise SystemExit(EXIT_STOPPED)


def checkpoint_is_due(run: Run, state: TrainState) -> bool:
    """Whether the step that comes now shall end with a checkpoint, within an epoch.

    Every --checkpoint_steps; without that flag, from time to time where checkpoints are cheap. The
    main process decides for all.
    """
    if not run.process.is_main:
        return False
    if run.args.checkpoint_steps:
        return (state.progress.step + 1) % run.args.checkpoint_steps == 0
    interval = max(CHECKPOINT_SECONDS, state.save_seconds / CHEAP)
    return time.monotonic() - state.saved_at >= interval


def take_step(run: Run, state: TrainState, parts: list[tuple], weights: list[float]) -> None:
    """Takes a `train_step`; where scores are NaN, looks whether a loss tells why.

    Raises:
        FloatingPointError: a loss is not finite; else NonFiniteScores, where scores are NaN.
    """
    try:
        train_step(run, state, parts, weights)
    except NonFiniteScores:
        read_losses(run, state)
        raise


def train_step(run: Run, state: TrainState, parts: list[tuple], weights: list[float]) -> None:
    """One optimizer step: gradients of all parts and processes, AdamW, pruner.

    The loss is the mean over all terms (predicted tokens, statements) of the step, so that it does
    not depend on how they are spread over parts and processes. (The original takes the mean of the
    processes' means.)

    Args:
        run: of `prepare_run`.
        state: changed in place.
        parts: of `model.prepare`, on the device, one forward pass each.
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


def read_losses(run: Run, state: TrainState) -> float:
    """Fetches the losses of the steps since the last call, which waits for the device.

    Returns:
        Their mean.

    Raises:
        FloatingPointError: one is not finite; names the step, its image files and the checkpoint.
    """
    own = torch.stack(state.unread_losses).cpu().double()  # (steps,)
    state.unread_losses.clear()
    losses = [loss / run.process.world_size for loss in sum_over_processes(own.tolist())]
    for loss in losses:  # one by one, so that the sum does not depend on when it is read
        state.progress.loss_sum += loss
    if all(map(math.isfinite, losses)):
        return sum(losses) / len(losses)
    first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
    steps_ago = len(losses) - 1 - first
    own_files = [] if own[first].isfinite() else images_of_step(run, state, steps_ago)
    files = sum(gather_from_processes(own_files), [])
    saved = [str(path) for path in checkpoints.step_files(run.checkpoints)[:1]]
    raise FloatingPointError(
        f"the loss of step {state.progress.step - steps_ago} is {losses[first]}. "
        f"Images of the step: {', '.join(files)}. Last checkpoint: {(saved or ['none'])[0]}. "
        "Look at these images; a lower learning rate (--init_lr) or --amp off may help"
    )


def images_of_step(run: Run, state: TrainState, steps_ago: int) -> list[str]:
    """The image files that this process read for a step, 0 being the one just taken."""
    parts = run.args.gradient_accumulation_steps
    first = (state.progress.step_in_epoch - 1 - steps_ago) * parts
    sampler, dataset = state.loader.batch_sampler, state.loader.dataset.dataset
    sampler.set_epoch(state.progress.epoch, first)
    batches = [batch for batch, _ in zip(sampler, range(parts), strict=False)]
    return [path for batch in batches for i, _ in batch for path in dataset.image_paths(i)]


def finish_epoch(run: Run, state: TrainState, held_out: dict[str, Dataset]) -> None:
    """Writes weights, sparsity and the epoch's line of log.txt; validates."""
    args, progress = run.args, state.progress
    if run.process.is_main:
        checkpoints.save_weights(state.model, run.folder / PRUNED_FILE)
    sparsity = sparsity_report(prunable_layers(state.model))
    state.reporter.sparsity(sparsity)
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
        record["bad_images"] = progress.bad_images
    last = progress.step == state.plan.total_steps
    if last and state.pruner:
        note = off_target(sparsity, args.final_threshold, state.pruner.tied)
        record |= {"note": note} if note else {}
    if args.eval_epochs and (last or (progress.epoch + 1) % args.eval_epochs == 0):
        record |= validate(run, state.model, held_out)
    best_by = f"{next(iter(held_out))}_{run.task.best_by}"
    if run.process.is_main and is_best(record, progress.history, best_by, args.final_threshold):
        checkpoints.save_weights(state.model, run.folder / BEST_FILE)
    progress.history.append(record)
    state.reporter.epoch(progress.history)


def validate(run: Run, model: nn.Module, held_out: dict[str, Dataset]) -> dict[str, float]:
    """Scores of held-out sets, `<split>_<score>` to value; on the main process at least."""
    model.eval()
    scores = {}
    for split, dataset in list(held_out.items())[: None if run.args.eval_test else 1]:
        report = run.task.evaluate(run, model, dataset, split)
        scores |= {f"{split}_{name}": value for name, value in report["scores"].items()}
    barrier()
    return scores


def is_best(record: dict, history: list[dict], best_by: str, final_ratio: float) -> bool:
    """Whether an epoch's score is the best of those at the final remaining ratio.

    Epochs before are no rivals: of a run that prunes, the least pruned epoch scores best.
    """

    def score(epoch: dict) -> float:
        return (
            epoch.get(best_by, -math.inf) if epoch["remaining_ratio"] <= final_ratio else -math.inf
        )

    return score(record) > max(map(score, history), default=-math.inf)
