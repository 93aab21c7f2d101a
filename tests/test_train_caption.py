"""train_caption.py as it is run: training, evaluation, torchrun, and mistakes in the input."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_caption
from configs import load_config
from engine import loop
from engine.loop import BEST_FILE
from models import build_captioner, prunable_layers
from reports.runs import PRUNED_FILE
from tests import runs
from utils import UserError, launch

PRUNE = ["--warmup_steps", "2", "--deltaT", "2"]


@pytest.fixture(scope="module", autouse=True)
def no_java():
    """The metrics that run in Java take long to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return runs.make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=24)


@pytest.fixture(scope="module")
def config(scenes, tmp_path_factory):
    """Of a run of 12 steps in 2 epochs on one process."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    return runs.write_config(path, scenes, max_epoch=2, batch_size=4)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The results of a run with validation."""
    folder = tmp_path_factory.mktemp("trained")
    train(config, folder, "--model_dir", "run")
    return folder / "run"


def train(config, folder, *flags):
    runs.run("train_caption", ["--config", config, "--output_dir", str(folder), *PRUNE, *flags])


def assert_pruned(folder, config, remaining=0.2):
    """All numbers strictly below the k-th smallest are zero, where no two are equal."""
    layers = prunable_layers(build_captioner(load_config(config, task="caption")))
    zeros = runs.zeros(runs.result(folder), layers)
    assert int(zeros.sum()) == int(len(zeros) * (1 - remaining)) - 1
    return int(zeros.sum())


def test_training_prunes_to_the_final_threshold(trained, config):
    pruned = assert_pruned(trained, config)
    assert json.loads((trained / "sparsity.json").read_text())["pruned"] == pruned
    assert Image.open(trained / "sparsity.png").size > (100, 100)


def test_log_has_a_line_an_epoch(trained):
    log = runs.log_of(trained)
    assert [(line["epoch"], line["step"]) for line in log] == [(0, 6), (1, 12)]
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 5e-4])
    assert log[1]["loss"] < log[0]["loss"] < 4.9  # of 128 tokens, log 128 = 4.85 at random
    assert log[1]["remaining_ratio"] == pytest.approx(0.2)
    assert log[1]["sparsity"] == pytest.approx(0.8, abs=1e-4)  # the k-th stays, of 85,000
    assert {"val_CIDEr", "val_Bleu_4", "val_loss"} <= log[1].keys()


def test_tensorboard_has_the_sparsity_by_modality(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    by_modality = json.loads((trained / "sparsity.json").read_text())["by_modality"]
    for modality in ("vision", "language"):
        last = events.Scalars(f"sparsity/{modality}")[-1]
        assert last.step == 12
        assert last.value == pytest.approx(by_modality[modality])  # kept in float32
    assert {"train/loss", "train/lr", "train/remaining_ratio"} <= set(events.Tags()["scalars"])


def test_best_weights_are_those_of_an_epoch_at_the_final_ratio(trained):
    best = load_file(trained / BEST_FILE)
    assert all(torch.equal(best[name], last) for name, last in runs.result(trained).items())


def test_evaluate_writes_captions_and_scores(trained, config, capsys):
    argv = ["--config", config, "--output_dir", str(trained.parent), "--model_dir", "evaluated"]
    runs.run("train_caption", [*argv, "--evaluate", "--pruned", str(trained)])
    results = trained.parent / "evaluated/results"
    written = json.loads((results / "scores.json").read_text())
    for split in ("val", "test"):
        captions = json.loads((results / f"{split}.json").read_text())
        assert len({caption["image_id"] for caption in captions}) == len(captions) == 6
        scores = json.loads((results / f"{split}_scores.json").read_text())["scores"]
        assert {"CIDEr", "loss"} <= scores.keys() and written[split] == scores
    assert scores["loss"] != written["val"]["loss"] == runs.log_of(trained)[1]["val_loss"]
    sparsity = json.loads((trained.parent / "evaluated/sparsity.json").read_text())
    assert sparsity == json.loads((trained / "sparsity.json").read_text())
    assert not (trained.parent / "evaluated/config.json").exists()  # training runs have it
    printed = capsys.readouterr().out
    assert "val: {" in printed and "test: {" in printed
    assert printed.count("METEOR is left out: needs Java") == 1
    assert printed.count("tokens: PTB rules in Python; Stanford's tokenizer needs Java") == 1

    edited = [{**caption, "caption": "a"} for caption in captions]
    (results / "test.json").write_text(json.dumps(edited))
    runs.run("train_caption", ["--config", config, "--score_only", str(results / "test.json")])
    scores = json.loads(capsys.readouterr().out.split("test: ")[1].splitlines()[0])
    assert scores["Bleu_4"] < 1e-3


def test_the_papers_command_is_stopped_under_torchrun_and_goes_on(config, tmp_path):
    """torchrun hands the signal on to both processes; its exit code is its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={runs.free_port()}", "train_caption.py"]
    argv = "--final_threshold 0.2 --model_dir coco/PLATON80 --pruner_name PLATON --eval_epochs 0 "
    argv += "--distributed True --dist_url env:// --batch_size 1 --checkpoint_steps 2 --max_epoch 3"
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
    assert [line["step"] for line in runs.log_of(folder)] == [12 * epoch for epoch in (1, 2, 3)]
    assert_pruned(folder, config)


def test_weights_behind_an_address_are_downloaded_once_for_two_processes(trained, scenes, tmp_path):
    asked = []

    class Server(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=trained)

        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}/{PRUNED_FILE}"
        config = runs.write_config(tmp_path / "c.yaml", scenes, pretrained=address)
        argv = ["--config", config, "--evaluate", "--output_dir", str(tmp_path)]
        codes = runs.finish(runs.start([*argv, "--split", "val"], 2))
        server.shutdown()
    assert codes == [0, 0]
    assert asked == [f"/{PRUNED_FILE}"]
    assert len(json.loads((tmp_path / "c/results/val.json").read_text())) == 6
    assert not (tmp_path / "c/results/test.json").exists()


def test_an_image_that_breaks_in_mid_run_ends_it_with_its_name(scenes, tmp_path, capsys):
    """Loaded by a process of its own, whose traceback nobody needs."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    victim = next((copy / "images/train").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    config = runs.write_config(tmp_path / "c.yaml", copy, num_workers=1)
    argv = ["--config", config, "--output_dir", str(tmp_path), *PRUNE]
    with pytest.raises(SystemExit) as stop:
        launch(train_caption.main, train_caption.parse_args(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read image {victim}: ") and error.count("\n") == 1
    assert "--skip_bad_images" in error


def limit_files(rank: int) -> None:
    """A limit on the size of files stands for the disk's end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_disk_that_is_full_in_mid_run_is_a_sentence(config, tmp_path):
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", "full", *PRUNE]
    argv += ["--checkpoint_steps", "3"]
    assert runs.finish(runs.start(argv, log=tmp_path / "log", before=limit_files)) == [2]
    error = (tmp_path / "log").read_text().splitlines()[-1]
    assert error.startswith(f"error: cannot write {tmp_path}/full/checkpoints/step_00000003.pt: ")
    assert list((tmp_path / "full/checkpoints").iterdir()) == []


def test_bfloat16_and_other_scores_keep_float32_weights(config, tmp_path):
    flags = ["--amp", "bf16", "--pruner_name", "Taylor", "--max_steps", "6", "--eval_epochs", "0"]
    train(config, tmp_path, "--model_dir", "bf16", *flags)
    assert {x.dtype for x in runs.result(tmp_path / "bf16").values()} == {torch.float32}
    assert_pruned(tmp_path / "bf16", config)


def test_id_profile_decides_who_is_pruned(config, tmp_path):
    """Where vision's IDs are huge, all of language goes before anything of vision."""
    names = prunable_layers(build_captioner(load_config(config, task="caption")))
    profile = {name: 1e9 if name.startswith("visual_encoder.") else 1.0 for name in names}
    (tmp_path / "id.json").write_text(json.dumps(profile))
    flags = ["--final_threshold", "0.6", "--pruner_name", "Magnitude", "--eval_epochs", "0"]
    train(config, tmp_path, *flags, "--id_profile", str(tmp_path / "id.json"), "--model_dir", "id")
    sparsity = json.loads((tmp_path / "id/sparsity.json").read_text())
    assert sparsity["by_modality"]["vision"] == 0 and sparsity["by_modality"]["language"] > 0.4
    assert sparsity["overall"] == pytest.approx(0.4, abs=1e-4)  # the k-th stays, of 85,000


def test_damaged_images_are_named_or_skipped(scenes, tmp_path):
    """Of 24, one is cut off and one is missing."""
    copy = shutil.copytree(scenes, tmp_path / "damaged")
    images = sorted((copy / "images/train").glob("*.png"))
    images[2].write_bytes(images[2].read_bytes()[:100])
    images[8].unlink()
    config = runs.write_config(tmp_path / "c.yaml", copy, max_epoch=1, num_workers=1)
    with pytest.raises(UserError, match=f"1 of 24 images do not exist: .*{images[8].name}"):
        train(config, tmp_path)
    flags = ["--final_threshold", "1", "--eval_epochs", "0", "--skip_bad_images"]
    train(config, tmp_path, "--model_dir", "skipped", *flags)
    captions = json.loads((copy / "annotation/coco_karpathy_train.json").read_text())
    bad = sum(caption["image"].endswith(("0002.png", "0008.png")) for caption in captions)
    assert runs.log_of(tmp_path / "skipped")[0]["bad_images"] >= bad  # replacements may be bad too


def test_captions_that_are_cut_are_counted(scenes, tmp_path, capsys):
    config = runs.write_config(tmp_path / "c.yaml", scenes, max_tokens=18)
    train(config, tmp_path, "--check")
    records = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    # with [DEC] a picture of, and [SEP]
    cut = sum(len(record["caption"].split()) + 5 > 18 for record in records)
    assert 0 < cut < 24
    printed = f"{cut} of 24 training texts are longer than max_tokens 18 and are cut"
    assert capsys.readouterr().out.count(printed) == 1


# flags, changes of the config, message
MISTAKES = [
    ("", {"image_root": "/nowhere"}, "/nowhere does not exist: set .*image_r"),
    ("", {"image_sizes": 3}, r"unknown keys \['image_sizes'\]"),
    ("--config no.yaml", {}, "cannot read the config no.yaml"),
    ("--max_steps 12", {}, r"\(1 initial \+ 1 final\) x 12 .* has 12 steps"),
    ("--batch_size 25", {}, "takes 25 samples .* training set has 24"),
    ("", {"image_size": "32"}, "image_size is '32', but must be a whole number"),
    ("--device cuda:99", {}, "cuda:99 is asked for"),
    ("--useID", {}, "names no id_profile"),
    (
        "--id_profile configs/id/blip_nlvr.json",
        {},
        r"does not fit the model \(missing: .{,200} more; unknown: .{,200} more\). Measure one",
    ),
    ("--id_profile no.json", {}, "cannot read the ID profile no.js"),
    ("--pretrained Makefile", {}, "Makefile: it is neither safetensors nor"),
    ("--pretrained no.pth", {}, "there is no checkpoint no.pth"),
    ("--resume Makefile", {}, "the checkpoint Makefile is not whole"),
    ("", {"tokenizer": "/nowhere"}, "cannot load '/nowhere' .there is no such folder.. Set `tok"),
    ("", {"min_length": 4}, "min_length 4 must be above .* prompt.* 4 tokens"),
    ("", {"max_length": 4, "min_length": 1}, "_length . must be above .* 4 tok"),
    ("--evaluate", {}, "nothing to evaluate: give --pruned"),
    ("--pruned x", {}, "goes with --evaluate; training starts from --pretr"),
    ("", {"image_size": 40}, "40 is no multiple of patch_size 16"),
    ("--output_dir Makefile", {}, "cannot write to Makefile.*--output_dir"),
    ("--score_only train.json", {}, "takes the val.json or test.json"),
    ("--spice", {}, "--spice goes with --evaluate"),
    ("--evaluate --eval_test", {}, "--eval_test goes with training"),
    ("--evaluate --sparse --amp bf16", {}, "in float32: leave out --amp"),
    ("--evaluate --sparse --device cuda", {}, "on the CPU: leave out --dev"),
]


@pytest.mark.parametrize(("flags", "changes", "message"), MISTAKES)
def test_mistake_is_named_before_the_first_step(
    flags, changes, message, scenes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "train_step", None)
    config = runs.write_config(tmp_path / "c.yaml", scenes, max_epoch=3, **changes)
    argv = ["--config", config, "--output_dir", str(tmp_path), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        launch(train_caption.main, train_caption.parse_args(argv))
    assert stop.value.code == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.DOTALL)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


WHOLE = "must be a whole number from"
FLAGS = {
    "--gradient_accumulation_steps=0": f"{WHOLE} 1 to 1000000000, got '0'",
    "--deltaT=2.5": f"{WHOLE} 1 to 1000000000, got '2.5'",
    "--init_lr=nan": "must be a number from 0 to 10, got 'nan'",
    "--final_threshold=80": "must be a number from 0 to 1, got '80'",
    "--beta2=2": "must be a number from 0 to 1, got '2'",
    "--seed=-1": f"{WHOLE} 0 to 1000000000, got '-1'",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_out_of_range(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_caption.parse_args([flag])
    error = capsys.readouterr().err
    assert f"argument {flag.split('=')[0]}" in error and FLAGS[flag] in error


def test_full_disk(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="GB are free: make room"):
        train(config, tmp_path)


def test_annotation_missing_offline(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError))
    config = runs.write_config(tmp_path / "c.yaml", scenes, ann_root=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="coco_karpathy_train.json to .*/empty/coco_karpathy_train"):
        train(config, tmp_path)
