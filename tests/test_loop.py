"""The training loop: bad losses are named; the log, the progress line, and TensorBoard."""

import dataclasses
import json
import math
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.samplers import TrainBatchSampler
from engine import loop, reporter
from engine.loop import is_best
from engine.processes import Process
from engine.reporter import Reporter
from engine.state import Progress, StepPlan
from models import Captioner
from tests import runs
from tests.runs import log_of, write_config


@pytest.fixture
def train(scenes, tmp_path):
    """Trains a small captioner, without validation."""

    def run(flags, **changes):
        config = write_config(tmp_path / "run.yaml", scenes, **{"max_epoch": 1, **changes})
        flags = f"--eval_epochs 0 --final_threshold 1 {flags}".split()
        return runs.train(config, tmp_path, "run", *flags)

    return run


def printed_losses(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_best_epoch_is_one_at_the_final_ratio():
    def epoch(ratio, score):
        return {"remaining_ratio": ratio, "accuracy": score}

    dense, pruned = epoch(1.0, 0.9), epoch(0.2, 0.5)
    assert not is_best(dense, [], "accuracy", final_ratio=0.2)
    assert is_best(pruned, [dense], "accuracy", final_ratio=0.2)
    assert not is_best(epoch(0.2, 0.4), [dense, pruned], "accuracy", final_ratio=0.2)
    assert not is_best({"remaining_ratio": 0.2}, [dense], "accuracy", final_ratio=0.2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_that_is_not_finite_names_its_images(train, scenes, monkeypatch, accumulation):
    forward, calls = Captioner.forward, count(1)

    def bad_at_sixth_step(self, *inputs):
        step = math.ceil(next(calls) / accumulation)
        return forward(self, *inputs) * (math.nan if step == 6 else 1)

    monkeypatch.setattr(Captioner, "forward", bad_at_sixth_step)
    flags = f"--gradient_accumulation_steps {accumulation} --checkpoint_steps 4"
    with pytest.raises(FloatingPointError) as raised:
        train(flags, max_epoch=4)
    message = str(raised.value)
    assert "the loss of step 6 is nan" in message and "step_00000004.pt" in message
    named = message.split("Images of the step: ")[1].split(". Last checkpoint")[0].split(", ")
    annotation = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    order = [index for batch in TrainBatchSampler(len(annotation), 2, 42) for index, _ in batch]
    samples = 2 * accumulation
    expected = [annotation[i]["image"] for i in order[5 * samples : 6 * samples]]
    assert [name.rpartition("/images/")[2] for name in named] == expected


def test_tensorboard_holds_all_when_a_run_is_stopped(train, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)
    with runs.stopped_at(5):
        train("--final_threshold 0.9 --warmup_steps 1")
    assert list(dict(printed_losses(tmp_path / "run"))) == [1, 2, 3, 4]


def test_printed_losses_are_means_over_their_steps(train):
    """Of an epoch that ends early, too."""
    folder = train("--max_steps 9 --checkpoint_steps 3 --batch_size 8")
    printed = dict(printed_losses(folder))
    expected = [(printed[3] + printed[6]) / 2, printed[9]]  # kept in float32
    assert [line["loss"] for line in log_of(folder)] == pytest.approx(expected, rel=1e-6)


# --- the reporter


@pytest.fixture
def run(tmp_path):
    process, printed = Process(0, 1, torch.device("cpu")), []
    run = SimpleNamespace(process=process, folder=tmp_path, samples_per_step=6, printed=printed)
    run.say = printed.append
    return run


def report(run, first, last, loss=1.0):
    """Reports of the steps after `first`."""
    state = SimpleNamespace(progress=Progress(step=first), plan=StepPlan(50, 4, 720_201, 10))
    reports = Reporter(run, state)
    for step in range(first + 1, last + 1):
        state.progress.step = step
        reports.progress(loss=loss, lr=1e-4)
    reports.close()


def test_speed_is_that_of_the_steps_since_the_start(run, monkeypatch):
    """Not of those before a resume, which were taken at another time."""
    now = iter([1000.0, 1000.5])
    monkeypatch.setattr(reporter.time, "monotonic", lambda: next(now))
    report(run, 109, 110, loss=1.25)
    (line,) = run.printed
    assert "step 110/720201  loss 1.2500  lr 1.00e-04  remaining 1.000  12.0 samples/s" in line
    assert "ETA 100:00:45" in line  # 720,091 steps at 2 a second


def test_a_resumed_run_takes_the_place_of_the_steps_that_it_takes_again(run):
    report(run, 0, 12)
    (file,) = (run.folder / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.1.earlier"))  # by the second in their names
    report(run, 10, 15, loss=2.0)
    expected = [*enumerate([1.0] * 10 + [2.0] * 5, start=1)]
    assert printed_losses(run.folder) == expected


def test_only_the_main_process_writes(run):
    run.process = dataclasses.replace(run.process, rank=1, world_size=2)
    report(run, 0, 1)
    assert list(run.folder.iterdir()) == [] == run.printed
