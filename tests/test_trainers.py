"""The training scripts as they are run: training, evaluation, torchrun, and what ends a run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import load_config
from engine.loop import BEST_FILE
from engine.tasks import NLVR, RETRIEVAL
from models import build_captioner, prunable_layers
from models.clip import ClipRetrieval
from tests import runs
from utils import UserError

CAPTIONING = ["--warmup_steps", "2", "--deltaT", "2"]


@pytest.fixture(scope="module", autouse=True)
def no_java():
    """The metrics that run in Java take long to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        yield


@pytest.fixture(scope="module")
def config(scenes, tmp_path_factory):
    """Of a run of 12 steps in 2 epochs on one process."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    return runs.write_config(path, scenes, max_epoch=2, batch_size=8)


@pytest.fixture(scope="module")
def layers(config):
    return prunable_layers(build_captioner(load_config(config)))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The results of a run with validation."""
    folder = tmp_path_factory.mktemp("trained")
    return runs.train(config, folder, "run", *CAPTIONING)


def assert_pruned(folder, layers):
    """All numbers strictly below the k-th smallest are zero, where no two are equal."""
    zeros = runs.zeros(runs.result(folder), layers)
    pruned = json.loads((folder / "sparsity.json").read_text())["pruned"]
    assert int(zeros.sum()) == pruned == int(len(zeros) * 0.8) - 1


def test_training_prunes_to_the_final_threshold(trained, layers):
    assert_pruned(trained, layers)
    assert Image.open(trained / "sparsity.png").size > (100, 100)
    assert runs.same(load_file(trained / BEST_FILE), runs.result(trained))  # at the final ratio
    log = runs.log_of(trained)
    assert [(line["epoch"], line["step"]) for line in log] == [(0, 6), (1, 12)]
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 5e-4])
    assert log[1]["loss"] < log[0]["loss"] < 4.9  # of 128 tokens, log 128 = 4.85 at random
    assert log[1]["remaining_ratio"] == pytest.approx(0.2)
    assert log[1]["sparsity"] == pytest.approx(0.8, abs=1e-4)  # the k-th stays, of 85,000
    assert {"val_CIDEr", "val_Bleu_4", "val_loss"} <= log[1].keys()
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    for modality, share in log[1]["sparsity_by_modality"].items():
        last = events.Scalars(f"sparsity/{modality}")[-1]
        assert (last.step, last.value) == (12, pytest.approx(share))  # in float32


def test_evaluation_finds_what_training_found(trained, config, capsys):
    runs.train(config, trained.parent, "evaluated", "--evaluate", "--pruned", str(trained))
    results = trained.parent / "evaluated/results"
    scores = json.loads((results / "scores.json").read_text())
    assert scores["test"]["loss"] != scores["val"]["loss"] == runs.log_of(trained)[1]["val_loss"]
    captions = json.loads((results / "test.json").read_text())
    assert len({caption["image_id"] for caption in captions}) == len(captions) == 6
    sparsity = (trained.parent / "evaluated/sparsity.json").read_text()
    assert sparsity == (trained / "sparsity.json").read_text()
    printed = capsys.readouterr().out
    assert printed.count("METEOR is left out: needs Java") == 1
    assert printed.count("tokens: PTB rules in Python; Stanford's tokenizer needs Java") == 1


# --- statements and retrieval

HELD_OUT = {"dev": 11, "test": 6}  # statements: no multiples of 2 processes and batches of 4
PRUNE = ["--final_threshold", "0.4", "--warmup_steps", "2", "--final_warmup", "2", "--deltaT", "3"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configs of 8 steps in 2 epochs, by task."""
    folder = tmp_path_factory.mktemp("data")
    scenes = runs.make_scenes(folder / "scenes", 16, 8, statements=16, heldout=12)
    for split, count in HELD_OUT.items():
        file = scenes / f"annotation/nlvr_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:count]))
    nlvr = runs.write_nlvr_config(folder / "nlvr.yaml", scenes, max_epoch=2)
    return {NLVR: nlvr, RETRIEVAL: runs.write_clip_config(folder / "clip.yaml", scenes)}


@pytest.fixture
def run(configs, tmp_path):
    """Runs a task's script in `tmp_path/name`, on one process or two, and returns the folder."""

    def run(task, name, *flags, processes=1):
        script = task.script.removesuffix(".py")
        if processes == 1:
            return runs.train(configs[task], tmp_path, name, *flags, script=script)
        argv = ["--config", configs[task], "--output_dir", str(tmp_path), "--model_dir", name]
        started = runs.start([*argv, *flags], 2, script, before=runs.in_float64)
        assert runs.finish(started) == [0, 0]
        return tmp_path / name

    return run


def layers_of(task, configs):
    return prunable_layers(task.build_model(load_config(configs[task])))


@pytest.mark.parametrize("task", [NLVR, RETRIEVAL], ids=lambda task: task.name)
def test_a_run_is_the_same_on_one_process_and_two(task, run, configs, float64):
    """Batch, accumulated parts and processes are ways to spread the same samples."""
    whole = run(task, "whole", *PRUNE)
    spread = run(task, "spread", *PRUNE, "--batch_size=2", "--gradient_accumulation_steps=2")
    together = run(task, "together", *PRUNE, "--batch_size=2", processes=2)
    layers, log = layers_of(task, configs), runs.log_of(whole)
    expected = runs.zeros(runs.result(whole), layers)
    assert int(expected.sum()) == pytest.approx(0.6 * len(expected), abs=10)
    assert [record["step"] for record in log] == [4, 8]
    assert log[1]["remaining_ratio"] == 0.4
    assert log[1]["sparsity"] == pytest.approx(expected.double().mean().item())
    split, score = task.held_out[0], task.best_by
    for folder in (spread, together):
        assert torch.equal(runs.zeros(runs.result(folder), layers), expected)
        for record, other in zip(log, runs.log_of(folder), strict=True):
            assert other["loss"] == pytest.approx(record["loss"], rel=1e-9)
            assert other[f"{split}_{score}"] == record[f"{split}_{score}"]
    flags = ["--evaluate", "--pruned", str(whole)]
    for processes in (1, 2):
        folder = run(task, str(processes), *flags, processes=processes)
        scores = json.loads((folder / "results/scores.json").read_text())
        assert scores.keys() == set(task.held_out)
        assert scores[split][score] == log[1][f"{split}_{score}"]


def test_nlvr_starts_from_a_captioner_but_evaluation_refuses(run, configs, tmp_path):
    captioner = build_captioner(load_config(configs[NLVR]))
    torch.save(captioner.state_dict(), tmp_path / "captioner.pth")
    flags = ["--pretrained", str(tmp_path / "captioner.pth")]
    run(NLVR, "started", *flags, "--final_threshold", "1", "--max_steps", "1", "--eval_epochs", "0")
    with pytest.raises(UserError, match=r"start for training.*cls_head\.0\.weight"):
        run(NLVR, "refused", "--evaluate", *flags)


def test_clip_trains_with_a_ramp_and_prunes(run, configs, monkeypatch):
    """Flags of the original's script are read or passed over."""
    on_step, ramps = ClipRetrieval.on_step, []

    def noted(self, epochs, parts):
        on_step(self, epochs, parts)
        ramps.append(self.ramp)

    monkeypatch.setattr(ClipRetrieval, "on_step", noted)
    flags = ["--use_ceph", "--w_sp_attn", "1.0", "--lr", "5e-4", "--epoch", "3"]
    folder = run(RETRIEVAL, "run", *PRUNE, *flags)
    first, *_, last = runs.log_of(folder)
    assert first["lr"] == 5e-4 and last["epoch"] == 2
    assert {"val_r_mean", "val_txt_r1", "val_img_r10"} <= last.keys()
    assert ramps == pytest.approx([min(1, step / 4) for step in range(12)])  # of alpha
    weights, model = runs.result(folder), RETRIEVAL.build_model(load_config(configs[RETRIEVAL]))
    assert set(weights) == {name for name, _ in model.named_parameters()}  # no queue, no copy
    with pytest.raises(UserError, match="queue_size"):
        run(RETRIEVAL, "odd", "--batch_size", "3")
