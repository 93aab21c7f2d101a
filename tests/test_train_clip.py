"""train_clip_flickr30k.py as it is run: pruning, recalls, resuming, and mistakes."""

import json

import pytest
import torch

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
def setup(scenes, tmp_path_factory):
    """Flags of a small CLIP's runs, which take 12 steps in 2 epochs; the folder."""
    folder = tmp_path_factory.mktemp("clip")
    config = runs.write_clip_config(folder / "c.yaml", scenes, batch_size=8, queue_size=16)
    return ["--config", config, "--output_dir", str(folder)], folder


@pytest.fixture(scope="module")
def model(setup):
    return build_clip(load_config(setup[0][1]))


def train(setup, name, *flags):
    runs.run(SCRIPT, [*setup[0], "--model_dir", name, *PRUNE, *flags])
    return setup[1] / name


def last_state(folder):
    return torch.load(folder / "checkpoints/step_00000012.pt", weights_only=True)["model"]


def recalls_of(folder):
    return json.loads((folder / "results/recalls.json").read_text())


def test_a_run_prunes_and_is_evaluated(setup, model, monkeypatch):
    on_step, ramps = ClipRetrieval.on_step, []

    def noted(self, epochs, parts):
        on_step(self, epochs, parts)
        ramps.append(self.ramp)

    monkeypatch.setattr(ClipRetrieval, "on_step", noted)
    folder = train(setup, "run", "--use_ceph", "--w_sp_attn", "1.0", "--lr", "5e-4", "--epoch", "2")
    log = runs.log_of(folder)
    assert log[0]["lr"] == 5e-4 and {"val_r_mean", "val_txt_r1", "val_img_r10"} <= log[1].keys()
    assert ramps == pytest.approx([min(1, step / 6) for step in range(12)])  # of alpha
    weights = runs.result(folder)
    assert set(weights) == {name for name, _ in model.named_parameters()}  # no queue, no copy
    zero = runs.zeros(weights, prunable_layers(model))
    assert int(zero.sum()) == int(0.6 * len(zero)) - 1
    runs.run(SCRIPT, [*setup[0], "--evaluate", "--pruned", str(folder)])
    recalls = recalls_of(folder)
    assert recalls["val"]["r_mean"] == log[1]["val_r_mean"] and recalls["test"].keys() > {"txt_r5"}


def test_one_process_and_two_train_and_evaluate_the_same(setup, model, float64):
    def in_two(*flags):
        started = runs.start([*setup[0], *flags], 2, SCRIPT, before=runs.in_float64)
        assert runs.finish(started) == [0, 0]

    alone = train(setup, "alone")
    in_two("--model_dir", "together", *PRUNE, "--batch_size", "4")
    together = setup[1] / "together"
    losses, others = ([record["loss"] for record in runs.log_of(f)] for f in (alone, together))
    assert others == pytest.approx(losses, rel=1e-9)
    layers = prunable_layers(model)
    pruned, others = (runs.zeros(runs.result(folder), layers) for folder in (alone, together))
    assert torch.equal(pruned, others) and pruned.double().mean() > 0.5
    assert torch.equal(last_state(alone)["id_queue"], last_state(together)["id_queue"])
    in_two("--evaluate", "--pruned", str(alone))
    recalls = recalls_of(alone)["val"]["r_mean"]
    assert recalls == runs.log_of(alone)[1]["val_r_mean"] == runs.log_of(together)[1]["val_r_mean"]


def test_the_ids_of_its_layers_are_measured(setup, model):
    """By the run's weights, and they weight a run's scores."""
    flags = ["--eval_epochs", "0", "--max_steps", "6"]
    start = train(setup, "start", *flags)
    profile = setup[1] / "ID"
    argv = ["--config", setup[0][1], "-n", "24", "--Path", str(profile), "--cpu"]
    runs.run("ComputeID", [*argv, "--pruned", str(start)])
    found = load_profile(profile)
    assert list(found) == list(prunable_layers(model)) and min(found.values()) > 0
    weighted = train(setup, "weighted", *flags, "--id_profile", str(profile))
    assert not runs.same(runs.result(weighted), runs.result(start))


def test_a_queue_that_batches_do_not_fill_is_refused(setup):
    with pytest.raises(UserError, match="queue_size"):
        train(setup, "odd", "--batch_size", "3")
