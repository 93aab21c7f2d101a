"""train_clip_flickr30k.py as it is run: pruning, recalls, resuming, and mistakes."""

import json

import pytest
import torch

import train_clip_flickr30k
from configs import load_config
from dimension.profile import load_profile
from models import build_clip, prunable_layers
from models.clip import ClipRetrieval
from tests import runs
from utils import UserError

SCRIPT = "train_clip_flickr30k"
PRUNE = ["--warmup_steps", "2", "--deltaT", "2", "--final_threshold", "0.4", "--final_warmup", "1"]
PRUNE += ["--amp", "off"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Flags of a small CLIP's runs, which take 12 steps in 2 epochs; the folder."""
    folder = tmp_path_factory.mktemp("clip")
    scenes = runs.make_scenes(folder / "scenes", train=24)
    config = runs.write_clip_config(folder / "c.yaml", scenes)
    return ["--config", config, "--output_dir", str(folder)], folder


def train(setup, name, *flags):
    runs.run(SCRIPT, [*setup[0], "--model_dir", name, *PRUNE, *flags])
    return setup[1] / name


def last_state(folder):
    return torch.load(folder / "checkpoints/step_00000012.pt", weights_only=True)["model"]


def recalls_of(folder):
    return json.loads((folder / "results/recalls.json").read_text())


def test_a_run_prunes_and_is_evaluated(setup, capsys):
    folder = train(setup, "run", "--use_ceph", "--w_sp_attn", "1.0", "--lr", "5e-4")
    log = runs.log_of(folder)
    assert log[0]["lr"] == 5e-4 and {"val_r_mean", "val_txt_r1", "val_img_r10"} <= log[1].keys()
    weights, model = runs.result(folder), build_clip(load_config(setup[0][1]))
    assert set(weights) == {name for name, _ in model.named_parameters()}  # no queue, no copy
    zero = runs.zeros(weights, prunable_layers(model))
    assert int(zero.sum()) == int(0.6 * len(zero)) - 1
    runs.run(SCRIPT, [*setup[0], "--evaluate", "--pruned", str(folder)])
    recalls = recalls_of(folder)
    assert recalls["val"]["r_mean"] == log[1]["val_r_mean"] and recalls["test"].keys() > {"txt_r5"}
    assert "test: {" in capsys.readouterr().out


def test_a_killed_run_goes_on_with_queue_copy_and_ramp(setup, monkeypatch):
    """Killed in the first epoch, while alpha still rises."""
    flags = ["--eval_epochs", "0", "--checkpoint_steps", "3"]
    whole = train(setup, "whole", *flags)
    on_step, ramps = ClipRetrieval.on_step, []

    def killed(self, epochs, parts):
        if len(ramps) == 4:
            raise KeyboardInterrupt
        on_step(self, epochs, parts)
        ramps.append(self.ramp)

    with monkeypatch.context() as patch:
        patch.setattr(ClipRetrieval, "on_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(setup, "killed", *flags)
    assert ramps == pytest.approx([step / 6 for step in range(4)])
    killed = train(setup, "killed", *flags)
    assert runs.same(runs.result(killed), runs.result(whole))
    assert runs.same(last_state(killed), last_state(whole))
    assert any("queue" in name for name in last_state(whole))


def test_one_process_and_two_train_and_evaluate_the_same(setup, float64):
    alone = train(setup, "alone")
    argv = [*setup[0], "--model_dir", "together", *PRUNE, "--batch_size", "2"]
    assert runs.finish(runs.start(argv, 2, SCRIPT, before=runs.in_float64)) == [0, 0]
    together = setup[1] / "together"
    losses, others = ([record["loss"] for record in runs.log_of(f)] for f in (alone, together))
    assert others == pytest.approx(losses, rel=1e-9)
    layers = prunable_layers(build_clip(load_config(setup[0][1])))
    pruned, others = (runs.zeros(runs.result(folder), layers) for folder in (alone, together))
    assert torch.equal(pruned, others) and pruned.double().mean() > 0.5
    assert torch.equal(last_state(alone)["id_queue"], last_state(together)["id_queue"])
    argv = [*setup[0], "--evaluate", "--pruned", str(alone), "--model_dir", "two"]
    assert runs.finish(runs.start(argv, 2, SCRIPT, before=runs.in_float64)) == [0, 0]
    runs.run(SCRIPT, [*argv[:-1], "one"])
    assert recalls_of(setup[1] / "one") == recalls_of(setup[1] / "two")
    assert recalls_of(setup[1] / "one")["val"]["r_mean"] == runs.log_of(alone)[1]["val_r_mean"]


def test_the_ids_of_its_layers_are_measured(setup):
    """By the run's weights, and they weight a run's scores."""
    start = train(setup, "start", "--eval_epochs", "0", "--max_steps", "6")
    profile = setup[1] / "ID"
    argv = ["--config", setup[0][1], "-n", "24", "--Path", str(profile), "--cpu"]
    runs.run("ComputeID", [*argv, "--pruned", str(start)])
    layers = prunable_layers(build_clip(load_config(setup[0][1])))
    assert list(load_profile(profile)) == list(layers)
    assert all(dimension > 0 for dimension in load_profile(profile).values())
    flags = ["--eval_epochs", "0", "--max_steps", "6", "--id_profile", str(profile)]
    weighted = train(setup, "weighted", *flags)
    assert not runs.same(runs.result(weighted), runs.result(start))


def test_a_queue_that_batches_do_not_fill_is_refused(setup):
    with pytest.raises(UserError, match="queue_size"):
        train(setup, "odd", "--batch_size", "3")


def test_the_papers_command_is_the_default():
    args = train_clip_flickr30k.parse_args(["--useID", "--epoch", "3"])
    assert (args.initial_warmup, args.final_warmup, args.max_epoch) == (0, 2, 3)
    config = load_config(args.config)
    assert (config["task"], config["batch_size"], config["queue_size"]) == ("retrieval", 32, 57600)
