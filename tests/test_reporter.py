"""Reports of a run: the progress line, and TensorBoard after a resume."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import reporter
from engine.processes import Process
from engine.reporter import LOG_FILE, Reporter
from engine.state import Progress, StepPlan


@pytest.fixture
def run(tmp_path):
    printed = []
    process = Process(0, 1, torch.device("cpu"))
    return SimpleNamespace(
        process=process, folder=tmp_path, samples_per_step=6, say=printed.append, printed=printed
    )


def report(run, first, last):
    """Reports of the steps after `first`, whose losses are first + 1."""
    state = SimpleNamespace(progress=Progress(step=first), plan=StepPlan(50, 4, 200, 10))
    reports = Reporter(run, state)
    for step in range(first + 1, last + 1):
        state.progress.step = step
        reports.progress(loss=first + 1.0, lr=1e-4)
    reports.close()


def test_speed_is_that_of_the_steps_since_the_start(run, monkeypatch):
    """Not of those before a resume, which were taken at another time."""
    now = iter([1000.0, 1005.0])
    monkeypatch.setattr(reporter.time, "monotonic", lambda: next(now))
    state = SimpleNamespace(progress=Progress(step=100), plan=StepPlan(50, 4, 720_201, 10))
    reports = Reporter(run, state)
    state.progress.step = 110
    reports.progress(loss=1.25, lr=1e-4)
    reports.close()
    (line,) = run.printed
    assert "step 110/720201  loss 1.2500  lr 1.00e-04  remaining 1.000  12.0 samples/s" in line
    assert "ETA 100:00:45" in line  # 720,091 steps at 2 a second


def test_a_resumed_run_takes_the_place_of_the_steps_that_it_takes_again(run):
    report(run, 0, 12)
    (file,) = (run.folder / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.1.earlier"))  # by the second in their names
    report(run, 10, 15)
    losses = EventAccumulator(str(run.folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 16))
    assert [event.value for event in losses] == [1.0] * 10 + [11.0] * 5


@pytest.mark.parametrize(("step", "stays"), [(0, False), (1, True)])
def test_a_run_that_starts_again_begins_its_log_anew(run, step, stays):
    (run.folder / LOG_FILE).write_text("{}\n")
    report(run, step, step)
    assert (run.folder / LOG_FILE).exists() == stays


def test_only_the_main_process_writes(run):
    run.process = dataclasses.replace(run.process, rank=1, world_size=2)
    report(run, 0, 1)
    assert list(run.folder.iterdir()) == [] == run.printed
