"""Reports of a run, from the main process alone: progress, TensorBoard, log.txt, sparsity."""

import json
import time

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dimension.figures import save_figure
from reports.figures import plot_sparsity
from reports.runs import LOG_FILE
from utils import atomic_write, write_json


def screen(record: dict) -> str:
    """A record as JSON whose numbers have four digits."""
    exact = json.dumps(record)
    return json.dumps(json.loads(exact, parse_float=lambda x: float(f"{float(x):.4g}")))


class Reporter:
    """Reports of one run of a training script."""

    def __init__(self, run, state):
        """Starts the clock, and at step 0 of the `TrainState` a new log.txt of the `Run`."""
        self.run, self.state = run, state
        self.started = self.last_line = time.monotonic()
        self.first_step = state.progress.step
        self.board = None
        if run.process.is_main:
            folder = str(run.folder / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=self.first_step + 1)
            if self.first_step == 0:
                (run.folder / LOG_FILE).unlink(missing_ok=True)

    def is_due(self, seconds: float) -> bool:
        """Whether the main process has been silent for that long."""
        return self.board is not None and time.monotonic() - self.last_line >= seconds

    def progress(self, loss: float, lr: float) -> None:
        """Prints the progress line: mean loss of the steps since the last one, learning rate."""
        if self.board is None:
            return
        self.last_line = time.monotonic()
        at, total = self.state.progress, self.state.plan.total_steps
        rate = (at.step - self.first_step) / (self.last_line - self.started)  # steps a second
        samples = rate * self.run.samples_per_step
        memory = psutil.Process().memory_info().rss
        if self.run.process.device.type != "cpu":
            memory = torch.accelerator.max_memory_allocated(self.run.process.device)  # its peak
        self.run.say(
            f"epoch {at.epoch}  step {at.step}/{total}  loss {loss:.4f}  lr {lr:.2e}  "
            f"remaining {at.remaining_ratio:.3f}  {samples:.1f} samples/s  "
            f"ETA {tqdm.format_interval((total - at.step) / rate)}  memory {memory / 1e9:.2f} GB"
        )
        for name, value in [("loss", loss), ("lr", lr), ("remaining_ratio", at.remaining_ratio)]:
            self.board.add_scalar(f"train/{name}", value, at.step)

    def epoch(self, history: list[dict], sparsity: dict) -> None:
        """Rewrites log.txt, one JSON line an epoch, and the sparsity's report and figure."""
        if self.board is None:
            return
        folder, record = self.run.folder, history[-1]
        write_json(folder / "sparsity.json", sparsity)
        save_figure(plot_sparsity(folder.name, sparsity), folder / "sparsity.png")
        with atomic_write(folder / LOG_FILE) as file:
            file.writelines(json.dumps(earlier) + "\n" for earlier in history)
        self.run.say(screen(record))
        numbers = {f"epoch/{key}": x for key, x in record.items() if isinstance(x, float)}
        shares = {"overall": sparsity["overall"], **sparsity["by_modality"]}
        for name, value in (numbers | {f"sparsity/{key}": x for key, x in shares.items()}).items():
            self.board.add_scalar(name, value, record["step"])
        self.board.flush()
        self.last_line = time.monotonic()

    def close(self) -> None:
        """Writes what TensorBoard's file still lacks."""
        if self.board is not None:
            self.board.close()
