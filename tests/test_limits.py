"""What containers and jobs allow: memory, loading processes, shared memory, time to stop."""

import argparse
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import psutil
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args

import train_caption
from engine.loading import _loader_options
from engine.processes import Process, free_memory, left_in_groups
from engine.run import Run, shared_memory_hint
from engine.state import TORCHRUN_GRACE, grace_hint
from engine.tasks import CAPTION, NLVR
from tests.runs import make_scenes, write_config

CPU = torch.device("cpu")
MB = 2**20


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def group_v2(folder, maximum, current, high="max", cache=0):
    stat = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 7"
    write_group(
        folder, memory__max=maximum, memory__high=high, memory__current=current, memory__stat=stat
    )


def group_v1(folder, limit, usage, cache=0):
    stat = f"inactive_file 3\ntotal_inactive_file {cache}"
    write_group(
        folder,
        **{"memory__limit_in_bytes": limit, "memory__usage_in_bytes": usage, "memory__stat": stat},
    )


def own_groups(root, *lines):
    write_group(root / "proc/self", cgroup="\n".join(lines))


def test_a_job_below_a_user_below_a_node(tmp_path):
    """Version 2, as SLURM and systemd have it: each group's limit holds for all below it."""
    own_groups(tmp_path, "0::/slurm/job_7/step_0")
    groups = tmp_path / "sys/fs/cgroup"
    group_v2(groups / "slurm/job_7/step_0", "max", 300 * MB)
    group_v2(groups / "slurm/job_7", 1000 * MB, 400 * MB, cache=100 * MB)
    group_v2(groups / "slurm", 5000 * MB, 2000 * MB, high=3000 * MB)
    groups.joinpath("memory.stat").write_text("anon 1\n")  # the uppermost has no limit
    assert left_in_groups(tmp_path) == [700 * MB, 3000 * MB, 1000 * MB]


def test_a_container_of_version_2_is_its_own_uppermost_group(tmp_path):
    own_groups(tmp_path, "0::/")
    group_v2(tmp_path / "sys/fs/cgroup", 2048 * MB, 1024 * MB, cache=24 * MB)
    assert left_in_groups(tmp_path) == [1048 * MB]


@pytest.mark.parametrize("seen_as", ["docker/4fe1", ""])
def test_a_container_of_version_1(tmp_path, seen_as):
    """The kernel tells the host's path; the container may see its group there, or uppermost."""
    lines = ["5:cpuset:/docker/4fe1", "4:memory:/docker/4fe1", "1:name=systemd:/x", "0::/"]
    own_groups(tmp_path, *lines)
    group_v1(tmp_path / "sys/fs/cgroup/memory" / seen_as, 512 * MB, 200 * MB, cache=50 * MB)
    group_v1(tmp_path / "sys/fs/cgroup/cpuset/docker/4fe1", 1 * MB, 0)
    assert left_in_groups(tmp_path) == [362 * MB]


def test_no_groups(tmp_path):
    assert left_in_groups(tmp_path) == []  # as on a Mac
    own_groups(tmp_path, "0::/user.slice")
    assert left_in_groups(tmp_path) == []


def test_free_is_the_least_of_all_limits(monkeypatch):
    Available = namedtuple("Available", "available")
    for available, groups, processes, expected in [
        (800, [], "1", 800),
        (800, [900, 500], "1", 500),
        (800, [900, 500], "2", 250),
        (800, [900], "", 800),
        (800, [-30], "2", 0),  # more is used than allowed, and is being given back
    ]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda n=available: Available(n * MB))
        monkeypatch.setattr("engine.processes.left_in_groups", lambda g=groups: [x * MB for x in g])
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert free_memory(CPU) == expected * MB


@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit of util-linux")
@pytest.mark.parametrize("limit", ["as", "data"])
def test_a_process_can_take_what_is_called_free_and_not_much_more(limit):
    """Under a limit that is really set, as batch systems set it."""
    script = f"""
import os, subprocess, torch
from engine.processes import free_memory
cpu = torch.device("cpu")
used = {{"as": "vms", "data": "data"}}["{limit}"]
import psutil
soft = getattr(psutil.Process().memory_info(), used) + 600 * 2**20
subprocess.run(["prlimit", "--pid", str(os.getpid()), f"--{limit}={{soft}}"], check=True)
free = free_memory(cpu)
assert 400 * 2**20 < free <= 600 * 2**20, free
taken = torch.empty(int(0.9 * free), dtype=torch.uint8)
del taken
try:
    torch.empty(int(1.1 * free), dtype=torch.uint8)
except RuntimeError as error:
    print("refused", error)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused")


# --- loading processes ---------------------------------------------------------------------------


def run_of(task, evaluate=False, **config):
    config = {"batch_size": 20, "eval_batch_size": 64, "image_size": 384, **config}
    return Run(
        argparse.Namespace(evaluate=evaluate, seed=0), task, config, Process(0, 1, CPU), None, ""
    )


IMAGE = 3 * 384 * 384 * 4


@pytest.mark.parametrize(
    ("run", "processes", "batches"),
    [
        (run_of(CAPTION, num_workers=4), "1", 2 * 4 * 64),  # images: of validations
        (run_of(CAPTION, num_workers=9, batch_size=80), "", 2 * 4 * 80),
        (run_of(CAPTION, evaluate=True, num_workers=4, batch_size=80), "1", 2 * 4 * 64),
        (run_of(NLVR, num_workers=4), "1", 2 * 4 * 64 * 2),
        (run_of(CAPTION, num_workers=4), "2", 2 * 4 * 64 * 2),
    ],
)
def test_small_shared_memory_is_said_before_a_bus_error(monkeypatch, run, processes, batches):
    Usage = namedtuple("Usage", "free")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 3, 6})
    needed = batches * IMAGE
    for free, hints in ((64 * MB, True), (needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: Usage(free))
        assert bool(shared_memory_hint(run)) == hints
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 * MB))
    said = shared_memory_hint(run)
    assert f"hold {needed / 1e9:.2g} GB of batches in /dev/shm, where 0.067 GB are free" in said
    assert "--shm-size" in said and "--num_workers" in said


def test_no_hint_without_loading_processes_or_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: 1 / 0)
    assert shared_memory_hint(run_of(CAPTION, num_workers=0)) is None
    assert shared_memory_hint(run_of(CAPTION, num_workers=4), str(tmp_path / "none")) is None


@pytest.mark.parametrize(("asked_for", "expected"), [(0, 0), (1, 1), (8, 2)])
def test_no_more_loading_processes_than_cpus_of_the_process(monkeypatch, asked_for, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    run = run_of(CAPTION, num_workers=asked_for)
    assert _loader_options(run)["num_workers"] == run.loading_processes == expected


# --- time to stop --------------------------------------------------------------------------------


def test_a_slow_checkpoint_asks_for_more_grace():
    assert grace_hint(TORCHRUN_GRACE / 3 - 0.1) == ""
    said = grace_hint(12.3)
    assert "--shutdown-timeout 37 (it is 30)" in said


def test_torchrun_has_the_flag_and_the_default_that_are_named(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    config, *_ = config_from_args(parse_args(["--shutdown-timeout", "37", "script.py"]))
    assert config.shutdown_timeout == 37
    default = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert default.shutdown_timeout == TORCHRUN_GRACE


def test_the_time_of_a_checkpoint_is_said_once(tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", make_scenes(tmp_path / "scenes"))
    argv = ["--config", config, "--output_dir", str(tmp_path), "--max_steps", "6"]
    argv += ["--checkpoint_steps", "2", "--eval_epochs", "0", "--final_threshold", "1"]
    train_caption.main(train_caption.parse_args(argv))
    assert capsys.readouterr().out.count("a checkpoint takes ") == 1
