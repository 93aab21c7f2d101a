"""Loading batches: samplers, loading processes and their signals, and what goes wrong in them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data.samplers import EvalSampler, TrainBatchSampler
from engine.run import Run
from utils import UserError


class _Fetched(Dataset):
    """Items as loading processes send them: an item and how many samples it skips, or a mistake.

    A mistake travels as a value, for torch would send it as a traceback in text.
    """

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
    """A batch of tensors and lists, and how many samples were skipped; or the first mistake."""
    for item in items:
        if isinstance(item, UserError):
            return item
    samples, skipped = zip(*items, strict=True)
    return tuple(default_collate(list(samples))), sum(skipped)


def read(loader: DataLoader) -> Iterator[tuple[tuple, int]]:
    """The batches of a loader of this module, each with how many samples were skipped for it.

    Raises:
        UserError: of the data set, for instance an image that cannot be read.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class EvalBatches:
    """The batches of this process's share of a held-out split, in order."""

    def __init__(self, run: Run, dataset: Dataset):
        """Args: of `prepare_run`; the split."""
        size = run.config["eval_batch_size"]
        self.loader = DataLoader(
            _Fetched(dataset),
            batch_size=size,
            sampler=EvalSampler(len(dataset), run.process.rank, run.process.world_size, size),
            **_loader_options(run),
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple]:
        """The batches."""
        for batch, _ in read(self.loader):
            yield batch


def train_loader(run: Run, dataset: Dataset) -> DataLoader:
    """Loads this process's batches, for `read`; its `batch_sampler` is told the epoch."""
    return DataLoader(
        _Fetched(dataset),
        batch_sampler=TrainBatchSampler(
            len(dataset),
            run.config["batch_size"],
            run.args.seed,
            run.process.rank,
            run.process.world_size,
        ),
        persistent_workers=run.config["num_workers"] > 0,
        **_loader_options(run),
    )


def _loader_options(run: Run) -> dict:
    return {
        "num_workers": run.loading_processes,
        "collate_fn": _collate,
        "worker_init_fn": _leave_signals_to_the_trainer if run.loading_processes else None,
        "pin_memory": run.process.device.type != "cpu",
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
