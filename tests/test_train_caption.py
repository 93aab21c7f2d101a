"""train_caption.py as it is run: training, evaluation, torchrun, and mistakes in the input."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_caption
from configs import load_config
from engine import loop
from engine.loop import BEST_FILE, PRUNED_FILE
from models import build_captioner, prunable_layers
from tests.runs import free_port, make_scenes, write_config
from utils import UserError, launch

PRUNE = ["--warmup_steps", "3", "--deltaT", "2"]


@pytest.fixture(scope="module", autouse=True)
def no_java():
    """The metrics that run in Java take long to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def config(scenes, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", scenes, max_epoch=2)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The results of a run with validation."""
    folder = tmp_path_factory.mktemp("trained")
    run(["--config", config, "--output_dir", str(folder), "--model_dir", "run", *PRUNE])
    return folder / "run"


def run(argv: list[str]) -> None:
    train_caption.main(train_caption.parse_args(argv))


def below_threshold(prunable: int, remaining: float) -> int:
    """Numbers that are strictly below the k-th smallest, where no two are equal."""
    return int(prunable * (1 - remaining)) - 1


def zeros(path, config: str) -> tuple[int, int]:
    """Zeros among the prunable numbers of a weights file, and how many numbers these are."""
    weights = load_file(path)
    layers = prunable_layers(build_captioner(load_config(config, task="caption")))
    tensors = [weights[f"{name}.{kind}"] for name in layers for kind in ("weight", "bias")]
    return sum(int((t == 0).sum()) for t in tensors), sum(t.numel() for t in tensors)


def test_training_prunes_to_the_final_threshold(trained, config):
    pruned, prunable = zeros(trained / PRUNED_FILE, config)
    assert pruned == below_threshold(prunable, 0.2)
    assert json.loads((trained / "sparsity.json").read_text())["pruned"] == pruned
    assert (trained / "sparsity.png").stat().st_size > 0


def test_log_has_a_line_an_epoch(trained):
    log = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["lr"]) for line in log] == [
        (0, 24, pytest.approx(1e-3)),
        (1, 48, pytest.approx(5e-4)),
    ]
    assert log[1]["loss"] < log[0]["loss"] < 4.9  # of 128 tokens, log 128 = 4.85 at random
    assert log[1]["remaining_ratio"] == pytest.approx(0.2)
    assert log[1]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert {"val_CIDEr", "val_Bleu_4"} <= log[1].keys()
    saved = json.loads((trained / "config.json").read_text())
    assert saved["config"]["batch_size"] == 2 and saved["flags"]["final_threshold"] == 0.2


def test_tensorboard_has_the_sparsity_by_modality(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    by_modality = json.loads((trained / "sparsity.json").read_text())["by_modality"]
    for modality in ("vision", "language"):
        last = events.Scalars(f"sparsity/{modality}")[-1]
        assert last.step == 48
        assert last.value == pytest.approx(by_modality[modality])
    assert {"train/loss", "train/lr", "train/remaining_ratio"} <= set(events.Tags()["scalars"])


def test_best_weights_are_those_of_an_epoch_at_the_final_ratio(trained):
    best, last = (load_file(trained / name) for name in (BEST_FILE, PRUNED_FILE))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_evaluate_writes_captions_and_scores(trained, config, capsys):
    argv = ["--config", config, "--output_dir", str(trained.parent), "--model_dir", "evaluated"]
    run([*argv, "--evaluate", "--pruned", str(trained), "--samples", "2"])
    results = trained.parent / "evaluated/results"
    for split in ("val", "test"):
        captions = json.loads((results / f"{split}.json").read_text())
        assert len({caption["image_id"] for caption in captions}) == len(captions) == 6
        assert "CIDEr" in json.loads((results / f"{split}_scores.json").read_text())["scores"]
        assert (results / f"{split}_samples.png").stat().st_size > 0
    sparsity = json.loads((trained.parent / "evaluated/sparsity.json").read_text())
    assert sparsity == json.loads((trained / "sparsity.json").read_text())
    assert not (trained.parent / "evaluated/config.json").exists()  # that is of training runs
    said = capsys.readouterr().out
    assert "val: {" in said and "test: {" in said
    assert said.count("METEOR is left out: needs Java") == 1
    assert said.count("tokens: PTB rules in Python; Stanford's tokenizer needs Java") == 1

    edited = [{**caption, "caption": "a"} for caption in captions]
    (results / "test.json").write_text(json.dumps(edited))
    run(["--config", config, "--score_only", str(results / "test.json")])
    assert json.loads(capsys.readouterr().out.split("test: ")[1].splitlines()[0])["Bleu_4"] < 1e-3


def test_papers_commands_under_torchrun(config, tmp_path):
    """Two processes, the paper's flags: only one of them speaks, and evaluation reads the file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", "train_caption.py", "--config", config]
    command += ["--output_dir", str(tmp_path), "--pruner_name", "PLATON", "--eval_epochs", "0"]
    command += ["--distributed", "True", "--dist_url", "env://"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--final_threshold", "0.2", "--model_dir", "coco/PLATON80", *PRUNE]
    done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"epoch": 0') == 1
    pruned, prunable = zeros(tmp_path / "coco/PLATON80" / PRUNED_FILE, config)
    assert pruned == below_threshold(prunable, 0.2)


def test_samples_on_two_processes_where_the_weights_are_an_address(trained, scenes, tmp_path):
    """One process downloads, once; later only the main one draws samples, and waits for none."""
    asked = []

    class Server(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=trained)

        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}/{PRUNED_FILE}"
        config = write_config(tmp_path / "c.yaml", scenes, pretrained=address)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += [f"--master_port={free_port()}", "train_caption.py", "--config", config]
        command += ["--evaluate", "--pruned", str(trained), "--samples", "2"]
        command += ["--output_dir", str(tmp_path), "--model_dir", "two"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert asked == [f"/{PRUNED_FILE}"]
    assert done.stdout.count("samples: ") == 2
    assert len(json.loads((tmp_path / "two/results/val.json").read_text())) == 6


def test_a_stop_under_torchrun_saves_and_can_go_on(config, tmp_path):
    """torchrun hands the signal on; its own exit code is its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    command += [f"--master_port={free_port()}", "train_caption.py", "--config", config]
    command += ["--output_dir", str(tmp_path), "--model_dir", "stopped", "--eval_epochs", "0"]
    command += ["--max_epoch", "50", "--warmup_steps", "3", "--checkpoint_steps", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as started:
        while not list((tmp_path / "stopped/checkpoints").glob("step_*.pt")):
            assert started.poll() is None
            time.sleep(0.05)
        started.terminate()
        said = started.communicate(timeout=60)[0]
    assert "stopped by a signal after step" in said and started.returncode not in (0, 75)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", "stopped"]
    with pytest.raises(UserError, match="total_steps was 1200, is 48"):
        run([*argv, "--warmup_steps", "3"])


def test_an_image_that_breaks_in_mid_run_ends_it_with_its_name(scenes, tmp_path, capsys):
    """Loaded by a process of its own, whose traceback nobody needs."""
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    victim = next((copy / "images/train").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    config = write_config(tmp_path / "c.yaml", copy, num_workers=1)
    argv = ["--config", config, "--output_dir", str(tmp_path), *PRUNE]
    with pytest.raises(SystemExit) as stop:
        launch(train_caption.main, train_caption.parse_args(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot read image {victim}: ") and said.count("\n") == 1
    assert "--skip_bad_images" in said


def test_a_disk_that_is_full_in_mid_run_is_a_sentence(config, tmp_path):
    """The system's limit on the size of a file stands for the disk's end."""
    script = (
        "import resource, sys, train_caption\nfrom utils import launch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "launch(train_caption.main, train_caption.parse_args(sys.argv[1:]))"
    )
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", "full"]
    command = [sys.executable, "-c", script, *argv, *PRUNE, "--checkpoint_steps", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: cannot write {tmp_path}/full/checkpoints/step_00000005.pt: ")
    assert list((tmp_path / "full/checkpoints").iterdir()) == []


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_pruning_keeps_float32_weights(config, tmp_path, amp):
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", amp, "--amp", amp]
    run([*argv, *PRUNE, "--max_steps", "9", "--eval_epochs", "0", "--pruner_name", "Taylor"])
    weights = load_file(tmp_path / amp / PRUNED_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    pruned, prunable = zeros(tmp_path / amp / PRUNED_FILE, config)
    assert pruned == below_threshold(prunable, 0.2)


def test_id_profile_decides_who_is_pruned(config, tmp_path):
    names = prunable_layers(build_captioner(load_config(config, task="caption")))
    profile = {name: 1e6 if name.startswith("visual_encoder.") else 1e-6 for name in names}
    (tmp_path / "id.json").write_text(json.dumps(profile))
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", "id", *PRUNE]
    argv += ["--final_threshold", "0.6", "--pruner_name", "Magnitude", "--eval_epochs", "0"]
    run([*argv, "--id_profile", str(tmp_path / "id.json")])
    by_modality = json.loads((tmp_path / "id/sparsity.json").read_text())["by_modality"]
    assert by_modality["vision"] == 0 and by_modality["language"] > 0.4


# --- mistakes ------------------------------------------------------------------------------------

Mistake = namedtuple("Mistake", "flags changes message")
MISTAKES = {
    "image root": Mistake([], {"image_root": "/nowhere"}, "/nowhere does not exist: set .*image_r"),
    "unknown key": Mistake([], {"image_sizes": 3}, r"unknown keys \['image_sizes'\]"),
    "unreadable config": Mistake(["--config", "no.yaml"], {}, "cannot read the config no.yaml"),
    "schedule": Mistake(
        ["--max_steps", "48"], {}, r"\(1 initial \+ 1 final\) x 24 .* has 48 steps"
    ),
    "batch": Mistake(["--batch_size", "49"], {}, "takes 49 samples .* training set has 48"),
    "type": Mistake(
        [],
        {"image_size": "32"},
        "image_size is '32', but must be a whole number from 1 to 4096",
    ),
    "device": Mistake(["--device", "cuda:99"], {}, "no GPU|GPU 99 is asked for"),
    "no profile": Mistake(["--useID"], {}, "names no id_profile"),
    "wrong profile": Mistake(
        ["--id_profile", "configs/id/blip_nlvr.json"],
        {},
        r"does not fit the model \(missing: .{,200} more; unknown: .{,200} more\). Measure one",
    ),
    "absent profile": Mistake(["--id_profile", "no.json"], {}, "cannot read the ID profile no.js"),
    "weights": Mistake(["--pretrained", "Makefile"], {}, "Makefile: it is neither safetensors nor"),
    "absent weights": Mistake(["--pretrained", "no.pth"], {}, "there is no checkpoint no.pth"),
    "checkpoint": Mistake(["--resume", "Makefile"], {}, "the checkpoint Makefile is not whole"),
    "tokenizer": Mistake(
        [],
        {"tokenizer": "/nowhere"},
        "cannot load '/nowhere' .there is no such folder.. Set `token",
    ),
    "prompt": Mistake([], {"min_length": 4}, "min_length 4 must be above .* prompt.* 4 tokens"),
    "no room": Mistake([], {"max_length": 4, "min_length": 1}, "_length . must be above .* 4 tok"),
    "no weights": Mistake(["--evaluate"], {}, "nothing to evaluate: give --pruned"),
    "pruned": Mistake(["--pruned", "x"], {}, "goes with --evaluate; training starts from --pretr"),
    "vit": Mistake([], {"image_size": 40}, "40 is no multiple of patch_size 16"),
    "output": Mistake(["--output_dir", "Makefile"], {}, "cannot write to Makefile.*--output_dir"),
    "captions": Mistake(["--score_only", "train.json"], {}, "takes the val.json or test.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_told_before_the_first_step(mistake, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "train_step", None)
    config = write_config(tmp_path / "c.yaml", scenes, max_epoch=3, **mistake.changes)
    argv = ["--config", config, "--output_dir", str(tmp_path), *mistake.flags]
    with pytest.raises(UserError, match=mistake.message):
        run(argv)
    with pytest.raises(SystemExit) as stop:
        launch(train_caption.main, train_caption.parse_args(argv))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


FLAGS = {
    "--gradient_accumulation_steps 0": "must be a whole number from 1 to 1000000000, got '0'",
    "--deltaT 0": "must be a whole number from 1 to 1000000000, got '0'",
    "--deltaT 2.5": "must be a whole number from 1 to 1000000000, got '2.5'",
    "--init_lr -1": "must be a number from 0 to 10, got '-1'",
    "--init_lr nan": "must be a number from 0 to 10, got 'nan'",
    "--final_threshold 80": "must be a number from 0 to 1, got '80'",
    "--beta2 2": "must be a number from 0 to 1, got '2'",
    "--keep_checkpoints 0": "must be a whole number from 1 to 1000000000, got '0'",
    "--samples -1": "must be a whole number from 0 to 1000000000, got '-1'",
    "--seed -1": "must be a whole number from 0 to 1000000000, got '-1'",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_out_of_range(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        train_caption.parse_args(flag.replace(" ", "=").split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {flag.split()[0]}" in said and FLAGS[flag] in said


@pytest.mark.parametrize(
    "flags",
    [
        *("--spice", "--samples 2", "--pruned x", "--sparse"),
        *("--evaluate --eval_test", "--evaluate --check", "--evaluate --compile"),
    ],
)
def test_flag_that_would_be_ignored(flags):
    with pytest.raises(UserError, match="go(es)? with"):
        run(flags.split())


@pytest.mark.parametrize("flag", ["--amp bf16", "--device cuda"])
def test_sparse_products_are_in_float32_on_the_cpu(flag):
    where = "in float32" if "amp" in flag else "on the CPU"
    with pytest.raises(UserError, match=f"--sparse computes {where}: leave out {flag}"):
        run(["--evaluate", "--sparse", *flag.split()])


def test_captions_that_are_cut_are_counted(scenes, tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path / "c.yaml", scenes, max_tokens=18)
    run(["--config", config, "--output_dir", str(tmp_path), *PRUNE, "--check"])
    tokens = [
        len(record["caption"].split()) + 5  # with [DEC] a picture of, and [SEP]
        for record in json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    ]
    cut = sum(length > 18 for length in tokens)
    assert 0 < cut < 48
    said = f"{cut} of 48 training texts are longer than max_tokens 18 and are cut"
    assert capsys.readouterr().out.count(said) == 1
    monkeypatch.setattr("engine.run.LOOKED_AT", 10)  # every fifth
    run(["--config", config, "--output_dir", str(tmp_path), *PRUNE, "--check"])
    cut = sum(length > 18 for length in tokens[::5])
    said = f"{cut} of 10 training texts looked at are longer than max_tokens 18 and are cut"
    assert cut > 0 and capsys.readouterr().out.count(said) == 1


def test_full_disk(config, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=10_000))
    with pytest.raises(ValueError, match="GB are free: make room"):
        run(["--config", config, "--output_dir", str(tmp_path), *PRUNE])


@pytest.fixture
def damaged(scenes, tmp_path):
    """A copy of the scenes: one training image is cut off, one is missing, of 48."""
    copy = tmp_path / "damaged"
    shutil.copytree(scenes, copy)
    images = sorted((copy / "images/train").glob("*.png"))
    images[2].write_bytes(images[2].read_bytes()[:100])
    images[8].unlink()
    return copy, images[2], images[8]


def test_damaged_image_is_named(damaged, tmp_path):
    data, truncated, missing = damaged
    config = write_config(tmp_path / "c.yaml", data)
    with pytest.raises(UserError, match=f"1 of 48 images do not exist: .*{missing.name}"):
        run(["--config", config, "--output_dir", str(tmp_path)])
    Image.new("RGB", (32, 32)).save(missing)
    with pytest.raises(UserError, match=f"{truncated.name}.*--skip_bad_images"):
        run(["--config", config, "--output_dir", str(tmp_path), *PRUNE])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_counted_and_skipped(damaged, tmp_path, workers):
    config = write_config(tmp_path / "c.yaml", damaged[0], max_epoch=1, num_workers=workers)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", "skipped"]
    run([*argv, "--final_threshold", "1", "--eval_epochs", "0", "--skip_bad_images"])
    (line,) = (tmp_path / "skipped/log.txt").read_text().splitlines()
    captions = json.loads((damaged[0] / "annotation/coco_karpathy_train.json").read_text())
    bad = sum(caption["image"].endswith(("0002.png", "0008.png")) for caption in captions)
    assert json.loads(line)["bad_images"] >= bad  # the replacement may be bad too


def test_annotation_missing_offline(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError))
    config = write_config(tmp_path / "c.yaml", scenes, ann_root=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="coco_karpathy_train.json to .*/empty/coco_karpathy_train"):
        run(["--config", config, "--output_dir", str(tmp_path)])
