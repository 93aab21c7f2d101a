import pytest

from pruners.schedule import CubicSchedule


def schedule(**changes) -> CubicSchedule:
    """100 steps: 20 initial, 50 cubic, 30 final."""
    arguments = dict(
        total_steps=100,
        initial_threshold=1.0,
        final_threshold=0.2,
        initial_warmup=2,
        final_warmup=3,
        warmup_steps=10,
    )
    return CubicSchedule(**(arguments | changes))


@pytest.mark.parametrize(
    "step, ratio",
    [
        (1, 1.0),
        (20, 1.0),
        (21, 0.2 + 0.8 * 0.98**3),
        (45, 0.2 + 0.8 / 8),  # midpoint
        (70, 0.2),
        (71, 0.2),
        (100, 0.2),
    ],
)
def test_remaining_ratio(step, ratio):
    assert schedule().remaining_ratio(step) == pytest.approx(ratio, abs=1e-15)


def test_ratio_starts_from_the_initial_threshold():
    ramp = schedule(initial_threshold=0.6)
    assert ramp.remaining_ratio(20) == 0.6
    assert ramp.remaining_ratio(45) == pytest.approx(0.2 + 0.4 / 8)


def test_masks_every_delta_t_at_epoch_ends_and_always_at_last():
    ramp = schedule(delta_t=15, steps_per_epoch=32)
    masked = [step for step in range(1, 101) if ramp.masks_at(step)]
    assert masked == [30, 32, 45, 60, 64, *range(71, 101)]


def test_without_warmups_the_whole_run_is_the_ramp():
    ramp = schedule(initial_warmup=0, final_warmup=0)
    assert ramp.remaining_ratio(50) == pytest.approx(0.3)
    assert [step for step in range(1, 101) if ramp.masks_at(step)] == list(range(10, 101, 10))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup_steps": 21}, "longer than the run"),
        ({"final_threshold": 0.0}, "final_threshold"),
        ({"initial_threshold": 0.1}, "initial_threshold"),
        ({"delta_t": 0}, "delta_t"),
        ({"final_warmup": -1}, "negative"),
    ],
)
def test_bad_schedules_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule(**changes)
