"""From a command line to a run: flags, processes, checked data, weights, loaders, exit codes."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data import EvalSampler, TrainBatchSampler
from models import load_checkpoint, prunable_layers
from pruners import sparsity_report
from utils import (
    Process,
    UserError,
    init_distributed,
    keep_freed_memory,
    load_config,
    seed_everything,
    write_json,
)

# --- flags ---------------------------------------------------------------------------------------


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
    run.add_argument("--evaluate", action="store_true", help="no training: score both eval splits")
    run.add_argument("--pruned", help="with --evaluate: weights, or the folder of a run")
    run.add_argument("--resume", default="auto", help="auto (newest checkpoint), off, or a file")
    run.add_argument("--checkpoint_steps", type=int, default=0, help="besides each epoch; 0: none")
    run.add_argument("--keep_checkpoints", type=int, default=2)
    run.add_argument("--eval_epochs", type=int, default=1, help="validate every N epochs; 0: never")
    run.add_argument("--skip_bad_images", action="store_true", help="count them and go on")
    run.add_argument(
        "--amp",
        choices=["auto", "bf16", "off"],
        default="auto",
        help="bf16 autocast; auto: on a GPU only, though CPUs with AMX gain from it too",
    )
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
    prune.add_argument("--id_profile", help="the profile for --useID, which it implies")

    for flag in ("--n_gpu", "--world_size", "--dist_url", "--distributed"):
        # accepted, as scripts of the original code pass them; torchrun says what they said
        parser.add_argument(flag, nargs="?", help=argparse.SUPPRESS)


def check_flags(args: argparse.Namespace) -> None:
    """Checks what argparse and the pruner do not.

    Raises:
        ValueError: naming the flag.
    """
    least = {
        "gradient_accumulation_steps": 1,
        "keep_checkpoints": 1,
        "max_steps": 1,
        "batch_size": 1,
        "max_epoch": 1,
        "deltaT": 1,
        "init_lr": 0,
        "checkpoint_steps": 0,
        "eval_epochs": 0,
        "num_workers": 0,
        "warmup_steps": 0,
    }
    for flag, bound in least.items():
        value = getattr(args, flag)
        if value is not None and value < bound:
            raise UserError(f"--{flag} must be at least {bound}, got {value}")
    if not 0 < args.final_threshold <= args.initial_threshold <= 1:
        raise UserError(
            "thresholds are fractions that remain, 0 < final <= initial <= 1; got "
            f"--final_threshold {args.final_threshold} --initial_threshold {args.initial_threshold}"
        )
    if args.pruned and not args.evaluate:
        raise UserError("--pruned goes with --evaluate; training starts from --pretrained")


# --- start ---------------------------------------------------------------------------------------


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

    @property
    def samples_per_step(self) -> int:
        """Training samples of all processes and accumulated batches at one optimizer step."""
        return self.batch_size * self.process.world_size * self.args.gradient_accumulation_steps

    def say(self, message: str) -> None:
        """Prints on the main process only."""
        if self.process.is_main:
            print(message, flush=True)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: bf16 on a GPU unless --amp says otherwise."""
        on_gpu = self.process.device.type == "cuda"
        wanted = self.args.amp == "bf16" or (self.args.amp == "auto" and on_gpu)
        return torch.autocast(self.process.device.type, torch.bfloat16, enabled=wanted)


def prepare(
    args: argparse.Namespace, task: str, build_datasets: Callable, build_model: Callable
) -> tuple[Run, nn.Module, tuple[Dataset, ...]]:
    """From flags to a run, a model with its weights on its device, and checked data sets.

    Args:
        args: flags of `add_flags`.
        task: "caption" or "nlvr".
        build_datasets: of (config, seed); the training set comes first.
        build_model: of the config.

    Raises:
        UserError: a flag, the config, data or weights are wrong.
    """
    run = start(args, task)
    keep_freed_memory(run.process.device)
    datasets = build_datasets(run.config, args.seed)
    datasets[0].skip_bad_images = args.skip_bad_images  # evaluation needs every image
    for dataset in datasets[1:] if args.evaluate else datasets:
        dataset.check()
    model = build_model(run.config)
    load_weights(run, model)
    if args.evaluate and run.process.is_main:
        write_json(run.folder / "sparsity.json", sparsity_report(prunable_layers(model)))
    return run, model, datasets


def start(args: argparse.Namespace, task: str) -> Run:
    """Reads the config, joins the other processes, seeds, and makes the results folder.

    Raises:
        ValueError: a flag or the config is wrong.
    """
    check_flags(args)
    batch_key = "batch_size" if task == "caption" else "batch_size_train"
    overrides = {key: getattr(args, key) for key in ("pretrained", "init_lr", "max_epoch")}
    overrides |= {batch_key: args.batch_size, "num_workers": args.num_workers}
    config = load_config(args.config, overrides, task)
    if args.useID and not args.id_profile:
        args.id_profile = config["id_profile"]
        if not args.id_profile:
            raise UserError(f"--useID: {args.config} names no id_profile; give --id_profile")
    run = Run(args, config, init_distributed(args.device), Path(args.output_dir, args.model_dir))
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.folder}: {error}; choose --output_dir") from error
    if run.process.is_main and not args.evaluate:
        write_json(run.folder / "config.json", {"config": config, "flags": vars(args)})
    seed_everything(args.seed)
    return run


def load_weights(run: Run, model: nn.Module) -> None:
    """Loads what --pruned or the config's `pretrained` names, and says what became of it.

    Raises:
        ValueError: it does not fit, or there is nothing to evaluate, or not all of it.
    """
    path = run.args.pruned or run.config["pretrained"]
    if path:
        report = load_checkpoint(model, path)
        run.say(str(report))
        if run.args.evaluate and report.initialised:
            raise UserError(
                f"{path} is a start for training, not weights to evaluate: it lacks "
                f"{', '.join(report.initialised)}"
            )
    elif run.args.evaluate:
        raise UserError("nothing to evaluate: give --pruned, or --pretrained for dense weights")
    model.to(run.process.device)


def eval_loader(run: Run, dataset: Dataset, batch_size: int) -> DataLoader:
    """Loads this process's share of a split, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EvalSampler(len(dataset), run.process.rank, run.process.world_size, batch_size),
        **_loader_options(run),
    )


def train_loader(run: Run, dataset: Dataset) -> DataLoader:
    """Loads this process's batches; its `batch_sampler` is told the epoch."""
    return DataLoader(
        dataset,
        batch_sampler=TrainBatchSampler(
            len(dataset),
            run.batch_size,
            run.args.seed,
            run.process.rank,
            run.process.world_size,
        ),
        persistent_workers=run.config["num_workers"] > 0,
        **_loader_options(run),
    )


def _loader_options(run: Run) -> dict:
    workers = run.config["num_workers"]
    return {
        "num_workers": workers,
        "worker_init_fn": _leave_signals_to_the_trainer if workers else None,
        "pin_memory": run.process.device.type == "cuda",
        # a loader draws a base seed for its workers; not from the generator of dropout
        "generator": torch.Generator().manual_seed(run.args.seed),
    }


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Lets a loading process live on when a signal goes to all processes of a run.

    The trainer needs it to finish its step. Terminals and torchrun signal process groups, job
    schedulers every process. Only the trainer's own SIGTERM ends it; when the trainer is killed,
    torch's watch in the process does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # left for sigwaitinfo
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    trainer = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def move(inputs: tuple, device: torch.device) -> tuple:
    """The same inputs with tensors on the device; a copy from pinned memory does not wait."""
    return tuple(
        x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in inputs
    )


def sum_over_processes(run: Run, numbers: list[float]) -> list[float]:
    """Sums host numbers over all processes, without waiting for a GPU.

    A process that has died is noticed here at once, for its connection is closed.
    """
    if run.process.world_size == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


# --- exit codes ----------------------------------------------------------------------------------


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs a script's `main`; a user's mistake ends it with one sentence instead of a traceback.

    Exit codes: 0 done; 1 a fault of the program, with its traceback; 2 a `UserError`, whose
    sentence every process that met it prints; 75 (`stopping.EXIT_STOPPED`) training was stopped by
    SIGTERM or SIGINT, and the same command goes on from the newest checkpoint.
    """
    try:
        main(args)
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
