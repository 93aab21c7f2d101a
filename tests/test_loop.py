"""The training loop: the spread of a batch does not change the result, bad losses are named."""

import json
import math
from itertools import count

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.samplers import TrainBatchSampler
from engine import loop
from engine.loop import is_best
from models import Captioner
from tests import runs
from tests.runs import log_of, write_config


@pytest.fixture
def train(scenes, tmp_path):
    """Trains a small captioner, without validation, in one process or several."""

    def run(flags, processes=1, **changes):
        config = write_config(tmp_path / "run.yaml", scenes, **{"max_epoch": 1, **changes})
        argv = ["--config", config, "--output_dir", str(tmp_path), "--eval_epochs", "0"]
        argv += ["--resume", "off", "--final_threshold", "1", *flags.split()]
        if processes == 1:
            runs.run("train_caption", argv)
        else:
            assert runs.finish(runs.start(argv, processes)) == [0] * processes
        return tmp_path / "run"

    return run


def printed_losses(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_best_epoch_is_one_at_the_final_ratio():
    def epoch(ratio, score):
        return {"remaining_ratio": ratio, "accuracy": score}

    dense, pruned = epoch(1.0, 0.9), epoch(0.2, 0.5)
    assert not is_best(dense, [], "accuracy", final_ratio=0.2)
    assert is_best(pruned, [dense], "accuracy", final_ratio=0.2)
    assert not is_best(epoch(0.2, 0.4), [dense, pruned], "accuracy", final_ratio=0.2)
    assert not is_best({"remaining_ratio": 0.2}, [dense], "accuracy", final_ratio=0.2)


def test_a_step_does_not_depend_on_the_spread_of_its_batch(train):
    """Captions differ in length, so a mean of means would give another loss.

    One step: before it the weights are equal. Each of some 24 texts adds its loss in float32; sums
    in another order differ by a few times 2^-24 = 6e-8 of the whole.
    """

    def loss(flags, processes=1):
        (line,) = log_of(train(f"--max_steps 1 {flags}", processes, dropout=0.0))
        return line["loss"]

    whole = loss("--batch_size 8")
    assert loss("--batch_size 4") != pytest.approx(whole, rel=1e-4)
    accumulated = "--batch_size 2 --gradient_accumulation_steps"
    for spread in (loss(f"{accumulated} 4"), loss(f"{accumulated} 2", processes=2)):
        assert spread == pytest.approx(whole, rel=1e-6)


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
    with runs.stopped_at(5, SystemExit), pytest.raises(SystemExit):
        train("--final_threshold 0.9 --warmup_steps 1")
    assert list(printed_losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_printed_losses_are_means_over_their_steps(train):
    """Of an epoch that ends early, too."""
    folder = train("--max_steps 9 --checkpoint_steps 3 --batch_size 8")
    printed = printed_losses(folder)
    expected = [(printed[3] + printed[6]) / 2, printed[9]]  # kept in float32
    assert [line["loss"] for line in log_of(folder)] == pytest.approx(expected, rel=1e-6)
