"""A killed or stopped run, resumed, ends with the weights of one that ran through."""

import os
import signal

import pytest

import train_caption
from engine import loop
from engine.stopping import EXIT_STOPPED
from tests.kill_and_resume import kill_and_resume
from tests.runs import (
    finish,
    make_scenes,
    result,
    same,
    saved_steps,
    start,
    wait_for_step,
    write_config,
)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A config, the flags of a run that prunes, and the folder of that run when it ran through."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "config.yaml", make_scenes(folder / "scenes"), max_epoch=3)
    flags = ["--config", config, "--output_dir", str(folder), "--final_threshold", "0.3"]
    flags += ["--warmup_steps", "4", "--checkpoint_steps", "10", "--eval_epochs", "0"]
    train(flags, "whole")
    return flags, folder


def train(flags: list[str], name: str, *more: str) -> None:
    train_caption.main(train_caption.parse_args([*flags, "--model_dir", name, *more]))


def interrupt_after(step: int, monkeypatch, action) -> None:
    """Calls `action` at the end of a step."""
    train_step = loop.train_step

    def interrupted(run, state, parts, weights):
        train_step(run, state, parts, weights)
        if state.progress.step == step:
            action()

    monkeypatch.setattr(loop, "train_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_exits(setup, monkeypatch, number):
    flags, folder = setup
    name = f"stopped_by_{number.name}"
    with monkeypatch.context() as patch:
        interrupt_after(12, patch, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stopped:
            train(flags, name)
    assert stopped.value.code == EXIT_STOPPED == 75
    assert saved_steps(folder / name)[-1] == 13  # the step in which the signal is noticed
    train(flags, name)
    assert same(result(folder / name), result(folder / "whole"))
    assert (folder / name / "log.txt").read_text() == (folder / "whole/log.txt").read_text()


@pytest.mark.parametrize("when", ["last step", "validation"])
def test_signal_at_the_end_of_an_epoch_exits(setup, monkeypatch, when):
    flags, folder = setup
    with monkeypatch.context() as patch:
        if when == "last step":
            interrupt_after(24, patch, lambda: signal.raise_signal(signal.SIGINT))
        else:
            patch.setattr(loop, "finish_epoch", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            train(flags, when)
    assert stopped.value.code == EXIT_STOPPED
    assert saved_steps(folder / when)[-1] == 24
    train(flags, when)
    assert same(result(folder / when), result(folder / "whole"))


def test_signal_to_all_processes_of_a_run(tmp_path):
    """To the groups of two trainers, so to their image loading processes too."""
    scenes = make_scenes(tmp_path / "scenes")
    config = write_config(tmp_path / "c.yaml", scenes, num_workers=1, max_epoch=3)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--final_threshold", "0.3"]
    argv += ["--warmup_steps", "4", "--checkpoint_steps", "2", "--eval_epochs", "0"]
    assert finish(start([*argv, "--model_dir", "whole"], 2)) == [0, 0]
    for number, told in ((signal.SIGTERM, [0, 1]), (signal.SIGINT, [1])):  # one tells the other
        stopped = tmp_path / number.name
        started = start([*argv, "--model_dir", stopped.name], 2)
        wait_for_step(stopped, started[0], 14)
        for rank in told:
            os.killpg(started[rank].pid, number)
        assert finish(started) == [EXIT_STOPPED] * 2
        assert saved_steps(stopped)[-1] < 36
        assert finish(start([*argv, "--model_dir", stopped.name], 2)) == [0, 0]
        assert same(result(stopped), result(tmp_path / "whole"))


def test_truncated_checkpoint_falls_back_to_the_one_before(setup, monkeypatch, capsys):
    flags, folder = setup

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    with monkeypatch.context() as patch:
        interrupt_after(26, patch, crash)
        with pytest.raises(Crash):
            train(flags, "truncated")
    assert saved_steps(folder / "truncated") == [20, 24]
    newest = folder / "truncated/checkpoints/step_00000024.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    (folder / "truncated/checkpoints/.step_00000030.pt.x").write_bytes(b"half a write")
    capsys.readouterr()
    train(flags, "truncated")
    said = capsys.readouterr().out
    assert "step_00000024.pt is not whole" in said and "falling back to the one before" in said
    assert "step_00000020.pt: 20 of 72 steps done" in said
    assert same(result(folder / "truncated"), result(folder / "whole"))
    assert not list((folder / "truncated/checkpoints").glob(".*"))


def test_no_whole_checkpoint_is_an_error(setup):
    flags, folder = setup
    checkpoints = folder / "broken/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000007.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="step_00000007.pt.*--resume off starts again"):
        train(flags, "broken")


def test_finished_run_is_left_as_it_is(setup):
    flags, folder = setup
    before, log = result(folder / "whole"), (folder / "whole/log.txt").read_text()
    train(flags, "whole")
    assert same(result(folder / "whole"), before)
    assert (folder / "whole/log.txt").read_text() == log


def test_checkpoint_of_another_run_is_an_error(setup):
    flags, _ = setup
    with pytest.raises(ValueError, match="of another run: seed was 42, is 7.*--resume off"):
        train(flags, "whole", "--seed", "7")


def test_resume_from_a_file_and_keep_checkpoints(setup):
    flags, folder = setup
    train(flags, "kept", "--keep_checkpoints", "4")
    assert saved_steps(folder / "kept") == [50, 60, 70, 72]
    middle = folder / "kept/checkpoints/step_00000050.pt"
    train(flags, "from_file", "--resume", str(middle))
    assert same(result(folder / "from_file"), result(folder / "whole"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_kill_and_resume(tmp_path, world_size):
    config = write_config(tmp_path / "c.yaml", make_scenes(tmp_path / "scenes"), num_workers=1)
    trials = kill_and_resume(config, tmp_path, world_size, kills=1, seed=world_size)
    assert [trial["equal"] for trial in trials] == [True]
    assert trials[0]["step"] > 0  # it was killed with something to resume


@pytest.mark.slow
@pytest.mark.parametrize("world_size, kills", [(1, 20), (2, 10)])
def test_many_kills(tmp_path, world_size, kills):
    config = write_config(tmp_path / "c.yaml", make_scenes(tmp_path / "scenes"), num_workers=1)
    trials = kill_and_resume(config, tmp_path, world_size, kills)
    assert [trial["equal"] for trial in trials] == [True] * kills
