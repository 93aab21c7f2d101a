"""What the benchmarks share: a timer, memory, and the JSON document that they print last."""

import ctypes
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.processes import machine_of


def seconds(
    works: dict[str, Callable[[], object]], rounds: int, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Median seconds of each work; they take turns, after a round that warms up.

    Args:
        works: by name.
        rounds: that are timed.
        device: to wait for.
    """
    times = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def wait(device: str | torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str | torch.device) -> None:
    """Frees what is unused, and lets the peak of memory start from now."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be used again unseen
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str | torch.device, field: str = "VmHWM") -> int:
    """Peak bytes since `reset_peak`: of the GPU, or resident of the process (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def document(benchmark: str, device: str | torch.device = "cpu", **results) -> dict:
    """What was measured and where."""
    return {"benchmark": benchmark, "machine": machine_of(torch.device(device)), **results}


def print_document(benchmark: str, device: str | torch.device = "cpu", **results) -> None:
    """Prints the document, one line of JSON, the last of a benchmark."""
    print(json.dumps(document(benchmark, device, **results)))
