"""Loading batches: samplers, loading processes and their signals, and what goes wrong in them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from data.samplers import EvalSampler, TrainBatchSampler
from engine.experiment import Run
from engine.processes import Process, is_main, place_among_processes
from utils import UserError, available_cpus


class _Fetched(Dataset):
    """Items and the samples skipped for them; or mistakes, which torch sends as tracebacks."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index) -> tuple[tuple, int] | UserError:
        try:
            return self.dataset.fetch(index)
        except UserError as error:
            return error


def _collate(items: list) -> tuple[tuple, int] | UserError:
    """A batch of tensors and lists, and the samples skipped for it; or the first mistake."""
    for item in items:
        if isinstance(item, UserError):
            return item
    samples, skipped = zip(*items, strict=True)
    return tuple(default_collate(list(samples))), sum(skipped)


def read(loader: DataLoader) -> Iterator[tuple[tuple, int]]:
    """The batches of a loader, each with the number of samples skipped for it."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def train_loader(config: dict, dataset: Dataset, seed: int, process: Process) -> DataLoader:
    """Loads this process's training batches, for `read`; set the epoch of its `batch_sampler`."""
    place = process.rank, process.world_size
    sampler = TrainBatchSampler(len(dataset), config["batch_size"], seed, *place)
    options = loader_options(config, process.device, seed)
    options["persistent_workers"] = options["num_workers"] > 0
    return DataLoader(_Fetched(dataset), batch_sampler=sampler, **options)


@dataclass(frozen=True)
class EvalOptions:
    """How a held-out split is evaluated."""

    config: dict  # batch size, loading processes, decoding and files
    device: torch.device = torch.device("cpu")  # of the model
    bf16: bool = False  # products in bfloat16 autocast
    results: Path | None = None  # folder of the captions and their scores; None writes none
    meteor: bool = False  # METEOR of captions, which takes ten seconds to start
    spice: bool = False  # SPICE of captions
    samples: int = 0  # first samples that a split was cut to; 0 for the whole split

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def batches(self, dataset: Dataset, what: str) -> Iterator[tuple]:
        """The batches of this process's share of a split, with tensors on the device."""
        size = self.config["eval_batch_size"]
        loader = DataLoader(
            _Fetched(dataset),
            batch_size=size,
            sampler=EvalSampler(len(dataset), *place_among_processes(), size),
            **loader_options(self.config, self.device, seed=0),
        )
        what = f"{self.results.parent.name}: {what}" if self.results else what
        shown = {"desc": what, "total": len(loader.sampler), "mininterval": 5.0}
        with tqdm(**shown, disable=not is_main()) as bar:
            for batch, _ in read(loader):
                yield move(batch, self.device)
                bar.update(len(batch[0]))


def eval_options(run: Run, **scorers: bool) -> EvalOptions:
    """How a run evaluates."""
    results, samples = run.folder / "results", run.flags.eval_samples
    device = run.process.device
    return EvalOptions(run.config, device, run.bf16, results, samples=samples, **scorers)


def loader_options(config: dict, device: torch.device, seed: int) -> dict:
    """Arguments of a DataLoader; its processes are at most the CPUs of this one."""
    workers = min(config["num_workers"], available_cpus())
    return {
        "num_workers": workers,
        "collate_fn": _collate,
        "worker_init_fn": _leave_signals_to_the_trainer if workers else None,
        "pin_memory": device.type != "cpu",
        # a loader draws a base seed for its workers; not from the generator of dropout
        "generator": torch.Generator().manual_seed(seed),
    }


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Lets a loading process outlive a signal to all processes, so that a step can be finished.

    SIGTERM from the trainer itself ends it; on macOS, which does not name the sender, any SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # left for sigwaitinfo
        threading.Thread(target=_exit_on_the_trainers_sigterm, daemon=True).start()


def _exit_on_the_trainers_sigterm() -> None:
    trainer = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def move(inputs: tuple, device: torch.device) -> tuple:
    """The same inputs with tensors on the device; a copy from pinned memory does not wait."""
    return tuple(
        x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in inputs
    )
