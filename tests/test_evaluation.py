"""What evaluations of the three tasks compute, over processes too, and the files that keep it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

import train_caption
from configs import load_config
from data.caption_dataset import CaptionTrainDataset, build_caption_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.records import read_references
from engine import main as engine_main
from engine.experiment import read_experiment
from engine.loading import EvalOptions
from engine.main import run_task, start
from engine.tasks import CAPTION, NLVR, RETRIEVAL, TASKS
from evaluation.captions import evaluate_captions
from evaluation.nlvr import evaluate_statements
from evaluation.retrieval import recalls
from models import prunable_layers
from pruners.sparsity import sparsity_report
from reports.runs import write_scores
from tests.conftest import read_golden
from tests.runs import on_two_processes, write_clip_config, write_config, write_nlvr_config


@pytest.fixture
def caption_config(scenes, tmp_path):
    """With annotations of its own, which a test may change."""
    own = str(shutil.copytree(scenes / "annotation", tmp_path / "annotation"))
    changes = {"ann_root": own, "coco_gt_root": own, "num_beams": 2, "eval_batch_size": 4}
    return load_config(write_config(tmp_path / "c.yaml", scenes, **changes))


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@torch.no_grad()
def captioner(config):
    """A model whose captions differ from image to image."""
    torch.manual_seed(0)
    model = CAPTION.build_model(config).eval()
    for weight in model.text_decoder.parameters():
        weight.mul_(10)
    return model


@torch.no_grad()
def mean_loss(model, pairs):
    """Over all predicted tokens or statements of items as in training, one by one."""
    total, terms = 0.0, 0
    for pair in (pairs[index] for index in range(len(pairs))):
        tensors, count = model.prepare(*default_collate([pair]))
        total += float(model(*tensors)) * count
        terms += count
    return total / terms


def test_the_loss_of_captions_is_the_mean_over_the_tokens_of_all_references(caption_config):
    """Each image is encoded once; some have fewer references. Float32 sums of some 350 terms of
    about 5, one by one and in batches, differ by a few times 6e-8 of themselves."""
    model, split = captioner(caption_config), build_caption_datasets(caption_config)[1]
    file = Path(caption_config["coco_gt_root"], "coco_karpathy_val_gt.json")
    annotations = json.loads(file.read_text())["annotations"][:-3]  # the last image has two of five
    file.write_text(json.dumps({"annotations": annotations}))
    encoded, encode, asked = [], model.encode_image, []
    model.encode_image = lambda image: encoded.append(len(image)) or encode(image)
    model.caption = lambda encoded, **lengths: asked.append(lengths) or ["a"] * len(encoded)
    lengths = {"num_beams": 2, "max_length": 9, "min_length": 6}
    options = EvalOptions(caption_config | lengths)
    scores = evaluate_captions(model, split, "val", options)["scores"]
    assert encoded == [4, 2] and asked == [lengths] * 2
    references = read_references(file)
    records = [x | {"caption": y} for x in split.records for y in references[x["image_id"]]]
    texts = {key: caption_config[key] for key in ("prompt", "max_words")}
    pairs = CaptionTrainDataset(records, split.image_root, split.transform, **texts)
    assert scores["loss"] == pytest.approx(mean_loss(model, pairs), rel=1e-6)


def caption_a_split(rank, config, folder):
    os.environ["PATH"] = ""  # no Java
    split = build_caption_datasets(config)[1]
    report = evaluate_captions(captioner(config), split, "val", EvalOptions(config, results=folder))
    assert ("CIDEr" in report["scores"]) == (rank == 0)


def test_two_processes_caption_and_score_as_one(caption_config, tmp_path):
    """Ids descend, so that the file's order is not the split's."""
    annotation = Path(caption_config["ann_root"], "coco_karpathy_val.json")
    annotation.write_text(json.dumps(json.loads(annotation.read_text())[::-1]))
    config = caption_config | {"eval_batch_size": 2}
    caption_a_split(0, config, tmp_path / "one")
    on_two_processes(caption_a_split, config, tmp_path / "two")
    files = ("val.json", "val_images.json", "val_scores.json")
    one, two = ([json.loads((tmp_path / n / f).read_text()) for f in files] for n in ("one", "two"))
    assert [r["image_id"] for r in one[0]] == sorted(r["image_id"] for r in one[0])
    assert len({result["caption"] for result in one[0]}) > 1
    losses = [files[2]["scores"].pop("loss") for files in (one, two)]
    assert one == two
    # of equal batches, but threads may add a batch's float32 numbers in another order (2^-24)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@torch.no_grad()
def test_statements_are_judged_and_their_loss_is_that_of_training(scenes, tmp_path):
    config = load_config(write_nlvr_config(tmp_path / "n.yaml", scenes, eval_batch_size=3))
    model, split = NLVR.build_model(config).eval(), build_nlvr_datasets(config)[1]
    scores = evaluate_statements(model, split, "dev", EvalOptions(config))["scores"]
    left, right, sentences, labels = default_collate([split[index] for index in range(8)])
    judged = model.logits(left, right, sentences).argmax(dim=1)
    assert scores["accuracy"] == (judged == labels).float().mean()
    # float32: eight losses of about 0.7, in batches of three or one by one
    assert scores["loss"] == pytest.approx(mean_loss(model, split), rel=1e-6)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize(
    ("task", "write"),
    [("caption", write_config), ("nlvr", write_nlvr_config), ("retrieval", write_clip_config)],
)
def test_evaluation_computes_in_the_precision_that_is_asked_for(
    task, write, bf16, dtype, scenes, tmp_path, capsys
):
    config, task = load_config(write(tmp_path / "p.yaml", scenes)), TASKS[task]
    model, split = task.build_model(config).eval(), task.build_datasets(config, 0)[1]
    precisions = set()
    for layer in prunable_layers(model).values():
        layer.register_forward_hook(lambda layer, inputs, output: precisions.add(output.dtype))
    task.evaluate(model, split, task.held_out[0], EvalOptions(config, bf16=bf16))
    assert precisions == {dtype}
    assert f" {len(split)}/{len(split)} [" in capsys.readouterr().err  # a bar of samples


@pytest.fixture
def begin(caption_config, tmp_path, monkeypatch):
    """Evaluates random weights with some more flags; another function scores the splits."""

    def begin(flags, score):
        argv = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path), "--evaluate"]
        argv += [*flags.split(), "--pruned", str(tmp_path / "w.pt")]
        run = start(read_experiment(train_caption.parse_args(argv), "caption"))
        model = CAPTION.build_model(run.config)
        torch.save({"model": model.state_dict()}, tmp_path / "w.pt")
        run = replace(run, task=replace(CAPTION, evaluate=score))
        monkeypatch.setattr(engine_main, "start", lambda experiment: run)
        run_task(run)
        return model

    return begin


def test_scores_are_printed_and_written(begin, tmp_path, capsys):
    """With METEOR, which a validation does without; notes once for all splits; no dropout."""
    asked, results = [], tmp_path / "c/results"

    def score(model, dataset, split, options):
        asked.append((split, model.training, options.meteor, options.spice, options.results))
        return {"scores": {"CIDEr": 1 / 3}, "notes": ["tokens: x", "note: y"]}

    model = begin("--spice", score)
    assert asked == [(split, False, True, True, results) for split in ("val", "test")]
    lines = ['val: {"CIDEr": 0.3333}', 'test: {"CIDEr": 0.3333}', "tokens: x", "note: y"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-5:] == [f"c: {line}" for line in (*lines, f"wrote {results}")]
    sparsity = json.loads((tmp_path / "c/sparsity.json").read_text())
    assert sparsity == sparsity_report(prunable_layers(model))
    record = json.loads((tmp_path / "c/evaluation.json").read_text())
    assert record["argv"][-1] == f"{tmp_path}/w.pt"
    assert not (tmp_path / "c/config.json").exists()  # that is of training


def test_sparse_evaluation_reports_the_zeros_that_it_leaves_out(begin, tmp_path, monkeypatch):
    done, report = [], tmp_path / "c/sparsity.json"
    monkeypatch.setattr(engine_main, "sparsify_", lambda model: done.append(report.exists()))
    begin("--sparse --split test", lambda *args: done.append(args[2]) or {"scores": {}})
    assert done == [True, "test"]


def test_scores_of_several_evaluations_are_joined_by_split(tmp_path):
    first, second = {"accuracy": 0.5, "loss": 1.0}, {"accuracy": 1.0, "loss": 0.5}
    for split, scores in (("val", {"accuracy": 0.0}), ("val", first), ("test", second)):
        write_scores(tmp_path, split, scores, *NLVR.results)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"val": first, "test": second}
    assert json.loads((tmp_path / "accuracy.json").read_text()) == {"val": 0.5, "test": 1.0}
    write_scores(tmp_path, "val", {"r_mean": 9.0}, *RETRIEVAL.results)
    assert json.loads((tmp_path / "recalls.json").read_text()) == {"val": {"r_mean": 9.0}}


# --- recalls

NAMES = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
NAN = float("nan")


def test_recalls_equal_the_original():
    sims = read_golden("clip_tiny", "input.")["sims"]
    result = recalls(sims, torch.arange(30).repeat_interleave(5))
    expected = read_golden("clip_tiny", "expected.")["recalls"].tolist()
    assert [result[name] for name in NAMES] == pytest.approx(expected, abs=1e-5)
    text, image = sum(expected[:3]) / 3, sum(expected[3:]) / 3
    means = [result[name] for name in ("txt_r_mean", "img_r_mean", "r_mean")]
    assert means == pytest.approx([text, image, (text + image) / 2], abs=1e-5)
    assert len(result) == 9


def test_recalls_are_those_of_sorted_lists():
    """With texts in any order, a different count for each image, and no ties."""
    owners = torch.cat([torch.arange(40), torch.randint(0, 40, (60,))])[torch.randperm(100)]
    sims = 2.0 * torch.randperm(4000).view(40, 100)
    sims[owners, torch.arange(100)] += 3001  # some are found, some are not; odd, so no ties
    result = recalls(sims, owners)
    for k in (1, 5, 10):
        found = [i in owners[sims[i].argsort(descending=True)[:k]] for i in range(40)]
        assert result[f"txt_r{k}"] == 100 * sum(found) / 40
        found = [owners[t] in sims[:, t].argsort(descending=True)[:k] for t in range(100)]
        assert result[f"img_r{k}"] == 100 * sum(found) / 100
    assert 0 < result["txt_r1"] < result["txt_r10"] < 100
    assert 0 < result["img_r1"] < result["img_r10"] < 100


def test_own_texts_of_an_image_do_not_compete():
    sims = torch.tensor([[0.9, 0.9, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]])
    result = recalls(sims, [0, 0, 1, 1])
    assert (result["txt_r1"], result["img_r1"]) == (100, 100)


@pytest.mark.parametrize("value", [0.0, NAN, float("inf"), -float("inf")])
def test_a_model_that_tells_nothing_apart_finds_nothing(value):
    result = recalls(torch.full((30, 150), value), torch.arange(30).repeat_interleave(5))
    assert set(result.values()) == {0.0}


@pytest.mark.parametrize(("place", "five"), [((3, 3), 29), ((3, 4), 30)])
def test_what_is_not_a_number_is_never_found(place, five):
    """The right text of an image, and a wrong one."""
    sims = torch.eye(30)
    assert recalls(sims, range(30))["r_mean"] == 100
    sims[place] = NAN
    result = recalls(sims, range(30))
    assert result["txt_r1"] == result["img_r1"] == pytest.approx(100 * 29 / 30)
    assert result["txt_r5"] == result["img_r10"] == pytest.approx(100 * five / 30)
