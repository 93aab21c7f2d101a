"""train_nlvr.py as it is run: one process and two, training and evaluation."""

import json

import pytest
import torch
from safetensors.torch import save_file

import train_nlvr
from configs import load_config
from data.nlvr_dataset import build_nlvr_datasets
from engine.state import plan_steps
from models import build_captioner, build_nlvr, load_checkpoint, prunable_layers
from tests import runs
from utils import launch

HELD_OUT = {"dev": 11, "test": 6}  # which do not divide by 2 processes and batches of 4
PRUNE = ["--final_threshold", "0.4", "--warmup_steps", "2", "--final_warmup", "2", "--deltaT", "3"]
PRUNE += ["--amp", "off"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of a few thousand weights, with 16 training statements."""
    folder = tmp_path_factory.mktemp("nlvr")
    runs.make_scenes(folder / "scenes", 16, 8, statements=16, heldout=12)
    for split, count in HELD_OUT.items():
        file = folder / f"scenes/annotation/nlvr_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:count]))
    return runs.write_nlvr_config(folder / "nlvr.yaml", folder / "scenes", max_epoch=2)


@pytest.fixture
def run(config, tmp_path):
    """Runs the script in `tmp_path/name`, in this process or in several, and returns the folder."""

    def run(name, *flags, processes=1, before=None):
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name, *flags]
        if processes == 1:
            runs.run("train_nlvr", argv)
        else:
            started = runs.start(argv, processes, "train_nlvr", before=before)
            assert runs.finish(started) == [0] * processes
        return tmp_path / name

    return run


def test_a_run_is_the_same_on_one_process_and_two(run, config, float64):
    """Batch, accumulated parts and processes are ways to spread the same samples."""
    whole = run("whole", *PRUNE)
    spread = run("spread", *PRUNE, "--batch_size=2", "--gradient_accumulation_steps=2")
    together = run("together", *PRUNE, "--batch_size=2", processes=2, before=runs.in_float64)
    layers = prunable_layers(build_nlvr(load_config(config, task="nlvr")))
    expected = runs.zeros(runs.result(whole), layers)
    assert int(expected.sum()) == pytest.approx(0.6 * len(expected), abs=10)
    assert [record["step"] for record in runs.log_of(whole)] == [4, 8]
    assert runs.log_of(whole)[-1]["remaining_ratio"] == 0.4
    assert runs.log_of(whole)[-1]["sparsity"] == pytest.approx(expected.double().mean().item())
    for folder in (spread, together):
        assert torch.equal(runs.zeros(runs.result(folder), layers), expected)
        losses, others = ([record["loss"] for record in runs.log_of(f)] for f in (whole, folder))
        assert others == pytest.approx(losses, rel=1e-9)


def test_accuracy_counts_every_statement_once(run, config):
    """On processes with shares of unequal length as on one, and as counted one by one."""
    alone = run("dense", "--final_threshold", "1", "--max_epoch", "1")
    weights = ["--evaluate", "--pruned", str(alone)]
    folders = [run(f"{n}", *weights, processes=n) for n in (1, 2)]
    results = [json.loads((x / "results/accuracy.json").read_text()) for x in folders]
    scores = json.loads((folders[1] / "results/scores.json").read_text())
    settings = load_config(config, task="nlvr")
    model = build_nlvr(settings).eval()
    load_checkpoint(model, alone)
    for split, dataset in zip(HELD_OUT, build_nlvr_datasets(settings)[1:], strict=True):
        with torch.no_grad():
            right = [
                int(model.logits(image0[None], image1[None], [sentence]).argmax()) == int(label)
                for image0, image1, sentence, label in (dataset[i] for i in range(len(dataset)))
            ]
        assert len(right) == HELD_OUT[split]
        assert results[0][split] == results[1][split] == sum(right) / len(right)
        assert scores[split]["accuracy"] == results[1][split]
    assert runs.log_of(alone)[-1]["dev_accuracy"] == results[0]["dev"]


def test_training_starts_from_a_captioner_but_evaluation_refuses(run, config, tmp_path):
    captioner = build_captioner(load_config(config, task="nlvr"))
    weights = {n: x.contiguous() for n, x in captioner.state_dict().items() if "cls." not in n}
    save_file(weights, tmp_path / "captioner.safetensors")
    flags = ["--pretrained", str(tmp_path / "captioner.safetensors")]
    run_flags = ["--final_threshold", "1", "--max_steps", "1", "--init_lr", "0"]
    started = runs.result(run("started", *flags, *run_flags, "--eval_epochs", "0"))
    single = captioner.text_decoder.bert.encoder.layer[0].crossattention.self.query.weight
    for twin in ("self0", "self1"):
        name = f"text_encoder.encoder.layer.0.crossattention.{twin}.query.weight"
        assert torch.equal(started[name], single)
    with pytest.raises(ValueError, match=r"start for training.*cls_head\.0\.weight"):
        run("refused", "--evaluate", *flags)


def test_the_papers_schedule_is_the_default():
    args = train_nlvr.parse_args([])
    assert (args.initial_warmup, args.final_warmup, args.final_threshold) == (0, 5, 0.2)
    config = load_config(args.config, task="nlvr")
    plan = plan_steps(args, 86_373, 2 * config["batch_size"], config["max_epoch"])
    assert plan.warmup_steps == 4318
    assert plan.total_steps == 10 * 4318


def test_the_papers_command_without_data_says_what_to_put_where(capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError))
    argv = ["--final_threshold", "0.2", "--model_dir", "nlvr/PLATON80", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        launch(train_nlvr.main, train_nlvr.parse_args(argv))
    assert stop.value.code == 2
    assert "nlvr_train.json" in capsys.readouterr().err
