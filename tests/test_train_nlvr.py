"""train_nlvr.py as it is run: one process and two, training and evaluation."""

import json

import pytest
import torch

from configs import load_config
from models import build_captioner, build_nlvr, prunable_layers
from tests import runs
from utils import UserError

HELD_OUT = {"dev": 11, "test": 6}  # which do not divide by 2 processes and batches of 4
PRUNE = ["--final_threshold", "0.4", "--warmup_steps", "2", "--final_warmup", "2", "--deltaT", "3"]
PRUNE += ["--amp", "off"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of a few thousand weights, with 16 training statements."""
    folder = tmp_path_factory.mktemp("nlvr")
    runs.make_scenes(folder / "scenes", 16, 8, statements=16, heldout=12)
    for split, count in HELD_OUT.items():
        file = folder / f"scenes/annotation/nlvr_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:count]))
    return runs.write_nlvr_config(folder / "nlvr.yaml", folder / "scenes", max_epoch=2)


@pytest.fixture
def run(config, tmp_path):
    """Runs the script in `tmp_path/name`, in this process or in several, and returns the folder."""

    def run(name, *flags, processes=1):
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name, *flags]
        if processes == 1:
            runs.run("train_nlvr", argv)
        else:
            started = runs.start(argv, processes, "train_nlvr", before=runs.in_float64)
            assert runs.finish(started) == [0] * processes
        return tmp_path / name

    return run


def test_a_run_is_the_same_on_one_process_and_two(run, config, float64):
    """Batch, accumulated parts and processes are ways to spread the same samples; those of the
    held-out splits have shares of unequal length.
    """
    whole = run("whole", *PRUNE)
    spread = run("spread", *PRUNE, "--batch_size=2", "--gradient_accumulation_steps=2")
    together = run("together", *PRUNE, "--batch_size=2", processes=2)
    layers = prunable_layers(build_nlvr(load_config(config, task="nlvr")))
    expected = runs.zeros(runs.result(whole), layers)
    assert int(expected.sum()) == pytest.approx(0.6 * len(expected), abs=10)
    log = runs.log_of(whole)
    assert [record["step"] for record in log] == [4, 8]
    assert log[-1]["remaining_ratio"] == 0.4
    assert log[-1]["sparsity"] == pytest.approx(expected.double().mean().item())
    for folder in (spread, together):
        assert torch.equal(runs.zeros(runs.result(folder), layers), expected)
        for record, other in zip(log, runs.log_of(folder), strict=True):
            assert other["loss"] == pytest.approx(record["loss"], rel=1e-9)
            assert other["dev_accuracy"] == record["dev_accuracy"]
    flags = ["--evaluate", "--pruned", str(whole)]
    folders = [run(str(n), *flags, processes=n) for n in (1, 2)]
    one, two = (json.loads((x / "results/accuracy.json").read_text()) for x in folders)
    assert one == two and one["dev"] == log[-1]["dev_accuracy"] and one.keys() == HELD_OUT.keys()


def test_training_starts_from_a_captioner_but_evaluation_refuses(run, config, tmp_path):
    torch.save(build_captioner(load_config(config)).state_dict(), tmp_path / "captioner.pth")
    flags = ["--pretrained", str(tmp_path / "captioner.pth")]
    run("started", *flags, "--final_threshold", "1", "--max_steps", "1", "--eval_epochs", "0")
    with pytest.raises(UserError, match=r"start for training.*cls_head\.0\.weight"):
        run("refused", "--evaluate", *flags)
