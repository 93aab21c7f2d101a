"""What containers and jobs allow: memory, and CPUs for loading processes."""

import os
import resource
from types import SimpleNamespace

import psutil
import pytest
import torch

from engine.loading import loader_options
from engine.processes import free_memory, left_in_groups
from tests.runs import finish, processes

CPU = torch.device("cpu")
MB = 2**20


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def group_v2(folder, maximum, current, high="max", cache=0):
    stat = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 7"
    names = {"memory__max": maximum, "memory__high": high, "memory__current": current}
    write(folder, memory__stat=stat, **names)


def test_a_job_below_a_user_below_a_node(tmp_path):
    """Version 2, as SLURM and systemd have it: each group's limit holds for all below it."""
    assert left_in_groups(tmp_path) == []  # as on a Mac
    write(tmp_path / "proc/self", cgroup="0::/slurm/job_7/step_0")
    groups = tmp_path / "sys/fs/cgroup"
    group_v2(groups / "slurm/job_7/step_0", "max", 300 * MB)
    group_v2(groups / "slurm/job_7", 1000 * MB, 400 * MB, cache=100 * MB)
    group_v2(groups / "slurm", 5000 * MB, 2000 * MB, high=3000 * MB)
    write(groups, memory__stat="anon 1")  # the uppermost has no limit
    assert left_in_groups(tmp_path) == [700 * MB, 3000 * MB, 1000 * MB]
    write(tmp_path / "proc/self", cgroup="0::/")  # of a container, which is its own uppermost
    assert left_in_groups(tmp_path) == []
    group_v2(groups, 2048 * MB, 1024 * MB, cache=24 * MB)
    assert left_in_groups(tmp_path) == [1048 * MB]


@pytest.mark.parametrize("seen_as", ["docker/4fe1", ""])
def test_a_container_of_version_1(tmp_path, seen_as):
    """The kernel names the host's path; the container may see its group there, or uppermost."""
    lines = "5:cpuset:/docker/4fe1\n4:memory:/docker/4fe1\n1:name=systemd:/x\n0::/"
    write(tmp_path / "proc/self", cgroup=lines)
    sizes = {"memory__limit_in_bytes": 512 * MB, "memory__usage_in_bytes": 200 * MB}
    stat = f"inactive_file 3\ntotal_inactive_file {50 * MB}"
    write(tmp_path / "sys/fs/cgroup/memory" / seen_as, memory__stat=stat, **sizes)
    assert left_in_groups(tmp_path) == [362 * MB]


@pytest.mark.parametrize(
    ("groups", "processes_here", "expected"),
    [
        ([], "1", 800),
        ([900, 500], "2", 250),
        ([900], "", 800),
        ([-30], "2", 0),  # more is used than allowed, and is being given back
    ],
)
def test_free_is_the_least_of_all_limits(monkeypatch, groups, processes_here, expected):
    memory = SimpleNamespace(available=800 * MB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("engine.processes.left_in_groups", lambda: [x * MB for x in groups])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
    assert free_memory(CPU) == expected * MB


def take_under_limit(kind: int) -> None:
    """Sets a limit of 600 MB above what this process has, as batch systems do, and takes memory."""
    used = psutil.Process().memory_info()
    soft = {resource.RLIMIT_AS: used.vms, resource.RLIMIT_DATA: used.data}[kind] + 600 * MB
    resource.setrlimit(kind, (soft, resource.RLIM_INFINITY))
    free = free_memory(CPU)
    assert 400 * MB < free <= 600 * MB, free
    torch.empty(int(0.9 * free), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="memory"):
        torch.empty(int(1.1 * free), dtype=torch.uint8)


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_process_can_take_what_is_called_free_and_not_much_more(kind):
    process = processes.Process(target=take_under_limit, args=(kind,))
    process.start()
    assert finish([process]) == [0]


@pytest.mark.parametrize(("asked_for", "expected"), [(0, 0), (1, 1), (8, 2)])
def test_no_more_loading_processes_than_cpus_of_the_process(monkeypatch, asked_for, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    options = loader_options({"num_workers": asked_for}, torch.device("cpu"), 0)
    assert options["num_workers"] == expected
