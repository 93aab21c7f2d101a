"""The state of a run: what flags and config become of it, and whose checkpoints it goes on from."""

import json
import math
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_caption
from configs import SCHEMAS, load_config
from engine import loop, state
from engine.experiment import read_experiment
from engine.loop import learning_rate
from engine.main import prepare, start
from engine.state import StepPlan, build_state, check_identity, plan_steps, resume
from engine.tasks import CAPTION
from models import Captioner, prunable_layers
from tests.runs import log_of, result, same, saved_steps, stopped_at, write_config
from utils import UserError


def flags_of(folder, scenes, **changes):
    """Of a run of two epochs of six steps."""
    changes = {"max_epoch": 2, "batch_size": 8, "min_lr": 5e-4, "weight_decay": 0.125} | changes
    config = write_config(folder / "c.yaml", scenes, **changes)
    flags = f"--config {config} --output_dir {folder} --warmup_steps 2 --deltaT 2 --eval_epochs 0"
    return [*flags.split(), "--model_dir", "run"]


@pytest.fixture
def flags(scenes, tmp_path):
    return flags_of(tmp_path, scenes)


@pytest.fixture(scope="module")
def plain(scenes, tmp_path_factory):
    """A run and its state with the flags' defaults."""
    return built(flags_of(tmp_path_factory.mktemp("plain"), scenes))


def train(flags, *more):
    train_caption.main(train_caption.parse_args([*flags, *more]))


def built(flags, *more):
    run = start(read_experiment(train_caption.parse_args([*flags, *more]), "caption"))
    model, train_set, _, layer_id = prepare(run)
    return run, build_state(run, model, train_set, layer_id)


# --- steps ---------------------------------------------------------------------------------------


def test_steps_are_counted():
    def plan(samples, samples_per_step, max_epoch, max_steps=None, warmup_steps=None):
        flags = Namespace(max_steps=max_steps, warmup_steps=warmup_steps)
        return plan_steps(flags, samples, samples_per_step, max_epoch)

    assert plan(566_747, 40, 5) == StepPlan(14168, 5, 70840, 14168)  # the paper's
    early = plan(100, 10, 1, max_steps=25, warmup_steps=0)
    assert early == StepPlan(10, 3, 25, 0)
    assert [early.steps_of(epoch) for epoch in range(3)] == [10, 10, 5]
    with pytest.raises(UserError, match=r"takes 21 samples .* training set has 20"):
        plan(20, 21, 5)


def test_learning_rate_is_a_cosine_by_epoch():
    rates = [learning_rate(epoch, 4, init_lr=3.0, min_lr=1.0) for epoch in range(5)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([3, 2 + half, 2, 2 - half, 1])


# --- flags and config arrive ---------------------------------------------------------------------


def test_flags_and_config_arrive(flags):
    schedule = dict(delta_t=3, initial_threshold=0.75, final_threshold=0.375, initial_warmup=2)
    schedule |= dict(final_warmup=3, warmup_steps=1, total_steps=11, steps_per_epoch=6)
    more = "--deltaT 3 --beta1 0.25 --beta2 0.5 --initial_threshold 0.75 --final_threshold 0.375"
    more += " --initial_warmup 2 --final_warmup 3 --warmup_steps 1 --max_steps 11 --batch_size 4"
    more += " --gradient_accumulation_steps 2 --init_lr 0.5 --num_workers 1 --seed 5"
    _, of_run = built(flags, "--skip_bad_images", *more.split())
    score, loader = of_run.pruner.score, of_run.loader
    assert vars(of_run.pruner.schedule) == schedule | {"first_scored": 3}
    assert (score.delta_t, score.beta1, score.beta2) == (3, 0.25, 0.5)
    assert (loader.num_workers, loader.batch_sampler.seed) == (1, 5)
    assert loader.dataset.dataset.skip_bad_images
    assert {(g["lr"], g["weight_decay"]) for g in of_run.optimizer.param_groups} == {(0.5, 0.125)}
    assert isinstance(of_run.optimizer, torch.optim.AdamW)
    assert built(flags, "--max_epoch", "3")[1].plan.epochs == 3
    for method in ("PLATON", "Taylor", "Magnitude"):
        assert built(flags, "--pruner_name", method)[1].pruner.method == method
    assert built(flags, "--final_threshold", "1")[1].pruner is None


def test_compiled_steps_use_the_compiled_model_and_mistakes_name_flags(flags, monkeypatch):
    monkeypatch.setattr(Captioner, "compile", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built(flags, "--compile")
    with pytest.raises(UserError, match="window of --deltaT 99 .* lower --deltaT or .*--max_steps"):
        built(flags, "--deltaT", "99")


def test_processes_draw_their_own_dropout(plain):
    """Those of another number, in step 7, do not begin again with the draws of the first steps."""
    run, of_run = plain
    parts = ("model", "optimizer", "pruner")
    found = {part: getattr(of_run, part).state_dict() for part in parts}
    found |= {"progress": {"step": 7}, "rng": [0, 1], "path": "x"}
    for content, expected in ((None, {42, 43, 44}), (found, set())):
        seeds = set()
        for rank in range(3):
            process = replace(run.process, rank=rank, world_size=3)
            resume(replace(run, process=process), of_run, content)
            seeds.add(torch.initial_seed())
        assert len(seeds) == 3 and seeds & {42, 43, 44} == expected


@pytest.mark.parametrize(("method", "averages"), [("PLATON", 3), ("Magnitude", 0)])
def test_the_disk_must_hold_all_checkpoints_and_averages(
    flags, plain, monkeypatch, method, averages
):
    """Float32: the weights, two averages of AdamW's, PLATON's three; and three files of weights."""
    more = ["--pruner_name", method, "--keep_checkpoints", "3"]
    parameters = sum(p.numel() for p in plain[1].model.parameters())
    checkpoint = 4 * (3 * parameters + averages * plain[1].pruner.numel)
    disk = SimpleNamespace(free=4 * checkpoint + 3 * 4 * parameters)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    built(flags, *more)
    disk.free -= 1
    with pytest.raises(UserError, match="make room"):
        built(flags, *more)


def test_a_disk_that_is_full_in_mid_run_is_a_sentence(flags, tmp_path, full_disk):
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/run/checkpoints/step_00000002"):
        train(flags, "--checkpoint_steps", "2")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


# --- a run owns its checkpoints ------------------------------------------------------------------


def train_and_kill(step, *arguments):
    with stopped_at(step, KeyboardInterrupt):
        train(*arguments)


def test_a_run_that_starts_again_keeps_its_own_checkpoints(flags, tmp_path, capsys):
    """An older run's later steps neither displace them nor pass for their result."""
    train(flags)
    assert saved_steps(tmp_path / "run") == [6, 12]
    train_and_kill(2, flags, "--resume", "off")
    assert saved_steps(tmp_path / "run") == [6, 12]  # old ones stay until a new one is there
    again = "--seed 7 --checkpoint_steps 3 --keep_checkpoints 1".split()
    train_and_kill(5, flags, *again, "--resume", "off")
    assert saved_steps(tmp_path / "run") == [3]
    train(flags, *again)
    assert "step_00000003.pt: 3 of 12 steps done" in capsys.readouterr().out
    train(flags, "--model_dir", "undisturbed", "--seed", "7")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))
    assert [line["lr"] for line in log_of(tmp_path / "run")] == pytest.approx([1e-3, 7.5e-4])
    train(flags, *again, "--compile")
    assert f"--evaluate --pruned {tmp_path / 'run'}" in capsys.readouterr().out


def test_going_on_from_an_older_file_replaces_the_later_ones(flags, tmp_path):
    more = "--checkpoint_steps 2 --keep_checkpoints 9".split()
    train_and_kill(9, flags, *more)
    assert saved_steps(tmp_path / "run") == [2, 4, 6, 8]
    train_and_kill(5, flags, *more, "--resume", f"{tmp_path}/run/checkpoints/step_00000002.pt")
    assert saved_steps(tmp_path / "run") == [2, 4]


def test_a_file_of_weights_is_no_checkpoint(flags, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "pruned.safetensors")
    torch.save({"model": {}}, tmp_path / "official.pth")
    for path in (tmp_path / "pruned.safetensors", tmp_path / "official.pth", tmp_path):
        with pytest.raises(UserError, match=f"--resume {path}: no checkpoint .* --pretrained"):
            train(flags, "--resume", str(path))


def test_a_run_killed_before_its_last_line_writes_it(flags, tmp_path, monkeypatch):
    """Though the log of a run before says that all steps are done."""
    flags = [*flags, "--max_steps", "6"]
    train(flags)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "finish_epoch", lambda *_: 1 / 0)
        train(flags, "--seed", "7", "--resume", "off")
    assert saved_steps(tmp_path / "run") == [6]
    train(flags, "--seed", "7")
    train(flags, "--seed", "7", "--model_dir", "undisturbed")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "undisturbed")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))


def test_skipped_samples_are_counted_by_epoch_and_survive_a_resume(scenes, tmp_path):
    copy = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    records = json.loads((copy / "annotation/coco_karpathy_train.json").read_text())
    for record in records[:4:2]:
        (copy / "images" / record["image"]).write_bytes(b"\x89PNG, cut off")
    more = "--skip_bad_images --checkpoint_steps 4 --gradient_accumulation_steps 2 --model_dir"
    flags = [*flags_of(tmp_path, copy, batch_size=4), *more.split()]
    train(flags, "whole")
    train_and_kill(9, flags, "killed")
    train(flags, "killed")
    for name in ("whole", "killed"):
        assert [line["bad_images"] for line in log_of(tmp_path / name)] == [2, 2]
    assert same(result(tmp_path / "whole"), result(tmp_path / "killed"))


# --- what a result depends on, by content --------------------------------------------------------


def test_what_a_name_stands_for_counts_and_not_the_name(scenes, tmp_path):
    """Other content of a profile, weights, annotation, vocabulary or sizes: another run."""
    copy = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    weights, profile = tmp_path / "weights.safetensors", tmp_path / "id.json"
    flags = flags_of(tmp_path, copy, pretrained=str(weights), id_profile=str(profile)) + ["--useID"]
    config = load_config(tmp_path / "c.yaml")
    model = CAPTION.build_model(config)
    save_file({name: p.detach() for name, p in model.named_parameters()}, weights)
    profile.write_text(json.dumps(dict.fromkeys(prunable_layers(model), 2.0)))
    (tmp_path / "med.json").write_text(json.dumps(dict(reversed(config["med_config"].items()))))
    own = built(flags)[1].identity
    shutil.copy(profile, tmp_path / "copy.json")
    places = {"pretrained": str(weights), "med_config": str(tmp_path / "med.json")}
    other = flags_of(tmp_path, copy, **places) + ["--id_profile", str(tmp_path / "copy.json")]
    assert built(other)[1].identity == own
    profile.write_text(profile.read_text().replace("2.0", "3.0"))
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights)
    for name in ("annotation/coco_karpathy_train.json", "tokenizer/vocab.txt"):
        (copy / name).write_text((copy / name).read_text().replace("red", "blue2"))
    changes = {"med_config": config["med_config"] | {"hidden_dropout_prob": 0.5}}
    flags_of(tmp_path, copy, pretrained=str(weights), id_profile=str(profile), **changes)
    with pytest.raises(UserError) as error:
        check_identity(own, built(flags)[1].identity, tmp_path)
    names = ("ID profile", "starting weights", "training annotation", "tokenizer")
    for what in ("med_config", *(f"the {name}" for name in names)):
        assert f"the content of {what} differs" in str(error.value)


IDENTITY_FLAGS = "seed amp pruner_name beta1 beta2 deltaT initial_threshold final_threshold".split()
IDENTITY_FLAGS += "initial_warmup final_warmup".split()
IDENTITY_KEYS = "image_size vit prompt max_words max_tokens augment".split()
IDENTITY_KEYS += "init_lr min_lr weight_decay".split()


def test_the_flags_and_keys_that_make_another_run(plain):
    """A flag that is new, too, and that nobody has thought about."""
    run, _ = plain
    flags = vars(run.flags)
    for name in [*flags, "new_flag"]:
        changed = replace(run, flags=Namespace(**flags | {name: "changed"}))
        assert (changed.identity() != run.identity()) == (name in [*IDENTITY_FLAGS, "new_flag"])
    for key in SCHEMAS["caption"]:
        changed = replace(run, config={**run.config, key: "changed"})
        assert (changed.identity() != run.identity()) == (key in IDENTITY_KEYS), key


def test_samples_and_steps_make_another_run(plain):
    own = plain[1].identity
    keys = "samples,samples of a step,steps_per_epoch,epochs,total_steps,warmup_steps".split(",")
    for key in keys:
        with pytest.raises(UserError, match=f"another run: {key} was {own[key]}, is 99"):
            check_identity(own, own | {key: 99}, "path")


def test_checkpoints_of_earlier_versions_are_compared_by_what_they_hold(plain, tmp_path):
    """Their names of what a result depends on are those of today."""
    check_identity({"seed": 1, "id_profile": "gone.json"}, {"seed": 1, "new": 2}, tmp_path)
    with pytest.raises(UserError, match="seed was 1, is 2"):
        check_identity({"seed": 1}, {"seed": 2, "new": 2}, tmp_path)
    of_files = "starting weights|tokenizer|training annotation|ID profile".split("|")
    earlier = {*IDENTITY_FLAGS, *IDENTITY_KEYS, "samples", "content of med_config"}
    assert earlier | {f"content of the {name}" for name in of_files} <= plain[1].identity.keys()


# --- the loop's ends -----------------------------------------------------------------------------


def test_a_sparsity_that_was_missed_is_noted_in_the_last_line(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(state.Pruner, "note", lambda self: "asked for more")
    with pytest.warns(UserWarning, match="asked for more"):
        train(flags, "--model_dir", "run")
    assert [line.get("note") for line in log_of(tmp_path / "run")] == [None, "asked for more"]


def test_nan_scores_are_explained_by_the_loss(flags, monkeypatch):
    forward = Captioner.forward
    monkeypatch.setattr(Captioner, "forward", lambda *args: forward(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        train(flags, "--pruner_name", "Taylor", "--initial_warmup", "0")


@pytest.mark.parametrize(("more", "splits"), [("", ["val"]), ("--eval_test", ["val", "test"])])
def test_epochs_between_validations(flags, more, splits):
    """The score falls with each; but only the last epoch is at the final ratio."""
    validated, training = [], []

    def evaluate(model, dataset, split, options):
        assert not model.training and not options.meteor
        validated.append(split)
        return {"scores": {"CIDEr": 1 / len(validated)}}

    more = f"--max_epoch 5 --batch_size 24 --warmup_steps 1 --eval_epochs 2 {more}"
    run, of_run = built(flags, *more.split())
    run = replace(run, task=replace(CAPTION, evaluate=evaluate))
    of_run.model.register_forward_pre_hook(lambda model, _: training.append(model.training))
    loop.train(run, of_run, dict.fromkeys(CAPTION.held_out))
    log = log_of(run.folder)
    assert ["val_CIDEr" in line for line in log] == [False, True, False, True, True]
    assert ("test_CIDEr" in log[-1]) == ("test" in splits)
    assert validated == splits * 3 and training == [True] * 10
    assert same(load_file(run.folder / loop.BEST_FILE), result(run.folder))


def test_a_checkpoint_by_time_where_it_is_cheap(flags, monkeypatch):
    run, of_run = built(flags)
    seconds = [0.0, loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_SECONDS + 20]
    found, of_run.saved_at = [], 1000.0
    for of_run.save_seconds, later in zip((0, 0, 31, 31), seconds, strict=True):
        now = of_run.saved_at + later
        monkeypatch.setattr(loop.time, "monotonic", lambda now=now: now)
        found.append(loop.checkpoint_is_due(0, of_run))
    assert found == [False, True, False, True]  # one of 31 s may come every 620 seconds
    state.save(run, of_run)
    assert of_run.save_seconds == 0 and not loop.checkpoint_is_due(0, of_run)
    due = [loop.checkpoint_is_due(3, of_run) for of_run.progress.step in range(6)]
    assert due == [False, False, True] * 2
