"""A run goes on with other processes, batches and accumulated parts that make the same step.

In float64 and without dropout, so that sums of another order change 1e-16 of a number.
"""

from types import SimpleNamespace

import pytest
import torch

from engine import state
from tests import runs
from utils import UserError

PRUNE = ["--warmup_steps", "2", "--deltaT", "2", "--final_threshold", "0.4", "--amp", "off"]
PRUNE += ["--checkpoint_steps", "5", "--keep_checkpoints", "9"]  # 5 is on the ramp
SCRIPTS = {"caption": "train_caption", "clip": "train_clip_flickr30k"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of runs of 12 steps in 2 epochs, by task: 4 samples a step on one process."""
    folder = tmp_path_factory.mktemp("runs")
    data = runs.make_scenes(folder / "scenes", train=24)
    changes = {"batch_size": 4, "max_epoch": 2}
    configs = {
        "caption": runs.write_config(folder / "caption.yaml", data, 0.0, **changes),
        "clip": runs.write_clip_config(folder / "clip.yaml", data, **changes),
    }
    more = ["--output_dir", str(folder), "--eval_epochs", "0", *PRUNE]
    return {task: ["--config", config, *more] for task, config in configs.items()}, folder


def checkpoint(folder, step):
    return folder / f"checkpoints/step_{step:08d}.pt"


def same_end(whole, other):
    """Whether the last checkpoints agree in all weights, queues and averages, and in the log."""
    ends = [torch.load(checkpoint(f, 12), weights_only=True) for f in (whole, other)]
    assert ends[0]["model"].keys() == ends[1]["model"].keys()
    for name, value in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(ends[1]["model"][name] == 0, value == 0)
    losses = [[line["loss"] for line in runs.log_of(f)] for f in (whole, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize("task", SCRIPTS)
def test_goes_on_with_two_processes_and_with_one_again(flags, float64, capsys, task):
    """1 x 4 samples, then 2 x 2, then 1 x 2 x 2 accumulated."""
    argv, folder = flags[0][task], flags[1]
    whole, two, one = (folder / f"{task}_{name}" for name in ("whole", "two", "one"))
    runs.run(SCRIPTS[task], [*argv, "--model_dir", whole.name])
    more = ["--model_dir", two.name, "--batch_size", "2", "--resume", str(checkpoint(whole, 5))]
    started = runs.start([*argv, *more], 2, SCRIPTS[task], before=runs.in_float64)
    assert runs.finish(started) == [0, 0]
    same_end(whole, two)
    more = ["--model_dir", one.name, "--batch_size", "2", "--gradient_accumulation_steps", "2"]
    capsys.readouterr()
    runs.run(SCRIPTS[task], [*argv, *more, "--resume", str(checkpoint(two, 10))])
    same_end(whole, one)
    assert "1 process(es) where there were 2: the same samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="samples of a step was 4, is 2"):
        runs.run(SCRIPTS[task], [*argv, *more[:4], "--resume", str(checkpoint(two, 10))])


def test_dropout_of_other_processes_does_not_begin_again(monkeypatch, tmp_path):
    """A rank's draws are its own, and not those of the run's first steps."""
    progress = dict(epoch=1, step=7)
    found = dict(model={}, optimizer={}, progress=progress, rng=[0, 1], path="x", pruner=None)
    loads = SimpleNamespace(load_state_dict=lambda content: None, state={})
    seeds = set()
    for rank in range(3):
        own = SimpleNamespace(model=loads, optimizer=loads, pruner=None)
        own.plan = SimpleNamespace(total_steps=9)
        process = SimpleNamespace(rank=rank, world_size=3, device=torch.device("cpu"))
        run = SimpleNamespace(flags=SimpleNamespace(seed=5), process=process, checkpoints=tmp_path)
        run.say = lambda message: None
        state.resume(run, own, found)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 3 and not seeds & {5, 6, 7}
