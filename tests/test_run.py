"""Starting a run: exit codes, mistakes on every rank, devices, launchers, the results folder."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import train_caption
from configs import SCHEMAS, load_config
from data.samplers import TrainBatchSampler
from engine import loop
from engine.checkpoints import save_weights
from engine.flags import DEFAULTS
from engine.processes import LAUNCHER, choose_device, init_distributed, launched_processes
from engine.run import Mistakes, find_weights, prepare_run, take_folder
from engine.run import start as begin
from engine.tasks import CAPTION, TASKS
from tests.runs import finish, make_scenes, start, write_config
from utils import UserError, launch


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


def raising(error):
    def main(args):
        raise error

    return main


def test_a_users_mistake_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        launch(raising(UserError("no such file")), None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such file\n"


def test_the_sentence_names_its_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        launch(raising(UserError("no such file")), None)
    assert capsys.readouterr().err == "error (rank 3): no such file\n"


class KilledDataset(torch.utils.data.Dataset):
    """Its loading process is killed, as for want of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def load_killed(args):
    list(torch.utils.data.DataLoader(KilledDataset(), num_workers=1))


def test_the_death_of_a_loading_process_is_told(capfd):
    with pytest.raises(SystemExit) as stop:
        launch(load_killed, None)
    assert stop.value.code == 2
    assert "error: an image loading process died" in capfd.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback():
    """Also a ValueError, which many mistakes of users are."""
    script = "from utils import launch\nlaunch(lambda args: int('ours'), None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: invalid literal" in done.stderr


def test_a_screen_that_lacks_a_letter_ends_no_run():
    script = "from utils import launch\nlaunch(lambda args: print('caf\xe9'), None)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


@pytest.mark.parametrize("error", [UserError("x"), RuntimeError("x"), None])
def test_the_process_group_ends_whatever_happens(error, tmp_path):
    def main(args):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
        if error:
            raise error

    try:
        launch(main, None)
    except (SystemExit, RuntimeError):
        pass
    assert not dist.is_initialized()


def test_a_mistake_on_one_rank_is_told(scenes, tmp_path):
    """An image that only the second process reads in its first step."""
    config = write_config(tmp_path / "c.yaml", scenes, num_workers=1)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "2"]
    args = train_caption.parse_args(argv)
    records = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    sampler = TrainBatchSampler(len(records), 2, args.seed, rank=1, world_size=2)
    victim = scenes / "images" / records[next(iter(sampler))[0][0]]["image"]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100])
    try:
        codes = finish(start(argv, world_size=2, log=tmp_path / "log"))
    finally:
        victim.write_bytes(whole)
    said = (tmp_path / "log").read_text()
    assert codes[1] == 2 and codes[0] not in (0, None)
    assert f"error (rank 1): cannot read image {victim}" in said


def test_all_mistakes_are_told_at_once(scenes, tmp_path):
    changes = {"ann_root": str(tmp_path), "tokenizer": "/nowhere", "pretrained": "no.pth"}
    config = write_config(tmp_path / "c.yaml", scenes, **changes)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--id_profile", "no.json"]
    with pytest.raises(UserError) as error:
        train_caption.main(train_caption.parse_args(argv))
    for part in ("coco_karpathy_train.json", "'/nowhere'", "no.pth", "no.json"):
        assert part in str(error.value)


def test_collected_mistakes_come_once_and_other_errors_at_once():
    mistakes = Mistakes()
    for text in ("one", "two", "one"):
        with mistakes.collect():
            raise UserError(text)
    with pytest.raises(ValueError, match="ours"), mistakes.collect():
        raise ValueError("ours")
    with pytest.raises(UserError) as error:
        mistakes.raise_all()
    assert str(error.value).split() == ["one", "two"]


def test_check_stops_before_the_first_step(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "train_step", None)
    config = write_config(tmp_path / "c.yaml", scenes)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--check"]
    train_caption.main(train_caption.parse_args(argv))
    assert "all is there: 96 steps in 4 epochs" in capsys.readouterr().out
    assert not (tmp_path / "c/config.json").exists()  # which may be that of a run before
    with pytest.raises(UserError, match="schedule is longer"):
        train_caption.main(train_caption.parse_args([*argv, "--max_steps", "9"]))


def test_a_folder_in_use_is_refused_until_its_process_dies(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom engine.run import take_folder\n"
        "take_folder(Path(sys.argv[1]))\nprint('taken', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
            take_folder(tmp_path)
        other.kill()
        other.wait()
    take_folder(tmp_path)
    take_folder(tmp_path)  # a later run of the same process


# --- what a run is made of -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "profile"),
    [
        ("", ""),
        ("--useID", "configs.json"),
        ("--id_profile own.json", "own.json"),
        ("--useID --id_profile own.json", "own.json"),
    ],
)
def test_scores_are_weighted_where_it_is_asked_for(flags, profile, scenes, tmp_path):
    config = write_config(tmp_path / "c.yaml", scenes, id_profile="configs.json")
    argv = ["--config", config, "--output_dir", str(tmp_path), *flags.split()]
    assert begin(train_caption.parse_args(argv), CAPTION).id_profile == profile


@pytest.mark.parametrize(
    ("flags", "found"),
    [("", "dense.pth"), ("--evaluate", "dense.pth"), ("--evaluate --pruned p.pth", "p.pth")],
)
def test_pruned_weights_go_before_the_configs(flags, found, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dense.pth", "p.pth"):
        (tmp_path / name).touch()
    config = write_config(tmp_path / "c.yaml", scenes, pretrained="dense.pth")
    argv = ["--config", config, "--output_dir", str(tmp_path), *flags.split()]
    assert find_weights(begin(train_caption.parse_args(argv), CAPTION)).name == found


def test_images_are_looked_for_where_they_are_needed(scenes, tmp_path):
    """Held-out ones before training, too; training images not for an evaluation."""
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    config = write_config(tmp_path / "c.yaml", copy)
    weights = tmp_path / "weights.safetensors"
    save_weights(CAPTION.build_model(load_config(config)), weights)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--pretrained", str(weights)]

    def prepare(*flags):
        return prepare_run(train_caption.parse_args([*argv, *flags]), CAPTION)

    next((copy / "images/train").iterdir()).unlink()
    prepare("--evaluate")
    with pytest.raises(UserError, match="1 of 48 images do not exist"):
        prepare()
    _, _, train_set, held_out = prepare("--skip_bad_images")
    assert train_set.skip_bad_images
    assert not any(split.skip_bad_images for split in held_out.values())
    shutil.copytree(scenes / "images/train", copy / "images/train", dirs_exist_ok=True)
    next((copy / "images/test").iterdir()).unlink()
    for flags in ((), ("--evaluate",), ("--skip_bad_images",)):
        with pytest.raises(UserError, match="1 of 6 images do not exist"):
            prepare(*flags)


# --- devices and launchers -----------------------------------------------------------------------


@pytest.fixture
def accelerators(monkeypatch):
    """Makes torch see some accelerators of a type."""

    def see(kind, count):
        found = torch.device(kind) if count else None
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: found
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return see


def test_devices(accelerators, monkeypatch):
    accelerators("cuda", 0)
    assert choose_device("auto", 1) == choose_device("cpu", 1) == torch.device("cpu")
    accelerators("cuda", 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda:0")
    assert choose_device("cuda:1", 1) == torch.device("cuda:1")
    assert choose_device("cpu", 2) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto", 2) == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    accelerators("xpu", 1)
    assert choose_device("xpu", 1) == torch.device("xpu:0")


@pytest.mark.parametrize(
    ("kind", "count", "device", "processes", "message"),
    [
        ("cuda", 0, "cuda", 1, "cuda is asked for, but torch sees no GPU"),
        ("cuda", 2, "gpu", 1, "--device gpu: choose auto, cpu, cuda, cuda:N, mps or xpu"),
        ("cuda", 2, "cuda:one", 1, "--device cuda:one: choose"),
        ("cuda", 2, "", 1, "--device : choose"),
        ("cuda", 2, "cuda:2", 1, "cuda:2 is asked for, but there are 2 such devices"),
        ("cuda", 2, "mps", 1, "mps is asked for, but torch sees cuda"),
        ("cuda", 2, "cuda:1", 2, "under torchrun, where each process needs a device of its own"),
    ],
)
def test_a_device_that_is_not_there(accelerators, kind, count, device, processes, message):
    accelerators(kind, count)
    with pytest.raises(UserError, match=message):
        choose_device(device, processes)


@pytest.fixture
def launcher(monkeypatch):
    """Sets torchrun's variables, all others being absent."""
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
WHOLE |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29505"}


def test_torchruns_variables(launcher):
    assert launched_processes() == 1
    launcher(SLURM_STEP_NUM_TASKS="1")
    assert launched_processes() == 1
    launcher(SLURM_STEP_NUM_TASKS="2", **WHOLE)
    assert launched_processes() == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but not RANK, LOCAL_RANK"),
        ({**WHOLE, "MASTER_ADDR": ""}, "are set in the environment, but not MASTER_ADDR:"),
        ({**WHOLE, "RANK": ""}, "but not RANK: torchrun sets them all"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment: not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM started 2 tasks.*srun .*torch.distributed.run"),
    ],
)
def test_launchers_that_would_go_wrong(launcher, values, message):
    launcher(**values)
    with pytest.raises(UserError, match=message):
        launched_processes()


def test_a_port_that_is_taken(launcher):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launcher(**WHOLE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port})
        with pytest.raises(UserError, match=f"port {port} .*choose another --master_port"):
            init_distributed("cpu")


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_flags_of_older_launchers_are_passed_over(flag):
    assert vars(train_caption.parse_args([flag])) | {"local_rank": None} == vars(
        train_caption.parse_args([])
    )


def test_results_go_to_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert train_caption.parse_args(["--output_dir=~/results"]).output_dir == "/home/me/results"


def test_every_task_is_a_schema_and_a_script():
    assert set(TASKS) == set(SCHEMAS)
    for task in TASKS.values():
        module = __import__(task.script.removesuffix(".py"))
        args = module.parse_args([])
        assert isinstance(args, argparse.Namespace)
        defaults = args.config, args.initial_warmup, args.final_warmup
        assert defaults == DEFAULTS[task.name]
