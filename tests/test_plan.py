"""Counting steps, and the learning rate."""

import argparse
import math

import pytest

from engine.loop import learning_rate
from engine.state import StepPlan, plan_steps
from utils import UserError


def schedule(**changes):
    return argparse.Namespace(**{"max_steps": None, "warmup_steps": None, **changes})


def test_paper_schedule():
    plan = plan_steps(schedule(), samples=566_747, samples_per_step=40, max_epoch=5)
    assert plan == StepPlan(14168, 5, 70840, 14168)


def test_max_steps_replaces_epochs():
    plan = plan_steps(schedule(max_steps=25, warmup_steps=3), 100, 10, max_epoch=1)
    assert plan == StepPlan(10, 3, 25, 3)


def test_a_warm_up_may_have_no_step():
    assert plan_steps(schedule(warmup_steps=0), 100, 10, max_epoch=1).warmup_steps == 0


def test_an_epoch_needs_a_step():
    with pytest.raises(UserError, match=r"takes 21 samples .* training set has 20"):
        plan_steps(schedule(), samples=20, samples_per_step=21, max_epoch=5)


def test_the_last_epoch_may_end_early():
    plan = StepPlan(steps_per_epoch=10, epochs=3, total_steps=25, warmup_steps=3)
    assert [plan.steps_of(epoch) for epoch in range(3)] == [10, 10, 5]


def test_learning_rate_is_a_cosine_by_epoch():
    rates = [learning_rate(epoch, 4, init_lr=3.0, min_lr=1.0) for epoch in range(5)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([3, 2 + half, 2, 2 - half, 1])
