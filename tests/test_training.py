"""The parts of training.py, and that the spread of a batch does not change the result."""

import argparse
import json
import math

import pytest
import torch

import train_caption
from data import TrainBatchSampler
from engine import loop as training
from models import Captioner, vit
from tests.kill_and_resume import finish, make_scenes, result, same, start, write_config


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


def schedule(**changes):
    flags = {"max_steps": None, "warmup_steps": None, "initial_warmup": 1, "final_warmup": 1}
    return argparse.Namespace(**{**flags, "final_threshold": 0.2, **changes})


def test_paper_schedule():
    plan = training.plan_steps(schedule(), samples=566_747, samples_per_step=40, max_epoch=5)
    assert plan == training.Plan(14168, 5, 70840, 14168)


def test_max_steps_replaces_epochs():
    plan = training.plan_steps(schedule(max_steps=25, warmup_steps=3), 100, 10, max_epoch=1)
    assert plan == training.Plan(10, 3, 25, 3)


@pytest.mark.parametrize("changes", [{"warmup_steps": 10}, {"max_steps": 4}, {"final_warmup": 4}])
def test_schedule_longer_than_the_run(changes):
    with pytest.raises(ValueError, match=r"longer than the run.*= \d+, but the run has"):
        training.plan_steps(schedule(**changes), samples=20, samples_per_step=5, max_epoch=5)


def test_nothing_to_prune_needs_no_schedule():
    plan = training.plan_steps(schedule(final_threshold=1.0), 20, 10, max_epoch=1)
    assert plan.total_steps == 2


def test_learning_rate_is_a_cosine_by_epoch():
    rates = [training.learning_rate(epoch, 4, init_lr=3.0, min_lr=1.0) for epoch in range(5)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([3, 2 + half, 2, 2 - half, 1])


def test_best_epoch_is_one_at_the_final_ratio():
    def epoch(ratio, score):
        return {"remaining_ratio": ratio, "accuracy": score}

    dense, pruned = epoch(1.0, 0.9), epoch(0.2, 0.5)
    assert not training.is_best(dense, [], "accuracy", final_ratio=0.2)
    assert training.is_best(pruned, [dense], "accuracy", final_ratio=0.2)
    assert not training.is_best(epoch(0.2, 0.4), [dense, pruned], "accuracy", final_ratio=0.2)
    assert not training.is_best({"remaining_ratio": 0.2}, [dense], "accuracy", final_ratio=0.2)


def test_result_does_not_depend_on_the_spread_of_a_batch(tmp_path, scenes):
    """Captions differ in length, so a mean of means would give another loss."""
    config = write_config(tmp_path / "config.yaml", scenes, dropout=0.0, max_epoch=2)

    def run(name, world_size, *flags):
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name]
        argv += ["--final_threshold", "1", "--eval_epochs", "0", *flags]
        if world_size == 1:
            train_caption.main(train_caption.parse_args(argv))
        else:
            assert finish(start(argv, world_size)) == [0] * world_size
        log = (tmp_path / name / "log.txt").read_text().splitlines()
        return [json.loads(line)["loss"] for line in log], result(tmp_path / name)

    losses, weights = run("one", 1, "--batch_size", "4")
    for other, other_weights in [
        run("accumulated", 1, "--batch_size", "2", "--gradient_accumulation_steps", "2"),
        run("two", 2, "--batch_size", "2"),
    ]:
        assert other == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            # a bias of keys has no gradient but rounding errors, which AdamW blows up
            if not name.endswith(("key.bias", "qkv.bias")):
                torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-4)


def test_recomputed_blocks_change_nothing(tmp_path, scenes, monkeypatch):
    """With drop path, so that recomputation must restore the random state."""
    recomputed = []
    checkpoint_seq = vit.checkpoint_seq
    monkeypatch.setattr(
        vit, "checkpoint_seq", lambda b, x: recomputed.append(len(b)) or checkpoint_seq(b, x)
    )
    for name, layers in [("plain", {}), ("one", {"vit_grad_ckpt": True, "vit_ckpt_layer": 1})]:
        config = write_config(tmp_path / f"{name}.yaml", scenes, max_epoch=1, **layers)
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name]
        train_caption.main(
            train_caption.parse_args([*argv, "--final_threshold", "1", "--eval_epochs", "0"])
        )
    assert recomputed == [1] * 24
    assert same(result(tmp_path / "plain"), result(tmp_path / "one"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_that_is_not_finite_names_its_images(tmp_path, scenes, monkeypatch, accumulation):
    argv = ["--config", write_config(tmp_path / "c.yaml", scenes), "--output_dir", str(tmp_path)]
    argv += ["--gradient_accumulation_steps", str(accumulation), "--checkpoint_steps", "4"]
    args = train_caption.parse_args([*argv, "--warmup_steps", "2"])
    forward, calls, seen = Captioner.forward, [], []

    def bad_at_sixth_step(self, image, captions):
        calls.append(captions)
        loss = forward(self, image, captions)
        step = math.ceil(len(calls) / accumulation)
        if step == 6:
            seen.extend(captions)
        return loss * (math.nan if step == 6 else 1)

    monkeypatch.setattr(Captioner, "forward", bad_at_sixth_step)
    with pytest.raises(FloatingPointError) as raised:
        train_caption.main(args)
    message = str(raised.value)
    assert "the loss of step 6 is nan" in message and "step_00000004.pt" in message
    named = message.split("Images of the step: ")[1].split(". Last checkpoint")[0].split(", ")
    annotation = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    order = [
        index for batch in TrainBatchSampler(len(annotation), 2, args.seed) for index, _ in batch
    ]
    samples = 2 * accumulation
    expected = [annotation[i]["image"] for i in order[5 * samples : 6 * samples]]
    assert [name.rpartition("/images/")[2] for name in named] == expected
    assert len(seen) == samples
