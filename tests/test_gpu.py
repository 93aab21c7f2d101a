"""What a real GPU alone can show. `make test-gpu` runs it; of several, test_trainers takes NCCL."""

import pytest
import torch

from configs import load_config
from engine import loop
from engine.loading import move, read, train_loader
from engine.processes import Process
from engine.tasks import TASKS
from tests import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
FLAGS = "--device cuda --eval_epochs 0 --warmup_steps 2 --deltaT 2 --final_threshold 0.4".split()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a captioner's run of 12 steps in 4 epochs."""
    folder = tmp_path_factory.mktemp("gpu")
    data = runs.make_scenes(folder / "scenes", train=12)
    return runs.write_config(folder / "c.yaml", data, batch_size=4)


def test_batches_are_copied_from_pinned_memory(config):
    config = load_config(config, task="caption")
    dataset = TASKS["caption"].build_datasets(config, 0)[0]
    device = torch.device("cuda", 0)
    (image, *_), _ = next(read(train_loader(config, dataset, 0, Process(0, 1, device))))
    assert image.is_pinned() and torch.equal(move((image,), device)[0].cpu(), image)


def test_memory_does_not_grow_from_epoch_to_epoch(config, tmp_path, monkeypatch):
    finish_epoch, held = loop.finish_epoch, []

    def noted(*arguments):
        finish_epoch(*arguments)
        held.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(loop, "finish_epoch", noted)
    runs.train(config, tmp_path, "x", *FLAGS)
    assert len(held) == 4 and held[1] == held[2] == held[3]


def test_a_capture_stays_within_its_budget(config, tmp_path):
    runs.train(config, tmp_path, "x", *FLAGS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    argv = ["--config", config, "-n", "12", "--Path", str(tmp_path), "--gpu", "0"]
    runs.run("ComputeID", [*argv, "--pruned", str(tmp_path / "x"), "--memory_gb", "0.3"])
    assert torch.cuda.max_memory_allocated() - before < 0.3e9
