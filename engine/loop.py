"""The training loop: epochs, steps, and what happens between them."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from engine import checkpoints
from engine.experiment import Run
from engine.loading import eval_options, move, read
from engine.processes import barrier, gather_from_processes, start_sum, sum_over_processes
from engine.reporter import Reporter
from engine.state import TrainState, finished_identity, save
from engine.stopping import EXIT_STOPPED, exit_stopped, noted_signals, stop_signals_to
from models.layers import prunable_layers
from pruners.pruner import NonFiniteScores
from pruners.sparsity import sparsity_report
from reports.runs import LOG_FILE, PRUNED_FILE

LOG_SECONDS = 10.0  # between progress lines
CHECKPOINT_SECONDS = 600.0  # between checkpoints within an epoch, if they are cheap
CHEAP = 0.05  # share of the time that such checkpoints may take
BEST_FILE = "pruned_best.safetensors"


def train(run: Run, state: TrainState, held_out: dict[str, Dataset]) -> None:
    """Trains and prunes, from where the state is to the end, and validates at the ends of epochs.

    Raises:
        FloatingPointError: a loss is not finite.
        SystemExit: with EXIT_STOPPED, after a signal and a checkpoint.
    """
    if run.process.is_main:
        for unfinished in run.checkpoints.glob(".step_*"):  # writes that were killed
            unfinished.unlink()
    state.reporter = Reporter(run, state)
    with closing(state.reporter), stop_signals_to(exit_stopped):
        for epoch in range(state.progress.epoch, state.plan.epochs):
            if epoch > state.progress.epoch:  # else the run goes on within it
                new = {"step_in_epoch": 0, "loss_sum": 0.0, "bad_images": 0}
                state.progress = replace(state.progress, epoch=epoch, **new)
            train_one_epoch(run, state)
            finish_epoch(run, state, held_out)
    say_written(run)


def already_finished(run: Run, state: TrainState) -> bool:
    """Whether the last epoch's line of log.txt, which a run writes last of all, is there."""
    total = state.plan.total_steps
    removed = run.flags.resume == "auto" and not checkpoints.step_files(run.checkpoints)
    finished = finished_identity(run).get("total_steps") == total
    finished = finished and (removed or state.progress.step == total)
    barrier()  # all processes have seen the checkpoints, which may go now
    if finished:
        last = (run.folder / LOG_FILE).read_text().splitlines()[-1]
        run.say(f"already finished; the last epoch: {last}")
        say_written(run)
    return finished


def say_written(run: Run) -> None:
    """Says what a finished run left, without checkpoints it is not to keep, and what comes next."""
    if not run.process.is_main:
        return
    if not run.flags.keep_checkpoints:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    size = sum(path.stat().st_size for path in checkpoints.step_files(run.checkpoints))
    spare = f"{run.checkpoints}: {size / 1e9:.2g} GB, which may go (--keep_checkpoints 0)\n"
    script = f"python {run.task.script} --config {run.flags.config}"
    run.say(
        f"weights: {run.folder / PRUNED_FILE}; log, sparsity and curves beside it\n"
        f"{spare * bool(size)}next: {script} --evaluate --pruned {run.folder}"
    )


def train_one_epoch(run: Run, state: TrainState) -> None:
    """Takes the remaining steps of the epoch, with a checkpoint at its end."""
    progress, config, process = state.progress, run.config, run.process
    steps, accumulated = state.plan.steps_of(progress.epoch), run.flags.gradient_accumulation_steps
    if progress.step_in_epoch == steps:  # resumed between the last step and its validation
        return
    lr = learning_rate(progress.epoch, state.plan.epochs, config["init_lr"], config["min_lr"])
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.loader.batch_sampler.set_epoch(progress.epoch, progress.step_in_epoch * accumulated)
    state.engine.train()
    with noted_signals() as signals:
        batches = read(state.loader)  # in the block: loading processes inherit signal handlers
        while progress.step_in_epoch < steps:
            loaded = [next(batches) for _ in range(accumulated)]
            parts, terms = zip(*(state.model.prepare(*inputs) for inputs, _ in loaded), strict=True)
            parts = [move(part, process.device) for part in parts]
            log = state.reporter.is_due(LOG_SECONDS)
            due = process.is_main and checkpoint_is_due(run.flags.checkpoint_steps, state)
            skipped = sum(count for _, count in loaded)
            # what the processes must agree on travels in one message, while they compute
            agreed = start_sum([sum(terms), skipped, bool(signals), log, due])
            if hasattr(state.model, "on_step"):
                with torch.autocast(process.device.type, torch.bfloat16, enabled=run.bf16):
                    state.model.on_step(progress.epoch + progress.step_in_epoch / steps, parts)
            try:
                train_step(run, state, parts, terms, agreed)
            except NonFiniteScores:
                read_losses(run, state)  # raises where a loss tells why
                raise
            _, skipped, stops, log, due = agreed()
            progress.bad_images += int(skipped)
            save_now = progress.step_in_epoch == steps or stops or due
            if save_now or log:
                state.reporter.progress(read_losses(run, state), lr)
            if save_now:
                save(run, state)
            if stops:
                run.say(f"stopped by a signal after step {progress.step}: run again to go on")
                raise SystemExit(EXIT_STOPPED)


def learning_rate(epoch: int, epochs: int, init_lr: float, min_lr: float) -> float:
    """Cosine from `init_lr` at epoch 0 towards `min_lr` at epoch `epochs`, constant in an epoch."""
    return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def checkpoint_is_due(checkpoint_steps: int, state: TrainState) -> bool:
    """Whether the coming step ends with a checkpoint; 0 steps: from time to time, if cheap."""
    if checkpoint_steps:
        return (state.progress.step + 1) % checkpoint_steps == 0
    interval = max(CHECKPOINT_SECONDS, state.save_seconds / CHEAP)
    return time.monotonic() - state.saved_at >= interval


def train_step(
    run: Run, state: TrainState, parts: list[tuple], terms: Sequence[int], agreed: Callable
) -> None:
    """One optimizer step: gradients of all parts and processes, AdamW, pruner.

    The loss is the mean over all terms (predicted tokens, statements) of the step, however they are
    spread over parts and processes. (The original takes the mean of the processes' means.) Each of
    `parts` holds the arguments of a forward pass; `terms` are their numbers of terms, and the
    first number of `agreed`, called after a forward, those of all processes.
    """
    process, progress = run.process, state.progress
    loss = torch.zeros((), device=process.device)
    for i, part in enumerate(parts):
        whole = i == len(parts) - 1 or state.engine is state.model
        with nullcontext() if whole else state.engine.no_sync():
            with torch.autocast(process.device.type, torch.bfloat16, enabled=run.bf16):
                mean = state.engine(*part)
            part_loss = mean * (terms[i] / agreed()[0] * process.world_size)  # an average
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
    """The mean loss of the steps since the last call; waits for the device.

    A loss that is not finite raises a FloatingPointError with its step, images and checkpoint.
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
    """The image files that this process read for a step; 0 is the last step."""
    parts = run.flags.gradient_accumulation_steps
    first = (state.progress.step_in_epoch - 1 - steps_ago) * parts
    sampler, dataset = state.loader.batch_sampler, state.loader.dataset.dataset
    sampler.set_epoch(state.progress.epoch, first)
    batches = [batch for batch, _ in zip(sampler, range(parts), strict=False)]
    return [path for batch in batches for i, _ in batch for path in dataset.image_paths(i)]


def finish_epoch(run: Run, state: TrainState, held_out: dict[str, Dataset]) -> None:
    """Writes weights, sparsity and the epoch's line of log.txt; validates.

    With --eval_test both held-out sets, else the first. Its score chooses `pruned_best.safetensors`
    among the epochs at the final remaining ratio.
    """
    flags, progress = run.flags, state.progress
    if run.process.is_main:
        checkpoints.save_weights(state.model, run.folder / PRUNED_FILE)
    sparsity = sparsity_report(prunable_layers(state.model))
    record = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss": progress.loss_sum / progress.step_in_epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "remaining_ratio": progress.remaining_ratio,
        "sparsity": sparsity["overall"],
        "sparsity_by_modality": sparsity["by_modality"],
    }
    if flags.skip_bad_images:
        record["bad_images"] = progress.bad_images
    last = progress.step == state.plan.total_steps
    if last and state.pruner and (note := state.pruner.note()):
        record["note"] = note
    if flags.eval_epochs and (last or (progress.epoch + 1) % flags.eval_epochs == 0):
        state.model.eval()
        for split in list(held_out)[: None if flags.eval_test else 1]:
            scored = run.task.evaluate(state.model, held_out[split], split, eval_options(run))
            record |= {f"{split}_{name}": value for name, value in scored["scores"].items()}
        barrier()
    best_by = f"{next(iter(held_out))}_{run.task.best_by}"
    if run.process.is_main and is_best(record, progress.history, best_by, flags.final_threshold):
        checkpoints.save_weights(state.model, run.folder / BEST_FILE)
    progress.history.append(record)
    state.reporter.epoch(progress.history, sparsity)


def is_best(record: dict, history: list[dict], best_by: str, final_ratio: float) -> bool:
    """Whether an epoch's score is the best of those at the final remaining ratio."""
    *earlier, own = (
        epoch.get(best_by, -math.inf) if epoch["remaining_ratio"] <= final_ratio else -math.inf
        for epoch in (*history, record)
    )
    return own > max(earlier, default=-math.inf)
