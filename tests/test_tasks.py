"""How the tasks evaluate: precision, what the scores are asked for, and models in eval mode."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import train_caption
import train_clip_flickr30k
import train_nlvr
from engine import run as preparation
from engine import samples, tasks
from engine.processes import Process
from engine.run import Run
from engine.tasks import CAPTION, NLVR, RETRIEVAL, TASKS
from evaluation import scoring

SAMPLES = 5
IMAGE = torch.zeros(3, 2, 2)


class Items(Dataset):
    """A split as the loaders read it."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def fetch(self, index):
        return self.items[index], 0


class Recorder(nn.Module):
    """Stands for the model of each task, and notes in which precision products are computed."""

    def __init__(self):
        super().__init__()
        self.layer, self.precisions = nn.Linear(2, 2), set()

    def note(self):
        self.precisions.add(self.layer(torch.ones(1, 2)).dtype)

    def generate(self, images, num_beams, max_length, min_length):
        self.note()
        return [f"{num_beams} {max_length} {min_length}"] * len(images)

    def logits(self, left, right, statements):
        """True where the left image is the brighter one."""
        self.note()
        return torch.stack([right.mean((1, 2, 3)), left.mean((1, 2, 3))], dim=1)

    def encode_image(self, images):
        self.note()
        return torch.eye(SAMPLES)[: len(images)]

    def tokenize(self, texts):
        return torch.zeros(len(texts), 2), None

    encode_text = encode_image


@pytest.fixture
def run(tmp_path):
    config = {"eval_batch_size": SAMPLES, "num_workers": 0, "coco_gt_root": "references"}
    config |= {"num_beams": 2, "max_length": 9, "min_length": 3}
    args = argparse.Namespace(amp="bf16", seed=0, evaluate=True, spice=True)
    return Run(args, None, config, Process(0, 1, torch.device("cpu")), tmp_path, "")


@pytest.fixture
def asked(monkeypatch):
    """What captions' scores are asked for."""
    calls = []

    def score_results(path, references, spice, meteor):
        calls.append((json.loads(path.read_text()), str(references), spice, meteor))
        return {"scores": {}}

    monkeypatch.setattr(tasks, "score_results", score_results)
    return calls


SPLITS = {
    CAPTION: Items([(IMAGE, number) for number in range(SAMPLES)]),
    NLVR: Items([(IMAGE, IMAGE, "left", 0)] * SAMPLES),
    RETRIEVAL: Items([(IMAGE, number) for number in range(SAMPLES)]),
}
SPLITS[RETRIEVAL].texts = Items([("text", number) for number in range(SAMPLES)])
SPLITS[RETRIEVAL].image_of_text = torch.arange(SAMPLES)


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_evaluation_computes_in_the_precision_that_is_asked_for(task, amp, dtype, run, asked):
    run.args.amp = amp
    model = Recorder().eval()
    task.evaluate(run, model, SPLITS[task], task.held_out[0])
    assert model.precisions == {dtype}


@pytest.mark.parametrize(("evaluate", "spice"), [(True, False), (True, True), (False, False)])
def test_a_validation_waits_for_no_meteor(evaluate, spice, run, asked):
    run.args.evaluate, run.args.spice = evaluate, spice
    CAPTION.evaluate(run, Recorder().eval(), SPLITS[CAPTION], "test")
    captions = [{"image_id": number, "caption": "2 9 3"} for number in range(SAMPLES)]
    assert asked == [(captions, "references/coco_karpathy_test_gt.json", spice, evaluate)]


def test_statements_are_judged_by_the_left_and_the_right_image(run):
    dark, bright = IMAGE, IMAGE + 1
    pairs = [(dark, bright, 0), (bright, dark, 1), (bright, dark, 1), (dark, bright, 1)]
    split = Items([(left, right, "", label) for left, right, label in pairs])
    assert NLVR.evaluate(run, Recorder().eval(), split, "dev") == {"scores": {"accuracy": 0.75}}


@pytest.mark.parametrize(
    ("script", "name"),
    [(train_caption, "CAPTION"), (train_nlvr, "NLVR"), (train_clip_flickr30k, "RETRIEVAL")],
)
def test_scripts_evaluate_without_dropout(script, name, run, monkeypatch):
    """Models are built in training mode."""
    task, modes = getattr(tasks, name), []

    def evaluate(run, model, dataset, split):
        modes.append((split, model.training))
        report = dict(tokenizer="", left_out={}, remarks=[])
        return {"scores": {"accuracy": 0.5}, **report}

    splits = dict.fromkeys(task.held_out)
    monkeypatch.setattr(tasks, name, dataclasses.replace(task, evaluate=evaluate))
    monkeypatch.setattr(preparation, "prepare_run", lambda *_: (run, nn.Dropout(), None, splits))
    script.main(script.parse_args(["--evaluate"]))
    assert modes == [(split, False) for split in task.held_out]


def test_samples_stand_beside_the_dense_models(run, monkeypatch):
    """Which is a model of its own, with the weights that the config names, in eval mode."""
    built, drawn = nn.Dropout(), []
    task = SimpleNamespace(build_model=lambda config: built)
    run.task, run.args = task, argparse.Namespace(amp="off", samples=2, pruned="p", evaluate=True)
    (run.folder / "results").mkdir()
    pruned = [{"image_id": number, "caption": "pruned"} for number in range(SAMPLES)]
    tasks.results_path(run, "val").write_text(json.dumps(pruned))

    def load(model, path):
        drawn.append((model, path))

    def captions(model, loader, config, device):
        drawn.append((model, model.training, len(loader.dataset)))
        return [{"image_id": int(i), "caption": "dense"} for _, ids in loader for i in ids]

    monkeypatch.setattr(samples, "load_checkpoint", load)
    monkeypatch.setattr(samples, "generate_captions", captions)
    monkeypatch.setattr(samples, "contact_sheet", lambda *args: drawn.append(args))
    split = [(IMAGE, number) for number in range(SAMPLES)]
    samples.draw_samples(run, split, "val", "dense.pth")
    dense = [{"image_id": number, "caption": "dense"} for number in (0, 2)]  # spread evenly
    sheet = run.folder / "results/val_samples.png"
    assert drawn == [
        (built, "dense.pth"),
        (built, False, 2),
        (split, {"dense": dense, "pruned": pruned}, sheet, 2),
    ]


def test_dense_captions_are_drawn_where_pruned_weights_are_evaluated(run, tmp_path):
    weights = tmp_path / "dense.pth"
    weights.touch()
    for pruned, pretrained, found in [
        ("pruned.pth", str(weights), weights),
        ("pruned.pth", "", None),
        (None, str(weights), None),
    ]:
        run.args.pruned, run.config["pretrained"] = pruned, pretrained
        assert samples.find_dense(run) == found


@pytest.mark.parametrize("flags", [[], ["--spice"]])
def test_scoring_again_with_and_without_spice(flags, monkeypatch):
    asked = []
    monkeypatch.setattr(train_caption, "show", lambda reports: None)
    monkeypatch.setattr(scoring, "score_results", lambda *args: asked.append(args))
    args = train_caption.parse_args(["--score_only", "results/val.json", *flags])
    train_caption.main(args)
    references = "annotation/coco_gt/coco_karpathy_val_gt.json"
    assert [(str(a), str(b), spice) for a, b, spice in asked] == [
        ("results/val.json", references, bool(flags))
    ]
