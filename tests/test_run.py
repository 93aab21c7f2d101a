"""Starting a run: its record, mistakes, devices, launchers, and the folder of its results."""

import importlib
import io
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import train_caption
from configs import SCHEMAS, load_config
from engine.checkpoints import save_weights
from engine.experiment import read_experiment
from engine.main import find_weights, locked, prepare, run_task, start
from engine.processes import (
    LAUNCHER,
    choose_device,
    computes_bf16,
    init_distributed,
    launched_processes,
)
from engine.tasks import CAPTION, TASKS
from tests.runs import on_two_processes, processes, write_config
from utils import UserError


@pytest.fixture
def experiment(scenes, tmp_path):
    """Reads flags for a small captioner whose config has some changes."""

    def read(flags="", data=scenes, **changes):
        config = write_config(tmp_path / "c.yaml", data, **changes)
        argv = ["--config", config, "--output_dir", str(tmp_path), *flags.split()]
        return read_experiment(train_caption.parse_args(argv), "caption")

    return read


# --- what a run is -------------------------------------------------------------------------------


def test_a_record_holds_flags_config_and_the_command_as_typed(experiment, tmp_path, monkeypatch):
    run = experiment("--deltaT 7 --batch_size=4")
    run.write(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == {"config", "flags", "argv"}
    assert saved["config"] == run.config and run.config["batch_size"] == 4
    assert saved["flags"]["deltaT"] == 7 and "argv" not in saved["flags"]
    assert saved["argv"][-3:] == ["--deltaT", "7", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_caption.py", "--seed", "3"])
    assert train_caption.parse_args().argv == ["train_caption.py", "--seed", "3"]


def test_scores_are_weighted_where_it_is_asked_for(experiment):
    for flags, profile in (("", ""), ("--useID", "c"), ("--useID --id_profile own", "own")):
        assert experiment(flags, id_profile="c").id_profile == profile


@pytest.mark.parametrize(
    "command",
    [
        "train_caption --output_dir --model_dir --config --pruned --id_profile --resume",
        "export --config --pruned --out",
        "caption a.jpg --config --pruned",
        "ComputeID --Path --config --pretrained",
    ],
)
def test_a_tilde_is_the_users_home(monkeypatch, command):
    """Shells leave the tilde of --flag=~/x as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    script, *flags = re.sub(r"(--\w+)", r"\1=~/place", command).split()
    args = vars(importlib.import_module(script).parse_args(flags))
    for flag in re.findall(r"--(\w+)", command):
        assert str(args[flag]) == "/home/me/place"


# warm-ups, remaining ratio, samples of a batch, epochs
PAPER = {
    "caption": (1, 1, 0.2, 20, 5),
    "nlvr": (0, 5, 0.2, 10, 10),
    "retrieval": (0, 2, 0.2, 32, 5),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_are_the_defaults_of_every_task(name):
    assert set(PAPER) == set(TASKS) == set(SCHEMAS)
    script = TASKS[name].script.removesuffix(".py")
    parse = importlib.import_module(script).parse_args
    args = parse(["--useID", "--local-rank=1", "--local_rank=1"])  # as older launchers call it
    config = load_config(args.config)
    assert config["task"] == name and Path(config["id_profile"]).exists()
    found = args.initial_warmup, args.final_warmup, args.final_threshold
    assert (*found, config["batch_size"], config["max_epoch"]) == PAPER[name]


# --- the folder of results -----------------------------------------------------------------------


def test_results_go_to_the_evaluated_run_but_to_no_other_folder(experiment, tmp_path, monkeypatch):
    run, foreign = tmp_path / "run", tmp_path / "hub"
    for folder in (run, foreign):  # a file of ours alone makes no run
        folder.mkdir()
        (folder / "pruned.safetensors").touch()
        (folder / "config.json").touch()
    (run / "sparsity.json").touch()
    for flags, folder in [
        ("", tmp_path / "c"),
        ("--model_dir a/b", tmp_path / "a/b"),
        (f"--evaluate --pruned {run}", run),
        (f"--evaluate --pruned {run} --model_dir m", tmp_path / "m"),
        (f"--evaluate --pruned {foreign}", tmp_path / "c"),
        (f"--evaluate --pruned {run}/pruned.safetensors", tmp_path / "c"),
    ]:
        assert experiment(flags).folder == folder
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert experiment(f"--evaluate --pruned {run}").folder == tmp_path / "c"


def hold(folder, pipe):
    with locked(folder):
        pipe.send("taken")
        time.sleep(60)


def test_a_folder_in_use_is_refused_until_its_process_dies(tmp_path):
    here, there = processes.Pipe()
    other = processes.Process(target=hold, args=(tmp_path, there))
    other.start()
    assert here.recv() == "taken"
    with pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
        with locked(tmp_path):
            pass
    other.kill()
    other.join()
    with locked(tmp_path):
        pass


def test_a_refused_command_changes_nothing(experiment, tmp_path):
    def files():
        found = (tmp_path / "run").rglob("*")
        return {path: path.read_bytes() for path in found if path.is_file()}

    plain = "--warmup_steps 1 --max_steps 8 --deltaT 2 --eval_epochs 0 --model_dir run"
    run_task(experiment(plain, max_epoch=1))
    before = files()
    assert tmp_path / "run/config.json" in before
    for flags, message in [
        ("--final_threshold 0.1", "final_threshold was 0.2, is 0.1.*--resume off"),
        ("--seed 7", "of another run: seed was 42, is 7"),
        ("--pretrained no.pth", "no.pth"),
        ("--max_steps 2", "schedule is longer"),
    ]:
        with pytest.raises(UserError, match=message):
            run_task(experiment(f"{plain} {flags}", max_epoch=1))
        assert files() == before


# --- checks of flags, data and weights -----------------------------------------------------------


def test_a_check_counts_steps_and_captions_that_are_cut(experiment, scenes, tmp_path, capsys):
    run_task(experiment("--check", max_tokens=18))
    printed = capsys.readouterr().out
    assert "all is there: 96 steps in 4 epochs" in printed
    records = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    # with [DEC] a picture of, and [SEP]
    cut = sum(len(record["caption"].split()) + 5 > 18 for record in records)
    assert 0 < cut < 48
    text = f"\nc: {cut} of 48 training texts are longer than max_tokens 18 and are cut"
    assert printed.count(text) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparse", "--sparse goes with --evaluate"),
        ("--evaluate --compile", "--compile goes with training"),
        ("--evaluate --sparse --amp bf16", "--sparse computes in float32: leave out --amp bf16"),
        ("--evaluate --sparse --device cuda", "computes on the CPU: leave out --device cuda"),
        ("--max_steps 24", r"\(1 initial \+ 1 final\) x 24 .* has 24 steps"),
        ("--id_profile configs/id/blip_nlvr.json", r"missing: .*, \.\.\.; unknown: .*, \.\.\."),
        ("--resume Makefile", "the checkpoint Makefile is not whole"),
        ("--evaluate", "nothing to evaluate: give --pruned"),
        ("--output_dir Makefile", "cannot write to Makefile.*--output_dir or --model_dir"),
    ],
)
def test_a_mistake_is_named_before_the_first_step(experiment, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run_task(experiment(flags))
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("flag", "value", "range"),
    [
        ("--gradient_accumulation_steps", "0", "a whole number from 1 to"),
        ("--init_lr", "nan", "a number from 0 to 10"),
        ("--final_threshold", "80", "a number from 0 to 1"),
        ("--seed", "-1", "a whole number from 0 to"),
    ],
)
def test_a_flag_out_of_its_range(flag, value, range, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_caption.parse_args([f"{flag}={value}"])
    assert re.search(f"argument .*{flag}.* {range}.*, got '{value}'", capsys.readouterr().err)


def test_all_mistakes_are_named_at_once(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no route to host")))
    wrong = {"ann_root": str(tmp_path / "none"), "tokenizer": "/nowhere", "pretrained": "no.pth"}
    with pytest.raises(UserError) as error:
        run_task(experiment("--id_profile no.json", **wrong))
    for part in (f"{tmp_path}/none/coco_karpathy_train", "'/nowhere'", "no.pth", "no.json"):
        assert part in str(error.value)
    assert not (tmp_path / "c").exists()


def find_at_address(rank, folder):
    """Notes each download; the config's own weights would be missing."""

    def answer(address, timeout):
        (folder / f"asked by {rank}").touch()
        content = io.BytesIO(b"weights")
        content.headers = {}
        return content

    os.environ["TORCH_HOME"] = str(folder / "cache")
    urllib.request.urlopen = answer
    run = {"flags": SimpleNamespace(pruned="http://x/p.pth"), "config": {"pretrained": "no.pth"}}
    assert find_weights(SimpleNamespace(**run)).read_bytes() == b"weights"


def test_pruned_weights_are_downloaded_once_by_two_processes(tmp_path):
    on_two_processes(find_at_address, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "asked by 0"}


def test_images_are_looked_for_where_they_are_needed(experiment, scenes, tmp_path):
    """Held-out ones before training, too; training images not for an evaluation."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    weights = tmp_path / "weights.safetensors"
    save_weights(CAPTION.build_model(experiment().config), weights)

    def prepared(flags):
        return prepare(start(experiment(f"--pretrained {weights} {flags}", copy)))

    next((copy / "images/train").iterdir()).unlink()
    with pytest.raises(UserError, match="1 of 48 images do not exist"):
        prepared("")
    assert list(prepared("--skip_bad_images")[2]) == ["val", "test"]
    next((copy / "images/test").iterdir()).unlink()
    for flags in ("--skip_bad_images", "--evaluate"):
        with pytest.raises(UserError, match="1 of 6 images do not exist"):
            prepared(flags)
    assert list(prepared("--evaluate --split val")[2]) == ["val"]


# --- devices and launchers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "device", "processes", "rank", "found"),
    [
        ("cuda 0", "auto", 1, "", "cpu"),
        ("cuda 0", "cuda", 1, "", "cuda:0 is asked for, but torch sees no GPU"),
        ("cuda 2", "auto", 1, "", "cuda:0"),
        ("cuda 2", "cuda:1", 1, "", "cuda:1"),
        ("cuda 2", "auto", 2, "1", "cuda:1"),
        ("xpu 1", "xpu", 1, "0", "xpu:0"),
        ("cuda 2", "gpu", 1, "", "--device gpu: choose auto, cpu, cuda, cuda:N, mps or xpu"),
        ("cuda 2", "cuda:2", 1, "", "cuda:2 is asked for, but there are 2: start"),
        ("cuda 2", "mps", 1, "", "mps:0 is asked for, but torch sees cuda"),
        ("cuda 2", "cuda:1", 2, "0", "under torchrun each process needs a device of its own"),
    ],
)
def test_devices(present, device, processes, rank, found, monkeypatch):
    kind, count = present.split()
    seen = torch.device(kind) if int(count) else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: seen)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(count))
    monkeypatch.setenv("LOCAL_RANK", rank)
    if " " in found:
        with pytest.raises(UserError, match=found):
            choose_device(device, processes)
    else:
        assert choose_device(device, processes) == torch.device(found)


@pytest.mark.parametrize("itself", [False, True])
def test_bfloat16_by_default_where_the_device_computes_it_itself(monkeypatch, itself):
    """A V100 or T4 emulates it."""
    supported = lambda including_emulation=True: including_emulation or itself  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert computes_bf16(torch.device("cuda:0")) == itself
    assert not computes_bf16(torch.device("cpu"))


def test_torch_is_asked_for_deterministic_algorithms(experiment):
    start(experiment("--deterministic"))
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    torch.use_deterministic_algorithms(False)


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
WHOLE |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29505"}


def launch_as(monkeypatch, values):
    """Sets launchers' variables, all others being absent."""
    for name in (*LAUNCHER, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, 1),
        ({"SLURM_STEP_NUM_TASKS": "2", **WHOLE}, 2),
        ({"WORLD_SIZE": "2"}, "the environment sets WORLD_SIZE, but not RANK, LOCAL_RANK"),
        ({**WHOLE, "MASTER_ADDR": ""}, "MASTER_PORT, but not MASTER_ADDR:"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment: not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM started 2 tasks.*srun .*torch.distributed.run"),
    ],
)
def test_launchers(values, found, monkeypatch):
    launch_as(monkeypatch, values)
    if isinstance(found, int):
        assert launched_processes() == found
    else:
        with pytest.raises(UserError, match=found):
            launched_processes()


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launch_as(monkeypatch, WHOLE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port})
        with pytest.raises(UserError, match=f"port {port} .*choose another --master_port"):
            init_distributed("cpu")
