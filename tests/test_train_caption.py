"""train_caption.py as it is run: training, evaluation, torchrun, and what ends a run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import load_config
from data.samplers import TrainBatchSampler
from engine.loop import BEST_FILE
from models import build_captioner, prunable_layers
from tests import runs

PRUNE = ["--warmup_steps", "2", "--deltaT", "2"]


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
    train(config, folder, "--model_dir", "run")
    return folder / "run"


def train(config, folder, *flags):
    runs.run("train_caption", ["--config", config, "--output_dir", str(folder), *PRUNE, *flags])


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


def test_tensorboard_has_losses_and_the_sparsity_by_modality(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    by_modality = json.loads((trained / "sparsity.json").read_text())["by_modality"]
    for modality in ("vision", "language"):
        last = events.Scalars(f"sparsity/{modality}")[-1]
        assert (last.step, last.value) == (12, pytest.approx(by_modality[modality]))  # in float32
    assert {"train/loss", "train/lr", "train/remaining_ratio"} <= set(events.Tags()["scalars"])


def test_evaluation_finds_what_training_found(trained, config, capsys):
    argv = ["--config", config, "--output_dir", str(trained.parent), "--model_dir", "evaluated"]
    runs.run("train_caption", [*argv, "--evaluate", "--pruned", str(trained)])
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


def test_the_papers_command_is_stopped_under_torchrun_and_goes_on(config, layers, tmp_path):
    """torchrun hands the signal on to both processes; its exit code is its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={runs.free_port()}", "train_caption.py"]
    argv = "--final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --eval_epochs 0 "
    argv += "--distributed True --dist_url env:// --batch_size 1 --checkpoint_steps 2"
    argv = [*argv.split(), "--config", config, "--output_dir", str(tmp_path), *PRUNE]
    folder, env = tmp_path / "coco/PLATON80", {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *argv], env=env, stdout=subprocess.PIPE, text=True
    ) as torchrun:
        while not list((folder / "checkpoints").glob("step_*.pt")):
            assert torchrun.poll() is None
            time.sleep(0.02)
        torchrun.terminate()
        printed = torchrun.communicate(timeout=60)[0]
    assert torchrun.returncode not in (0, 75)
    assert printed.count("stopped by a signal after step") == 1  # one process prints
    assert runs.finish(runs.start(argv, 2)) == [0, 0]
    assert [line["step"] for line in runs.log_of(folder)] == [24, 48]
    assert_pruned(folder, layers)


def never_part(rank: int) -> None:
    """Leaving the group waits for the other process, as NCCL's does."""
    dist.destroy_process_group = lambda: time.sleep(600)


def test_an_image_that_breaks_in_mid_run_ends_all_processes_with_its_name(scenes, tmp_path):
    """A process of its own loads it, whose traceback nobody needs."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    config = runs.write_config(tmp_path / "c.yaml", copy, num_workers=1)
    records = json.loads((copy / "annotation/coco_karpathy_train.json").read_text())
    batches = list(TrainBatchSampler(len(records), 2, 42, rank=1, world_size=2))
    victim = copy / "images" / records[batches[2][0][0]]["image"]
    victim.write_bytes(victim.read_bytes()[:100])
    argv = ["--config", config, "--output_dir", str(tmp_path), *PRUNE]
    started = runs.start(argv, 2, log=tmp_path / "log", before=never_part)
    codes = runs.finish(started, timeout=60)
    assert codes[1] == 2 and codes[0] not in (0, None)
    log = (tmp_path / "log").read_text()
    sentence = log[log.index("error (rank 1)") :].splitlines()[0]
    assert f"cannot read image {victim}: " in sentence and "--skip_bad_images" in sentence
