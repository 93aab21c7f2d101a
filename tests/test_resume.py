"""A killed or stopped run, resumed, ends with the weights of one that ran through."""

import os
import random
import shutil
import signal
import time

import pytest

from engine.stopping import EXIT_STOPPED
from models import Captioner
from tests import runs
from utils import UserError

PRUNE = ["--final_threshold", "0.3", "--warmup_steps", "2", "--deltaT", "2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return runs.make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def setup(scenes, tmp_path_factory):
    """The flags of a run of 12 steps in 2 epochs, and the folder of one that ran through."""
    folder = tmp_path_factory.mktemp("runs")
    config = runs.write_config(folder / "config.yaml", scenes, batch_size=8, max_epoch=2)
    flags = ["--config", config, "--output_dir", str(folder), *PRUNE]
    flags += ["--checkpoint_steps", "5", "--eval_epochs", "0"]
    train(flags, "whole")
    return flags, folder


def train(flags: list[str], name: str, *more: str) -> None:
    runs.run("train_caption", [*flags, "--model_dir", name, *more])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("step", "saved"), [(3, 4), (6, 6)])  # in an epoch, and at its end
def test_signal_finishes_the_step_saves_and_exits(setup, number, step, saved):
    flags, folder = setup
    name = f"stopped_by_{number.name}_{step}"
    with runs.stopped_at(step, signal=number), pytest.raises(SystemExit) as stopped:
        train(flags, name)
    assert stopped.value.code == EXIT_STOPPED == 75
    assert runs.saved_steps(folder / name)[-1] == saved  # the step in which the signal is noticed
    train(flags, name)
    assert runs.same(runs.result(folder / name), runs.result(folder / "whole"))
    assert runs.log_of(folder / name) == runs.log_of(folder / "whole")


def test_signal_in_a_validation_ends_it_at_once(setup, monkeypatch):
    flags, folder = setup
    encode_image = Captioner.encode_image

    def interrupted(self, image):
        if not self.training:
            signal.raise_signal(signal.SIGTERM)
        return encode_image(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "encode_image", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(flags, "validation", "--eval_epochs", "1")
    assert stopped.value.code == EXIT_STOPPED
    assert runs.saved_steps(folder / "validation")[-1] == 6
    assert not (folder / "validation/results").exists()
    train(flags, "validation")
    assert runs.same(runs.result(folder / "validation"), runs.result(folder / "whole"))


def test_truncated_checkpoint_falls_back_to_the_one_before(setup, capsys):
    flags, folder = setup
    with runs.stopped_at(8, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(flags, "truncated")
    assert runs.saved_steps(folder / "truncated") == [5, 6]
    newest = folder / "truncated/checkpoints/step_00000006.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    (folder / "truncated/checkpoints/.step_00000010.pt.x").write_bytes(b"half a write")
    capsys.readouterr()
    train(flags, "truncated")
    printed = capsys.readouterr().out
    assert "step_00000006.pt is not whole" in printed and "falling back to the one" in printed
    assert "step_00000005.pt: 5 of 12 steps done" in printed
    assert runs.same(runs.result(folder / "truncated"), runs.result(folder / "whole"))
    assert not list((folder / "truncated/checkpoints").glob(".*"))


def test_no_whole_checkpoint_is_an_error(setup):
    flags, folder = setup
    checkpoints = folder / "broken/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000007.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="step_00000007.pt.*--resume off starts again"):
        train(flags, "broken")


def test_finished_run_is_left_as_it_is(setup):
    """By the same command, and by that of another run, which is refused."""
    flags, folder = setup
    files = [path for path in (folder / "whole").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files if path.name != ".lock"}
    train(flags, "whole")
    with pytest.raises(UserError, match="of another run: seed was 42, is 7.*--resume off"):
        train(flags, "whole", "--seed", "7")
    with pytest.raises(UserError, match="final_threshold was 0.3, is 0.1"):
        train(flags, "whole", "--final_threshold", "0.1")
    assert {path: path.read_bytes() for path in before} == before


def test_resume_from_a_file_and_keep_checkpoints(setup):
    flags, folder = setup
    train(flags, "kept", "--keep_checkpoints", "3", "--checkpoint_steps", "4")
    assert runs.saved_steps(folder / "kept") == [6, 8, 12]
    middle = folder / "kept/checkpoints/step_00000008.pt"
    train(flags, "from_file", "--resume", str(middle))
    assert runs.same(runs.result(folder / "from_file"), runs.result(folder / "whole"))


@pytest.fixture
def two(scenes, tmp_path):
    """Flags of a run of two processes: an epoch of 24 steps, with loading processes."""
    changes = {"batch_size": 1, "max_epoch": 1, "num_workers": 1}
    flags = ["--config", runs.write_config(tmp_path / "c.yaml", scenes, **changes), *PRUNE]
    flags += ["--output_dir", str(tmp_path), "--checkpoint_steps", "2", "--eval_epochs", "0"]
    return [*flags, "--model_dir"]


def test_two_processes_that_are_stopped_and_killed_end_as_undisturbed_ones(two, tmp_path):
    """SIGTERM to all, also to loading processes; SIGINT to one, which stops the other; SIGKILL."""
    assert runs.finish(runs.start([*two, "whole"], 2)) == [0, 0]
    last, folder, reached = runs.saved_steps(tmp_path / "whole")[-1], tmp_path / "run", 0
    for number, ranks in ((signal.SIGTERM, [0, 1]), (signal.SIGINT, [1]), (signal.SIGKILL, [0])):
        started = runs.start([*two, "run"], 2)
        runs.wait_for_step(folder, started[0], reached + 2)
        for rank in ranks:
            os.killpg(started[rank].pid, number)
        codes = runs.finish(started, timeout=60)
        assert None not in codes, "a process outlived the stopped one"
        assert number == signal.SIGKILL or codes == [EXIT_STOPPED] * 2
        assert reached < runs.saved_steps(folder)[-1] < last
        reached = runs.saved_steps(folder)[-1]
    assert runs.finish(runs.start([*two, "run"], 2)) == [0, 0]
    assert runs.same(runs.result(folder), runs.result(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "kills"), [(1, 20), (2, 10)])
def test_many_kills(two, tmp_path, world_size, kills):
    """At random moments."""
    chance = random.Random(0)
    assert runs.finish(runs.start([*two, "whole"], world_size)) == [0] * world_size
    last = runs.saved_steps(tmp_path / "whole")[-1]
    for trial in range(kills):
        folder = tmp_path / f"killed{trial}"
        started = runs.start([*two, folder.name], world_size)
        runs.wait_for_step(folder, started[0], chance.randint(0, last))
        time.sleep(chance.uniform(0, 0.5))
        started[chance.randrange(world_size)].kill()
        assert None not in runs.finish(started, timeout=60), "a process outlived the killed one"
        assert runs.finish(runs.start([*two, folder.name], world_size)) == [0] * world_size
        assert runs.same(runs.result(folder), runs.result(tmp_path / "whole"))


def test_a_finished_run_says_what_may_go_and_needs_it_no_more(setup, capsys):
    flags, folder = setup
    train(flags, "spare", "--keep_checkpoints", "1")
    size = sum(path.stat().st_size for path in (folder / "spare/checkpoints").iterdir())
    said = f"{folder / 'spare/checkpoints'}: {size / 1e9:.2g} GB, which may go"
    assert said in capsys.readouterr().out
    train(flags, "lean", "--keep_checkpoints", "0")
    assert not (folder / "lean/checkpoints").exists()
    assert "which may go" not in capsys.readouterr().out
    assert runs.same(runs.result(folder / "lean"), runs.result(folder / "spare"))
    shutil.rmtree(folder / "spare/checkpoints")
    written = {name: (folder / name / "log.txt").stat().st_mtime_ns for name in ("lean", "spare")}
    for name in written:  # the same commands again
        train(flags, name)
        assert "already finished" in capsys.readouterr().out
        assert (folder / name / "log.txt").stat().st_mtime_ns == written[name]
    for name, again in (("lean", "--resume=off"), ("spare", "--seed=7")):
        train(flags, name, again)
        assert "already finished" not in capsys.readouterr().out
        assert (folder / name / "log.txt").stat().st_mtime_ns > written[name]
