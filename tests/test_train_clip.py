"""train_clip_flickr30k.py as it is run: pruning, recalls, resuming, and mistakes."""

import json

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

import ComputeID
import train_clip_flickr30k
from configs import load_config
from dimension.profile import load_profile
from engine import loop
from engine.tasks import RETRIEVAL
from models import prunable_layers
from tests.kill_and_resume import kill_and_resume
from tests.runs import finish, make_scenes, result, same, start
from utils import UserError

CLIP = {"embed_dim": 16, "patch_size": 16, "vision_width": 32, "vision_layers": 2}
CLIP |= {"vision_heads": 2, "context_length": 32, "vocab_size": 128, "text_width": 32}
CLIP |= {"text_layers": 2, "text_heads": 2}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A config of a small CLIP, and what every run has in common."""
    folder = tmp_path_factory.mktemp("clip")
    scenes = make_scenes(folder / "scenes")
    config = {
        "image_root": str(scenes / "images"),
        "ann_root": str(scenes / "annotation"),
        "tokenizer": str(scenes / "tokenizer"),
        "clip": CLIP,
        "image_size": 32,
        "queue_size": 8,
        "batch_size_train": 4,
        "batch_size_test": 4,
        "init_lr": 1e-3,
        "max_epoch": 2,
        "num_workers": 0,
    }
    with open(folder / "c.yaml", "w") as file:
        YAML().dump(config, file)
    flags = ["--config", str(folder / "c.yaml"), "--output_dir", str(folder)]
    return [*flags, "--warmup_steps", "3", "--deltaT", "2", "--final_threshold", "0.4"], folder


def run(flags, *more):
    train_clip_flickr30k.main(train_clip_flickr30k.parse_args([*flags, *more]))


def test_a_run_prunes_and_is_evaluated(flags, capsys):
    flags, folder = flags
    run(flags, "--model_dir", "run", "--use_ceph", "--w_sp_attn", "1.0", "--lr", "5e-4")
    log = [json.loads(line) for line in (folder / "run/log.txt").read_text().splitlines()]
    assert log[0]["lr"] == 5e-4 and {"val_r_mean", "val_txt_r1", "val_img_r10"} <= log[1].keys()
    weights = load_file(folder / "run/pruned.safetensors")
    model = RETRIEVAL.build_model(load_config(flags[1]))
    assert set(weights) == {name for name, _ in model.named_parameters()}  # no queue, no copy
    layers = [f"{n}.{kind}" for n in prunable_layers(model) for kind in ("weight", "bias")]
    zeros = sum(int((weights[name] == 0).sum()) for name in layers)
    assert zeros / sum(weights[name].numel() for name in layers) == pytest.approx(0.6, abs=1e-3)
    run(flags[:4], "--evaluate", "--pruned", str(folder / "run"))
    recalls = json.loads((folder / "run/results/recalls.json").read_text())
    assert recalls["val"]["r_mean"] == log[1]["val_r_mean"] and recalls["test"].keys() > {"txt_r5"}
    assert "test: {" in capsys.readouterr().out


def test_a_killed_run_goes_on_with_queue_copy_and_ramp(flags, monkeypatch):
    """Killed in the first epoch, while alpha still rises."""
    flags, folder = flags
    more = ["--eval_epochs", "0", "--checkpoint_steps", "5"]
    run(flags, "--model_dir", "whole", *more)
    train_step, alphas = loop.train_step, []

    def killed(run, state, parts, weights):
        train_step(run, state, parts, weights)
        alphas.append(state.model.ramp)
        if state.progress.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(flags, "--model_dir", "killed", *more)
    assert alphas == pytest.approx([step / 12 for step in range(7)])
    run(flags, "--model_dir", "killed", *more)
    assert same(result(folder / "killed"), result(folder / "whole"))
    states = [
        torch.load(folder / name / "checkpoints/step_00000024.pt", weights_only=True)["model"]
        for name in ("killed", "whole")
    ]
    assert same(*states) and any("queue" in name for name in states[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_processes_resume(flags, tmp_path, world_size):
    """Queue, momentum copy and ramp come back on every process."""
    config = flags[0][1]
    script, seed = "train_clip_flickr30k", 5  # kills after half of the steps
    trials = kill_and_resume(config, tmp_path, world_size, 1, seed, script)
    assert [trial["equal"] for trial in trials] == [True]
    assert trials[0]["step"] > 0


def test_one_process_and_two_train_and_evaluate_the_same(flags, float64):
    flags, folder = flags
    run(flags, "--model_dir", "alone")
    argv = [*flags, "--model_dir", "together", "--batch_size", "2"]
    assert finish(start(argv, 2, "train_clip_flickr30k", float64=True)) == [0, 0]
    alone, together = (
        [json.loads(line) for line in (folder / name / "log.txt").read_text().splitlines()]
        for name in ("alone", "together")
    )
    assert [r["step"] for r in together] == [r["step"] for r in alone] == [12, 24]
    losses, others = ([r["loss"] for r in log] for log in (alone, together))
    assert others == pytest.approx(losses, rel=1e-9)
    pruned, others = (
        torch.cat([(value == 0).flatten() for value in result(folder / name).values()])
        for name in ("alone", "together")
    )
    assert torch.equal(pruned, others) and pruned.double().mean() > 0.25
    states = [
        torch.load(folder / name / "checkpoints/step_00000024.pt", weights_only=True)["model"]
        for name in ("alone", "together")
    ]
    assert torch.equal(states[0]["id_queue"], states[1]["id_queue"])
    recalls = []
    for name, processes in (("one", 1), ("two", 2)):
        argv = [*flags[:4], "--evaluate", "--pruned", str(folder / "alone"), "--model_dir", name]
        assert finish(start(argv, processes, "train_clip_flickr30k")) == [0] * processes
        recalls.append(json.loads((folder / name / "results/recalls.json").read_text()))
    assert recalls[0] == recalls[1]
    assert recalls[0]["val"]["r_mean"] == alone[1]["val_r_mean"]


def test_the_ids_of_its_layers_are_measured(flags):
    """By the run's weights, and they weight a run's scores."""
    flags, folder = flags
    run(flags, "--model_dir", "start", "--eval_epochs", "0")
    argv = ["--config", flags[1], "-n", "24", "--Path", str(folder / "ID"), "--cpu"]
    ComputeID.main(ComputeID.parse_args([*argv, "--pruned", str(folder / "start")]))
    profile = load_profile(folder / "ID")
    assert list(profile) == list(prunable_layers(RETRIEVAL.build_model(load_config(flags[1]))))
    assert all(dimension > 0 for dimension in profile.values())
    run(flags, "--model_dir", "ID80", "--id_profile", str(folder / "ID"), "--eval_epochs", "0")
    assert not same(result(folder / "ID80"), result(folder / "start"))


def test_a_queue_that_batches_do_not_fill_is_refused(flags):
    with pytest.raises(UserError, match="queue_size"):
        run(flags[0], "--batch_size", "3", "--model_dir", "odd")


def test_the_papers_command_is_the_default():
    args = train_clip_flickr30k.parse_args(["--useID", "--epoch", "3"])
    assert (args.initial_warmup, args.final_warmup, args.max_epoch) == (0, 2, 3)
    config = load_config(args.config)
    assert (config["task"], config["batch_size"], config["queue_size"]) == ("retrieval", 32, 57600)
