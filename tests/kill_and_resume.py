"""Kills training runs at random moments and resumes them: the weights must come out bit-equal.

python tests/kill_and_resume.py --kills 20 --processes 1
python tests/kill_and_resume.py --kills 10 --processes 2
"""

import argparse
import importlib
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from data.scenes import __main__ as scenes
from engine import loop as training
from engine import run as launching

TINY_VIT = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

# A server process imports everything once; the runs are forked from it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train_caption"])  # found where the current folder is the root


def make_scenes(folder: Path) -> Path:
    """The folder, with 48 training and 6 + 6 evaluation scenes in it."""
    sizes = ["--train", "48", "--val", "6", "--test", "6"]
    sizes += ["--statements", "8", "--heldout_statements", "8"]
    scenes.main(scenes.parse_args(["--out", str(folder), *sizes]))
    return folder


def write_config(path: Path, data: Path, dropout: float = 0.1, **changes) -> str:
    """A captioning config of a few thousand weights; with dropout, so that randomness matters."""
    config = {
        "image_root": str(data / "images"),
        "ann_root": str(data / "annotation"),
        "coco_gt_root": str(data / "annotation"),
        "tokenizer": str(data / "tokenizer"),
        "pretrained": "",
        "vit": {**TINY_VIT, "drop_path_rate": dropout},
        "med_config": {
            **TINY_TEXT,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        "image_size": 32,
        "batch_size": 2,
        "init_lr": 1e-3,
        "max_epoch": 4,
        "augment": True,
        "num_workers": 0,
        "num_beams": 1,
        "max_length": 8,
        **changes,
    }
    with open(path, "w") as file:
        YAML().dump(config, file)
    return str(path)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(argv: list[str], world_size: int = 1, script: str = "train_caption") -> list:
    """Starts a trainer in one process or several and returns them."""
    port = free_port()
    started = [
        processes.Process(target=run_rank, args=(script, argv, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    return started


def run_rank(script: str, argv: list[str], rank: int, world_size: int, port: int) -> None:
    """What torchrun's processes do: the script with its place among the others."""
    os.setsid()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the image loading workers
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    trainer = importlib.import_module(script)
    launching.launch(trainer.main, trainer.parse_args(argv))


def finish(started: list, timeout: float = 120) -> list[int]:
    """Waits for the processes and returns their exit codes."""
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def result(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote."""
    return load_file(folder / training.PRUNED_FILE)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    names = (path.stem for path in (folder / "checkpoints").glob("step_*.pt"))
    return sorted(int(name.removeprefix("step_")) for name in names)


def wait_for_step(folder: Path, process, step: int) -> None:
    """Waits until a checkpoint of at least `step` appears, or the process ends."""
    while max(saved_steps(folder), default=0) < step and process.is_alive():
        time.sleep(0.002)


def kill_and_resume(
    config: str, folder: Path, world_size: int, kills: int, seed: int = 0
) -> list[dict]:
    """Runs once undisturbed; then kills runs at random moments, resumes them and compares.

    Of several processes one is killed; the others must end by themselves within a minute.

    Returns:
        Of each killed run: the `step` of its newest checkpoint when it was dead, the seconds until
        all its processes had `ended`, and whether its result was `equal` in the end.
    """
    chance = random.Random(seed)
    argv = ["--config", config, "--output_dir", str(folder), "--warmup_steps", "4"]
    argv += ["--final_threshold", "0.3", "--checkpoint_steps", "3", "--eval_epochs", "0"]
    assert finish(start([*argv, "--model_dir", "whole"], world_size)) == [0] * world_size
    last_step = saved_steps(folder / "whole")[-1]
    expected, trials = result(folder / "whole"), []
    for number in range(kills):
        killed = folder / f"killed{number}"
        started = start([*argv, "--model_dir", killed.name], world_size)
        step, delay = chance.randint(0, last_step), chance.uniform(0, 0.5)
        victim = started[chance.randrange(world_size)]
        wait_for_step(killed, victim, step)
        time.sleep(delay)
        victim.kill()
        began = time.monotonic()
        assert None not in finish(started, timeout=60), "a process outlived the killed one"
        ended = time.monotonic() - began
        step = max(saved_steps(killed), default=0)
        codes = finish(start([*argv, "--model_dir", killed.name], world_size))
        equal = codes == [0] * world_size and same(result(killed), expected)
        trials.append({"step": step, "ended": round(ended, 1), "equal": equal})
    return trials


def main() -> None:
    """Prints the trials and their count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_config(folder / "config.yaml", make_scenes(folder / "scenes"), num_workers=1)
        trials = kill_and_resume(config, folder, args.processes, args.kills, args.seed)
    for trial in trials:
        print(trial)
    print(f"{sum(trial['equal'] for trial in trials)} of {len(trials)} resumed bit-equal")


if __name__ == "__main__":
    main()
