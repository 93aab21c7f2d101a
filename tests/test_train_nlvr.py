"""train_nlvr.py as it is run: one process and two, training and evaluation."""

import json

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

import train_nlvr
from configs import load_config
from data.nlvr_dataset import build_nlvr_datasets
from data.scenes import __main__ as scenes
from engine.loop import PRUNED_FILE
from engine.plan import plan_steps
from models import build_captioner, build_nlvr, load_checkpoint, prunable_layers
from tests.runs import TINY_TEXT, TINY_VIT, finish, start
from utils import launch

DEV_STATEMENTS = 11  # 11 and 6 do not divide by 2 processes and batches of 4
TEST_STATEMENTS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of a few thousand weights, with 16 training statements."""
    folder = tmp_path_factory.mktemp("nlvr")
    out, annotation = folder / "scenes", folder / "scenes" / "annotation"
    sizes = {"train": 16, "val": 8, "test": 8, "statements": 16, "heldout_statements": 12}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    scenes.main(scenes.parse_args(["--out", str(out), *flags]))
    for split, count in (("dev", DEV_STATEMENTS), ("test", TEST_STATEMENTS)):
        file = annotation / f"nlvr_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:count]))
    content = {
        "image_root": str(out / "images"),
        "ann_root": str(annotation),
        "tokenizer": str(out / "tokenizer"),
        "vit": TINY_VIT,
        "med_config": {
            **TINY_TEXT,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "image_size": 32,
        "batch_size_train": 4,
        "batch_size_test": 4,
        "init_lr": 1e-3,
        "max_epoch": 3,
        "augment": False,
        "num_workers": 0,
    }
    with open(folder / "nlvr.yaml", "w") as file:
        YAML().dump(content, file)
    return str(folder / "nlvr.yaml")


@pytest.fixture
def run(config, tmp_path):
    """Runs the script in `tmp_path/name`, in this process or in several, and returns the folder."""

    def run(name, *flags, processes=1, float64=False):
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name, *flags]
        if processes == 1:
            train_nlvr.main(train_nlvr.parse_args(argv))
        else:
            codes = finish(start(argv, processes, "train_nlvr", float64=float64))
            assert codes == [0] * processes
        return tmp_path / name

    return run


PRUNE = ["--final_threshold", "0.4", "--warmup_steps", "2", "--final_warmup", "2", "--deltaT", "3"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def zeros(folder, model):
    weights = load_file(folder / PRUNED_FILE)
    prunable = [
        f"{layer}.{kind}" for layer in prunable_layers(model) for kind in ("weight", "bias")
    ]
    return torch.cat([(weights[name] == 0).flatten() for name in prunable])


def accuracy(folder):
    return json.loads((folder / "results" / "accuracy.json").read_text())


def test_pruning_run_on_one_process_and_two(run, config, float64):
    alone = run("alone", *PRUNE)
    together = run("together", *PRUNE, "--batch_size", "2", processes=2, float64=True)
    model = build_nlvr(load_config(config, task="nlvr"))
    pruned, pruned_together = zeros(alone, model), zeros(together, model)
    numbers = len(pruned)
    for folder, zero in ((alone, pruned), (together, pruned_together)):
        records = log(folder)
        assert [record["step"] for record in records] == [4, 8, 12]
        assert records[-1]["remaining_ratio"] == 0.4
        assert int(zero.sum()) == pytest.approx(0.6 * numbers, abs=10)
        assert records[-1]["sparsity"] == pytest.approx(int(zero.sum()) / numbers)
    assert torch.equal(pruned, pruned_together)
    losses, others = ([r["loss"] for r in log(folder)] for folder in (alone, together))
    assert others == pytest.approx(losses, rel=1e-9)


def test_accuracy_counts_every_statement_once(run, config):
    """On processes with shares of unequal length as on one, and as counted one by one."""
    alone = run("dense", "--final_threshold", "1", "--max_epoch", "1")
    weights = ["--evaluate", "--pruned", str(alone)]
    results = [accuracy(run(f"{n}", *weights, processes=n)) for n in (1, 2)]
    settings = load_config(config, task="nlvr")
    model = build_nlvr(settings).eval()
    load_checkpoint(model, alone)
    for split, dataset in zip(("dev", "test"), build_nlvr_datasets(settings)[1:], strict=True):
        with torch.no_grad():
            right = [
                int(model.logits(image0[None], image1[None], [sentence]).argmax()) == int(label)
                for image0, image1, sentence, label in (dataset[i] for i in range(len(dataset)))
            ]
        assert len(right) == {"dev": DEV_STATEMENTS, "test": TEST_STATEMENTS}[split]
        assert results[0][split] == results[1][split] == sum(right) / len(right)
    assert log(alone)[-1]["dev_accuracy"] == results[0]["dev"]


def test_training_starts_from_a_captioner_but_evaluation_refuses(run, config, tmp_path):
    captioner = build_captioner(load_config(config, task="nlvr"))
    save_file(
        {
            name: value.contiguous()
            for name, value in captioner.state_dict().items()
            if "cls." not in name
        },
        tmp_path / "captioner.safetensors",
    )
    start_flags = ["--pretrained", str(tmp_path / "captioner.safetensors")]
    folder = run(
        "started", *start_flags, "--final_threshold", "1", "--max_epoch", "1", "--init_lr", "0"
    )
    weights = load_file(folder / PRUNED_FILE)
    single = captioner.text_decoder.bert.encoder.layer[0].crossattention.self.query.weight
    for twin in ("self0", "self1"):
        name = f"text_encoder.encoder.layer.0.crossattention.{twin}.query.weight"
        assert torch.equal(weights[name], single)
    with pytest.raises(ValueError, match=r"start for training.*cls_head\.0\.weight"):
        run("refused", "--evaluate", *start_flags)


def test_scores_are_weighted_by_intrinsic_dimension(run, config, tmp_path):
    """Where vision's ID is huge, all of language goes before anything of vision."""
    names = list(prunable_layers(build_nlvr(load_config(config, task="nlvr"))))
    profile = {name: 1e9 if name.startswith("visual_encoder") else 1.0 for name in names}
    (tmp_path / "id.json").write_text(json.dumps(profile))
    folder = run(
        "id", *PRUNE, "--pruner_name", "Magnitude", "--id_profile", str(tmp_path / "id.json")
    )
    sparsity = log(folder)[-1]["sparsity_by_modality"]
    assert sparsity["language"] == 1.0
    assert 0 < sparsity["vision"] < 0.1


def test_the_papers_schedule_is_the_default():
    args = train_nlvr.parse_args([])
    assert (args.initial_warmup, args.final_warmup, args.final_threshold) == (0, 5, 0.2)
    config = load_config(args.config, task="nlvr")
    plan = plan_steps(args, 86_373, 2 * config["batch_size"], config["max_epoch"])
    assert plan.warmup_steps == 4318
    assert plan.total_steps == 10 * 4318


@pytest.mark.parametrize("name", ["nlvr", "nlvr_demo"])
def test_configs_load(name):
    config = load_config(f"configs/{name}.yaml", task="nlvr")
    assert config["task"] == "nlvr"


def test_the_papers_command_without_data_says_what_to_put_where(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError))
    argv = ["--final_threshold", "0.2", "--output_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        launch(train_nlvr.main, train_nlvr.parse_args(argv))
    assert stop.value.code == 2
    assert "nlvr_train.json" in capsys.readouterr().err
