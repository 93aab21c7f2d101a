"""One process or several: devices, seeds, memory, and messages between processes."""

import ctypes
import functools
import os
import platform
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from utils import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Process:
    """One process of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched_processes() -> int:
    """Number of processes that torchrun started; 1 under plain `python`."""
    values = {name: os.environ.get(name, "") for name in LAUNCHER}
    there = ", ".join(name for name, value in values.items() if value)
    missing = ", ".join(name for name, value in values.items() if not value)
    if not there:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1":
            raise UserError(
                f"SLURM started {tasks} tasks without torchrun: each would write the same files. "
                "Start one task on each node: srun --ntasks-per-node=1 python -m "
                "torch.distributed.run --nnodes=$SLURM_NNODES --nproc_per_node=GPUS "
                "--rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29505 SCRIPT FLAGS"
            )
        return 1
    if missing:
        raise UserError(
            f"the environment sets {there}, but not {missing}: torchrun sets them all. Unset them, "
            "or start with python -m torch.distributed.run"
        )
    for name, value in values.items():
        if name != "MASTER_ADDR" and not value.isdigit():
            raise UserError(f"{name} is {value!r} in the environment: not a number")
    return int(values["WORLD_SIZE"])


def choose_device(device: str, processes: int) -> torch.device:
    """The device of this process.

    "auto" is an accelerator if there is one. Without an index (`cuda`), each process takes the
    accelerator of its local rank.
    """
    present = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        device = present.type if present else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: choose auto, cpu, cuda, cuda:N, mps or xpu") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK") or 0) if chosen.index is None else chosen.index
    if present is None or chosen.type != present.type:
        there = present.type if present else "no GPU"
        why = f"torch sees {there}: take the CPU (--device cpu, --cpu)"
    elif chosen.index is not None and processes > 1:
        why = "under torchrun each process needs a device of its own: give "
        why += f"{chosen.type} alone, and choose among devices with CUDA_VISIBLE_DEVICES"
    elif index >= (count := torch.accelerator.device_count()):
        why = f"there are {count}: start fewer processes (--nproc_per_node), or name another"
    else:
        return torch.device(chosen.type, index)
    raise UserError(f"{chosen.type}:{index} is asked for, but {why}")


def init_distributed(device: str = "auto", timeout_s: float = 3600.0) -> Process:
    """Joins the processes that torchrun started, if it did.

    Collectives wait `timeout_s` seconds: longer than one process works alone (scoring, a download).
    """
    world_size = launched_processes()
    chosen = choose_device(device, world_size)
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index)
    if world_size > 1 and not dist.is_initialized():
        backend = "gloo"  # host values always go over gloo, which waits for no GPU
        if chosen.type != "cpu":
            own = dist.get_default_backend_for_device(chosen.type)
            backend = f"cpu:gloo,{chosen.type}:{own}"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except dist.DistNetworkError as error:
            raise UserError(
                f"the processes do not meet at {os.environ['MASTER_ADDR']}, port "
                f"{os.environ['MASTER_PORT']} ({error}): choose another --master_port, and an "
                "address that all nodes know"
            ) from error
    return Process(int(os.environ["RANK"]) if world_size > 1 else 0, world_size, chosen)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device.

    On the CPU: what the system and control groups (of a container, a job) have left, shared among
    this machine's processes; or less where `ulimit -v` or `ulimit -d` leaves less.
    """
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    shared = min([psutil.virtual_memory().available, *left_in_groups()])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    used = psutil.Process().memory_info()
    own = {resource.RLIMIT_AS: used.vms, resource.RLIMIT_DATA: getattr(used, "data", 0)}
    limits = {kind: resource.getrlimit(kind)[0] for kind in own}
    left = [limits[kind] - own[kind] for kind in own if limits[kind] != resource.RLIM_INFINITY]
    return max(0, min([shared // processes, *left]))


# files of a control group: limits, usage, and the line of memory.stat that can be given back
GROUPS = {
    "memory": (["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file"),  # v1
    "": (["memory.max", "memory.high"], "memory.current", "inactive_file"),  # v2
}


def left_in_groups(root: str | Path = "/") -> list[int]:
    """Bytes left below each memory limit of this process's control groups and their parents."""
    left, groups = [], Path(root, "proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():  # of Linux
        _, controllers, path = line.split(":", 2)
        limits, usage, cache = GROUPS.get(controllers, ((), "", ""))
        top = Path(root, "sys/fs/cgroup", controllers)
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see its own as the uppermost
            with suppress(OSError):  # where there is none, or none with a limit
                values = [(folder / name).read_text().strip() for name in limits]
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat.get(cache, 0))
                left += [int(value) - used for value in values if value != "max"]
    return left


def keep_freed_memory(device: torch.device) -> None:
    """Lets glibc keep freed memory, because the kernel zeroes each page that it gives.

    It takes a training step of BLIP base from 6.3 s to 5.2 s (batch 2, two cores).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def computes_bf16(device: torch.device) -> bool:
    """Whether an accelerator computes bfloat16 itself; older NVIDIA GPUs emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu"  # whose bfloat16 is slow without AMX


def place_among_processes() -> tuple[int, int]:
    """Rank, and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return place_among_processes()[0] == 0


def barrier() -> None:
    """Waits for all processes; nothing where there is one."""
    if dist.is_initialized():
        dist.barrier()


def start_sum(values: list[float]) -> Callable[[], list[float]]:
    """Starts to sum host values over all processes; the returned function waits for the sums."""
    total = torch.tensor(values, dtype=torch.float64)
    work = dist.all_reduce(total, async_op=True) if dist.is_initialized() else None

    @functools.cache
    def wait() -> list[float]:
        if work is not None:
            work.wait()
        return total.tolist()

    return wait


def sum_over_processes(values: list[float]) -> list[float]:
    """Sums host values over all processes."""
    return start_sum(values)()


def gather_from_processes(value) -> list:
    """The values of all processes, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def main_process_first() -> Iterator[None]:
    """Lets the main process run the block (a download, say) before the others do."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def machine_of(device: torch.device) -> dict:
    """What the last digits of a result depend on: processor, torch, and threads on a CPU."""
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
        return {"processor": name, "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    name += f", {torch.backends.cpu.get_cpu_capability()}"
    return {"processor": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
