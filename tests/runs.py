"""Small training runs for tests: their data and config, and processes as torchrun starts them."""

import importlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import raise_signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import nn

from dimension.profile import IDProfile
from pruners import Pruner
from reports.runs import LOG_FILE, PRUNED_FILE
from utils import launch

TINY_VIT = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_TEXT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
TINY_TEXT |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
TINY_CLIP = {"embed_dim": 16, "patch_size": 16, "context_length": 32, "vocab_size": 128}
TINY_CLIP |= {"vision_width": 32, "vision_layers": 2, "vision_heads": 2}
TINY_CLIP |= {"text_width": 32, "text_layers": 2, "text_heads": 2}

# A server process imports everything once; the runs are forked from it.
FORKED = "forkserver"
processes = multiprocessing.get_context(FORKED)
processes.set_forkserver_preload(["engine.loop", "engine.tasks", "train_caption"])


def make_scenes(
    folder: Path, train: int = 48, held_out: int = 6, statements: int = 8, heldout: int = 8
) -> Path:
    """The folder, with scenes and statements in it; `held_out` scenes in each of val and test."""
    from data.scenes import __main__ as scenes

    sizes = f"--train {train} --val {held_out} --test {held_out}"
    sizes += f" --statements {statements} --heldout_statements {heldout}"
    scenes.main(scenes.parse_args(["--out", str(folder), *sizes.split()]))
    return folder


def write_config(path: Path, data: Path, dropout: float = 0.1, **changes) -> str:
    """A captioning config of a few thousand weights; with dropout, so that randomness matters."""
    generation = {"coco_gt_root": str(data / "annotation"), "num_beams": 1, "max_length": 8}
    training = {"pretrained": "", "batch_size": 2, "max_epoch": 4, "augment": True}
    return _write(path, data, _blip(dropout), generation, training, changes)


def write_nlvr_config(path: Path, data: Path, dropout: float = 0.0, **changes) -> str:
    training = {"batch_size": 4, "max_epoch": 3, "augment": False}
    return _write(path, data, _blip(dropout), training, changes)


def write_clip_config(path: Path, data: Path, **changes) -> str:
    training = {"queue_size": 8, "batch_size": 4, "max_epoch": 2}
    return _write(path, data, {"clip": TINY_CLIP}, training, changes)


def _blip(dropout: float) -> dict:
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {
        "vit": {**TINY_VIT, "drop_path_rate": dropout},
        "med_config": {**TINY_TEXT, **dict.fromkeys(probabilities, dropout)},
    }


def _write(path: Path, data: Path, *parts: dict) -> str:
    places = {"image_root": "images", "ann_root": "annotation", "tokenizer": "tokenizer"}
    config = {key: str(data / folder) for key, folder in places.items()}
    config |= {"image_size": 32, "init_lr": 1e-3, "num_workers": 0}
    for part in parts:
        config |= part
    yaml = YAML()
    yaml.width = 4096  # a key and its value stay on one line
    yaml.dump(config, path)
    return str(path)


def write_model(build: Callable, config: dict, folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """A model of a config's sizes with 80 % of each matrix zero, and the flags that name it."""
    places = dict.fromkeys(("image_root", "ann_root"), "x")
    config = {**places, "init_lr": 0.1, "max_epoch": 1, "batch_size": 1, **config}
    (folder / "model.yaml").write_text(json.dumps(config))
    model = build(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[torch.rand_like(parameter) < 0.8] = 0
    torch.save(model.state_dict(), folder / "model.pth")
    return model, ["--config", str(folder / "model.yaml"), "--pruned", str(folder / "model.pth")]


def run(script: str, argv: list[str]) -> None:
    """A script as it is run, in this process."""
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))


def train(config, folder: Path, name: str, *flags: str, script: str = "train_caption") -> Path:
    """Trains or evaluates in this process, and returns the folder of the results."""
    run(script, ["--config", f"{config}", "--output_dir", f"{folder}", "--model_dir", name, *flags])
    return folder / name


def compute_id(folder: Path, *flags) -> IDProfile:
    """The profile that ComputeID.py measures on the CPU, or estimates again."""
    run("ComputeID", ["--Path", str(folder), "--cpu", *map(str, flags)])
    return IDProfile.read(folder)


def ids(profile: IDProfile) -> dict[str, float]:
    """Layer name to ID."""
    return {name: layer.id for name, layer in profile.layers.items()}


def outputs_of(layers: dict[str, nn.Module], work: Callable) -> dict[str, list]:
    """What each layer gives, call by call, while work() runs without gradients."""
    outputs: dict[str, list] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            outputs[name] = []
            hook = layer.register_forward_hook(lambda *call, to=outputs[name]: to.append(call[2]))
            hooks.enter_context(hook)
        work()
    return outputs


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def on_two_processes(work: Callable, *arguments) -> None:
    """Calls work(rank, *arguments) on two processes of a group."""
    torch.multiprocessing.start_processes(
        _member, (free_port(), work, arguments), nprocs=2, start_method=FORKED
    )


def _member(rank: int, port: int, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    work(rank, *arguments)
    dist.destroy_process_group()


def train_in_float64(patch: pytest.MonkeyPatch) -> None:
    """Lets this process train in float64: the models, and their images.

    Sums of another order then differ by 1e-16 of themselves. A few dozen steps do not amplify that
    to the distance between a score and the threshold, so trainings prune the same weights, and
    their losses agree to 1e-9.
    """
    from torchvision.transforms import v2

    torch.set_default_dtype(torch.float64)
    to_dtype = v2.ToDtype
    patch.setattr(v2, "ToDtype", lambda _, **options: to_dtype(torch.float64, **options))


def in_float64(rank: int) -> None:
    """`train_in_float64` for `start`."""
    train_in_float64(pytest.MonkeyPatch())


@contextmanager
def stopped_at(step: int, error: type[BaseException] = SystemExit, signal: int = 0) -> Iterator:
    """A training inside the block ends with the error: it, or a signal, comes after a step."""
    prune = Pruner.step

    def stopped(self, global_step):
        found = prune(self, global_step)
        if global_step == step and signal:
            raise_signal(signal)
        elif global_step == step:
            raise error
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error) as raised:
        patch.setattr(Pruner, "step", stopped)
        yield raised


def start(
    argv: list[str],
    world_size: int = 1,
    script: str = "train_caption",
    before: Callable[[int], None] | None = None,
) -> list:
    """Starts a script in one process or several, which call before(rank).

    On an accelerator each process wants one of its own; other processes see no simulated one.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device and (device.type == "sim" or torch.accelerator.device_count() < world_size):
        pytest.skip(f"{world_size} process(es) do not have a {device.type} each")
    port = free_port()
    started = [
        processes.Process(target=run_rank, args=(script, argv, rank, world_size, port, before))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    return started


def run_rank(script: str, argv: list[str], rank: int, world_size: int, port: int, before):
    """What torchrun's processes do: the script with its place among the others."""
    os.setsid()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the image loading workers
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    if before:
        before(rank)
    module = importlib.import_module(script)
    launch(module.main, module.parse_args(argv))


def finish(started: list, timeout: float = 120) -> list[int]:
    """Waits for the processes and returns their exit codes; None of one that outlived the time."""
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def result(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote."""
    return load_file(folder / PRUNED_FILE)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def zeros(weights: dict[str, torch.Tensor], layers) -> torch.Tensor:
    """Which of the prunable numbers are zero, of the layers' weights and biases in one row."""
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return torch.cat([(weights[name] == 0).flatten() for name in names])


def log_of(folder: Path) -> list[dict]:
    """The lines of a run's log, one an epoch."""
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def saved_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    names = (path.stem for path in (folder / "checkpoints").glob("step_*.pt"))
    return sorted(int(name.removeprefix("step_")) for name in names)
