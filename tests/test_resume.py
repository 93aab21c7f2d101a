"""A killed or stopped run, resumed, ends with the weights of one that ran through."""

import os
import shutil
import signal
import time

import pytest

from engine.stopping import EXIT_STOPPED
from models import Captioner
from tests import runs
from utils import UserError

PRUNE = ["--final_threshold", "0.3", "--warmup_steps", "2", "--deltaT", "2", "--eval_epochs", "0"]


@pytest.fixture(scope="module")
def train(scenes, tmp_path_factory):
    """Trains for 12 steps in 2 epochs and returns the folder."""
    folder = tmp_path_factory.mktemp("runs")
    config = runs.write_config(folder / "config.yaml", scenes, batch_size=8, max_epoch=2)
    flags = ["--config", config, "--output_dir", str(folder), *PRUNE, "--checkpoint_steps", "5"]

    def run(name, *more):
        runs.run("train_caption", [*flags, "--model_dir", name, *more])
        return folder / name

    return run


@pytest.fixture(scope="module")
def whole(train):
    """The folder of a run that ran through."""
    return train("whole")


@pytest.mark.parametrize(
    ("number", "step", "saved"),
    [(signal.SIGTERM, 3, 4), (signal.SIGINT, 3, 4), (signal.SIGTERM, 6, 6)],  # at an epoch's end
)
def test_signal_finishes_the_step_saves_and_exits(train, whole, number, step, saved):
    name = f"stopped_by_{number.name}_{step}"
    with runs.stopped_at(step, signal=number), pytest.raises(SystemExit) as stopped:
        train(name)
    assert stopped.value.code == EXIT_STOPPED == 75
    folder = whole.with_name(name)
    assert runs.saved_steps(folder)[-1] == saved  # the step in which the signal is noticed
    train(name)
    assert runs.same(runs.result(folder), runs.result(whole))
    assert runs.log_of(folder) == runs.log_of(whole)


def test_signal_in_a_validation_ends_it_at_once(train, whole, monkeypatch):
    encode_image = Captioner.encode_image

    def interrupted(self, image):
        if not self.training:
            signal.raise_signal(signal.SIGTERM)
        return encode_image(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "encode_image", interrupted)
        with pytest.raises(SystemExit, match="75"):
            train("validation", "--eval_epochs", "1")
    folder = whole.with_name("validation")
    assert runs.saved_steps(folder)[-1] == 6
    assert not (folder / "results").exists()
    train("validation")
    assert runs.same(runs.result(folder), runs.result(whole))


def test_truncated_checkpoint_falls_back_to_the_one_before(train, whole, capsys):
    with runs.stopped_at(8, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train("truncated")
    folder = whole.with_name("truncated")
    assert runs.saved_steps(folder) == [5, 6]
    newest = folder / "checkpoints/step_00000006.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    (folder / "checkpoints/.step_00000010.pt.x").write_bytes(b"half a write")
    train("truncated")
    printed = capsys.readouterr().out
    assert "step_00000006.pt is not whole" in printed and "falling back to the one" in printed
    assert "step_00000005.pt: 5 of 12 steps done" in printed
    assert runs.same(runs.result(folder), runs.result(whole))
    assert not list((folder / "checkpoints").glob(".*"))


def test_no_whole_checkpoint_is_an_error(train, whole):
    checkpoints = whole.with_name("broken") / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000007.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="step_00000007.pt.*--resume off starts again"):
        train("broken")


def test_resume_from_a_file_and_keep_checkpoints(train, whole):
    kept = train("kept", "--keep_checkpoints", "3", "--checkpoint_steps", "4")
    assert runs.saved_steps(kept) == [6, 8, 12]
    from_file = train("from_file", "--resume", str(kept / "checkpoints/step_00000008.pt"))
    assert runs.same(runs.result(from_file), runs.result(whole))


def test_two_processes_that_are_stopped_and_killed_end_as_undisturbed_ones(scenes, tmp_path):
    """SIGTERM to all, also to loading processes; SIGINT to one, which stops the other; SIGKILL."""
    changes = {"batch_size": 1, "max_epoch": 1, "num_workers": 1}  # 24 steps
    flags = ["--config", runs.write_config(tmp_path / "c.yaml", scenes, **changes), *PRUNE]
    flags += ["--output_dir", str(tmp_path), "--checkpoint_steps", "2", "--model_dir"]
    assert runs.finish(runs.start([*flags, "whole"], 2)) == [0, 0]
    folder, reached = tmp_path / "run", 0
    for number, ranks in ((signal.SIGTERM, [0, 1]), (signal.SIGINT, [1]), (signal.SIGKILL, [0])):
        started = runs.start([*flags, "run"], 2)
        while max(runs.saved_steps(folder), default=0) < reached + 2 and started[0].is_alive():
            time.sleep(0.002)
        for rank in ranks:
            os.killpg(started[rank].pid, number)
        codes = runs.finish(started, timeout=60)
        assert None not in codes, "a process outlived the stopped one"
        assert number == signal.SIGKILL or codes == [EXIT_STOPPED] * 2
        assert reached < runs.saved_steps(folder)[-1] < 24
        reached = runs.saved_steps(folder)[-1]
    assert runs.finish(runs.start([*flags, "run"], 2)) == [0, 0]
    assert runs.same(runs.result(folder), runs.result(tmp_path / "whole"))


def test_a_finished_run_says_what_may_go_and_needs_it_no_more(train, capsys):
    spare = train("spare", "--keep_checkpoints", "1")
    size = sum(path.stat().st_size for path in (spare / "checkpoints").iterdir())
    said = f"{spare / 'checkpoints'}: {size / 1e9:.2g} GB, which may go"
    assert said in capsys.readouterr().out
    lean = train("lean", "--keep_checkpoints", "0")
    assert not (lean / "checkpoints").exists()
    assert "which may go" not in capsys.readouterr().out
    assert runs.same(runs.result(lean), runs.result(spare))
    shutil.rmtree(spare / "checkpoints")
    written = {folder: (folder / "log.txt").stat().st_mtime_ns for folder in (lean, spare)}
    for folder in written:  # the same commands again
        train(folder.name)
        assert "already finished" in capsys.readouterr().out
        assert (folder / "log.txt").stat().st_mtime_ns == written[folder]
    for folder, again in ((lean, "--resume=off"), (spare, "--seed=7")):
        train(folder.name, again)
        assert "already finished" not in capsys.readouterr().out
        assert (folder / "log.txt").stat().st_mtime_ns > written[folder]
