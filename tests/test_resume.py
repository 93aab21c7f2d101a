"""A killed or stopped run, resumed, ends with the weights of one that ran through."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

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
    flags = [*PRUNE, "--checkpoint_steps", "5"]
    return lambda name, *more: runs.train(config, folder, name, *flags, *more)


@pytest.fixture(scope="module")
def whole(train):
    """The folder of a run that ran through."""
    return train("whole")


@pytest.mark.parametrize(
    ("number", "step", "saved"),
    [(signal.SIGTERM, 3, 4), (signal.SIGHUP, 3, 4), (signal.SIGINT, 6, 6)],  # at an epoch's end
)
def test_signal_finishes_the_step_saves_and_exits(train, whole, number, step, saved):
    name = f"stopped_by_{number.name}_{step}"
    with runs.stopped_at(step, signal=number) as stopped:
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
    with runs.stopped_at(8, KeyboardInterrupt):
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


def test_two_processes_that_are_stopped_and_killed_end_as_undisturbed_ones(scenes, tmp_path):
    """SIGTERM to all, also to loading processes; SIGINT to one, which stops the other; SIGKILL.

    torchrun starts the undisturbed ones, with the flags of the paper's command.
    """
    changes = {"batch_size": 1, "max_epoch": 1, "num_workers": 1}  # 24 steps
    flags = ["--config", runs.write_config(tmp_path / "c.yaml", scenes, **changes), *PRUNE]
    flags += ["--output_dir", str(tmp_path), "--checkpoint_steps", "2", "--model_dir"]
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += [f"--master_port={runs.free_port()}", "train_caption.py", *flags, "whole"]
    torchrun += "--pruner_name PLATON --distributed True --dist_url env://".split()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output(torchrun, env=one_thread, text=True)
    assert printed.count("weights: ") == 1  # one process prints
    assert runs.same(runs.result(folder), runs.result(tmp_path / "whole"))


def test_a_finished_run_says_what_may_go_and_needs_it_no_more(train, capsys):
    spare = train("spare", "--keep_checkpoints", "1")
    assert runs.saved_steps(spare) == [12]
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
    for check in ([], ["--check"]):
        with pytest.raises(UserError, match="lean is of another run: seed was 42, is 7"):
            train("lean", "--seed=7", *check)
    assert runs.same(runs.result(lean), runs.result(spare))
    train("lean", "--resume=off")
    assert "already finished" not in capsys.readouterr().out
    assert (lean / "log.txt").stat().st_mtime_ns > written[lean]
    assert (lean / "checkpoints").exists()
    train("lean", "--keep_checkpoints", "0")
    assert "already finished" in capsys.readouterr().out
    assert not (lean / "checkpoints").exists()


# --- with other processes, batches and accumulated parts that make the same step: in float64 and
# without dropout, so that sums of another order change 1e-16 of a number

OTHERS = "--warmup_steps 2 --deltaT 2 --final_threshold 0.4 --amp off --eval_epochs 0".split()
OTHERS += ["--checkpoint_steps", "5", "--keep_checkpoints", "9"]


def checkpoint(folder, step):
    return folder / f"checkpoints/step_{step:08d}.pt"


def same_end(whole, other):
    """Whether the last checkpoints agree in all weights, queues and averages, and in the log."""
    ends = [torch.load(checkpoint(f, 12), weights_only=True) for f in (whole, other)]
    torch.testing.assert_close(ends[1]["model"], ends[0]["model"], rtol=1e-9, atol=1e-9)
    zeros = [{name: x == 0 for name, x in end["model"].items()} for end in ends]
    assert runs.same(*zeros)
    losses = [[line["loss"] for line in runs.log_of(f)] for f in (whole, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_goes_on_with_two_processes_and_with_one_again(tmp_path, float64, capsys):
    """1 x 4 samples, from a step on the ramp 2 x 2, and then 1 x 2 x 2 accumulated."""
    changes, data = {"batch_size": 4, "max_epoch": 2}, runs.make_scenes(tmp_path / "x", train=24)
    config = runs.write_config(tmp_path / "caption.yaml", data, 0.0, **changes)  # 12 steps
    whole = runs.train(config, tmp_path, "whole", *OTHERS)
    more = ["--batch_size", "2", "--resume", str(checkpoint(whole, 5)), "--model_dir", "two"]
    argv = ["--config", config, "--output_dir", str(tmp_path), *OTHERS, *more]
    assert runs.finish(runs.start(argv, 2, before=runs.in_float64)) == [0, 0]
    same_end(whole, tmp_path / "two")
    more = [*OTHERS, "--batch_size", "2", "--resume", str(checkpoint(tmp_path / "two", 10))]
    capsys.readouterr()
    one = runs.train(config, tmp_path, "one", *more, "--gradient_accumulation_steps", "2")
    same_end(whole, one)
    assert "1 process(es) where there were 2: the same samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="samples of a step was 4, is 2"):
        runs.train(config, tmp_path, "one", *more)
