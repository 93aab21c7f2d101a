import pytest

from pruners.schedule import CubicSchedule
from utils import UserError


def schedule(**changes) -> CubicSchedule:
    """100 steps: 20 initial, 50 cubic, 30 final."""
    arguments = dict(total_steps=100, initial_threshold=1.0, final_threshold=0.2)
    arguments |= dict(initial_warmup=2, final_warmup=3, warmup_steps=10)
    return CubicSchedule(**(arguments | changes))


def test_the_share_falls_from_the_initial_threshold():
    """From 1 it falls to the goldens' shares, see test_pruner."""
    shares = [schedule(initial_threshold=0.6).remaining_ratio(step) for step in (20, 45, 70)]
    assert shares == pytest.approx([0.6, 0.2 + 0.4 / 8, 0.2], abs=1e-15)


def test_masks_every_delta_t_at_epoch_ends_and_always_at_last():
    ramp = schedule(delta_t=15, steps_per_epoch=32)
    masked = [step for step in range(1, 101) if ramp.masks_at(step)]
    assert masked == [30, 32, 45, 60, 64, *range(71, 101)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"final_threshold": 0.0}, "fractions that remain.*final_threshold 0.0"),
        ({"final_threshold": float("nan")}, "fractions that remain.*final_threshold nan"),
        ({"final_threshold": 1.0, "initial_threshold": 0.5}, "fractions that remain"),
        ({"initial_threshold": 0.1}, "final <= initial.*initial_threshold 0.1"),
        ({"delta_t": 0}, "delta_t must be at least 1, got 0"),
        ({"initial_warmup": -1}, "initial_warmup must be at least 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 20}, r"\(2 initial \+ 3 final\) x 20 .* = 100, .* 100 steps.*take more"),
        ({"first_scored": 101}, "all scores are zero until step 101.*lower delta_t"),
        ({"final_warmup": 0, "delta_t": 30}, "above final_threshold 0.2.*step 100.*delta_t 30"),
        ({"final_warmup": 0, "delta_t": 30, "steps_per_epoch": 40}, "above final_threshold 0.2"),
    ],
)
def test_bad_schedules_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        schedule(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"total_steps": 51},
        {"first_scored": 100},
        {"final_warmup": 0, "initial_warmup": 0},
        {"final_warmup": 0, "delta_t": 30, "steps_per_epoch": 50},
        {"warmup_steps": 0},
        {"final_threshold": 1.0, "total_steps": 2, "first_scored": 10},  # prunes nothing
    ],
)
def test_schedules_that_just_fit_end_at_the_final_threshold(changes):
    ramp = schedule(**changes)
    assert ramp.remaining_ratio(ramp.total_steps) == ramp.final_threshold
    assert ramp.masks_at(ramp.total_steps) or ramp.final_threshold == 1
