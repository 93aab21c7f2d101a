"""The state of a run: what flags and config become of it, and whose checkpoints it goes on from."""

import argparse
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_caption
from configs import SCHEMAS, load_config
from engine import loop, state
from engine import main as engine_main
from engine.digests import data_digests
from engine.experiment import read_experiment
from engine.loop import learning_rate
from engine.main import prepare, start
from engine.state import StepPlan, build_state, check_identity, plan_steps, resume
from engine.tasks import CAPTION
from models import prunable_layers
from tests.runs import log_of, make_scenes, result, same, saved_steps, write_config
from utils import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture
def flags(scenes, tmp_path):
    """Of a run of two epochs of six steps."""
    config = write_config(tmp_path / "c.yaml", scenes, max_epoch=2, batch_size=8)
    flags = ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "2"]
    return [*flags, "--deltaT", "2", "--eval_epochs", "0"]


def train(flags, *more):
    train_caption.main(train_caption.parse_args([*flags, *more]))


def built(flags, *more):
    run = start(read_experiment(train_caption.parse_args([*flags, *more]), "caption"))
    model, train_set, _, layer_id = prepare(run)
    return run, build_state(run, model, train_set, layer_id)


# --- steps ---------------------------------------------------------------------------------------


def test_steps_are_counted():
    def plan(samples, samples_per_step, max_epoch, max_steps=None, warmup_steps=None):
        flags = argparse.Namespace(max_steps=max_steps, warmup_steps=warmup_steps)
        return plan_steps(flags, samples, samples_per_step, max_epoch)

    assert plan(566_747, 40, 5) == StepPlan(14168, 5, 70840, 14168)  # the paper's
    early = plan(100, 10, 1, max_steps=25, warmup_steps=3)
    assert early == StepPlan(10, 3, 25, 3)
    assert [early.steps_of(epoch) for epoch in range(3)] == [10, 10, 5]
    assert plan(100, 10, 1, warmup_steps=0).warmup_steps == 0
    with pytest.raises(UserError, match=r"takes 21 samples .* training set has 20"):
        plan(20, 21, 5)


def test_learning_rate_is_a_cosine_by_epoch():
    rates = [learning_rate(epoch, 4, init_lr=3.0, min_lr=1.0) for epoch in range(5)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([3, 2 + half, 2, 2 - half, 1])


# --- flags and config arrive ---------------------------------------------------------------------

ARRIVES = {
    "--deltaT 3": lambda s: s.pruner.schedule.delta_t == 3 and s.pruner.score.delta_t == 3,
    "--beta1 0.25": lambda s: s.pruner.score.beta1 == 0.25,
    "--beta2 0.25": lambda s: s.pruner.score.beta2 == 0.25,
    "--initial_threshold 0.75": lambda s: s.pruner.schedule.initial_threshold == 0.75,
    "--final_threshold 0.375": lambda s: s.pruner.schedule.final_threshold == 0.375,
    "--initial_warmup 2": lambda s: s.pruner.schedule.initial_warmup == 2,
    "--final_warmup 3": lambda s: s.pruner.schedule.final_warmup == 3,
    "--warmup_steps 1": lambda s: s.pruner.schedule.warmup_steps == 1,
    "--max_steps 11": lambda s: s.pruner.schedule.total_steps == 11,
    "--batch_size 4": lambda s: s.pruner.schedule.steps_per_epoch == 12,
    "--pruner_name Taylor": lambda s: s.pruner.method == "Taylor",
    "--final_threshold 1": lambda s: s.pruner is None,
    "--init_lr 0.5": lambda s: s.optimizer.param_groups[0]["lr"] == 0.5,
    "--max_epoch 3": lambda s: s.plan.epochs == 3,
    "--gradient_accumulation_steps 2": lambda s: s.plan.steps_per_epoch == 3,
    "--num_workers 1": lambda s: s.loader.num_workers == 1,
    "--seed 5": lambda s: s.loader.batch_sampler.seed == 5,
    "--skip_bad_images": lambda s: s.loader.dataset.dataset.skip_bad_images,
}


@pytest.fixture(scope="module")
def plain(scenes, tmp_path_factory):
    """A state with the flags' defaults."""
    folder = tmp_path_factory.mktemp("plain")
    config = write_config(folder / "c.yaml", scenes, max_epoch=2, batch_size=8)
    flags = ["--config", config, "--output_dir", str(folder), "--warmup_steps", "2"]
    return built([*flags, "--deltaT", "2"])


@pytest.mark.parametrize("flag", ARRIVES)
def test_a_flag_arrives(flags, plain, flag):
    assert not ARRIVES[flag](plain[1])
    room = ["--max_epoch", "9"] if "accumulation" in flag else []  # for the warm-ups
    assert ARRIVES[flag](built(flags, *room, *flag.split())[1])


def test_mistakes_in_the_schedule_name_flags(flags):
    with pytest.raises(UserError, match="window of --deltaT 99 .* lower --deltaT or .*--max_steps"):
        built(flags, "--deltaT", "99")


def test_processes_draw_their_own_dropout(plain):
    run, of_run = plain
    drawn = []
    for rank in (0, 1):
        resume(replace(run, process=replace(run.process, rank=rank)), of_run, None)
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)
    torch.manual_seed(run.flags.seed + 1)
    assert torch.equal(drawn[1], torch.rand(3))


def test_compiled_steps_use_the_compiled_model(flags, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    for flag, kinds in (("", []), ("--compile", ["Captioner"])):
        built(flags, *flag.split())
        assert [kind.__name__ for kind in compiled] == kinds


def test_weight_decay_and_least_learning_rate_are_the_configs(scenes, tmp_path):
    changes = {"max_epoch": 2, "batch_size": 24, "min_lr": 5e-4, "weight_decay": 0.125}
    config = write_config(tmp_path / "c.yaml", scenes, **changes)
    flags = ["--config", config, "--output_dir", str(tmp_path), "--eval_epochs", "0"]
    run, of_run = built([*flags, "--final_threshold", "1"])
    assert {group["weight_decay"] for group in of_run.optimizer.param_groups} == {0.125}
    assert isinstance(of_run.optimizer, torch.optim.AdamW)
    loop.train(run, of_run, dict.fromkeys(CAPTION.held_out))
    assert [line["lr"] for line in log_of(tmp_path / "c")] == pytest.approx([1e-3, 7.5e-4])


@pytest.mark.parametrize(("method", "averages"), [("PLATON", 3), ("Taylor", 0), ("Magnitude", 0)])
def test_the_disk_must_hold_all_checkpoints_and_averages(
    flags, plain, monkeypatch, method, averages
):
    """Float32: the weights, two averages of AdamW's, PLATON's three; and three files of weights."""
    more = ["--pruner_name", method, "--keep_checkpoints", "3"]
    parameters = sum(p.numel() for p in plain[1].model.parameters())
    checkpoint = 4 * (3 * parameters + averages * plain[1].pruner.numel)
    needed = 4 * checkpoint + 3 * 4 * parameters
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            built(flags, *more)
            continue
        with pytest.raises(UserError, match="make room"):
            built(flags, *more)


# --- a run owns its checkpoints ------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill: nothing is written after it."""


def train_and_kill(monkeypatch, step, flags, *more):
    train_step = loop.train_step

    def killed_after(run, of_run, parts, weights):
        train_step(run, of_run, parts, weights)
        if of_run.progress.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed_after)
        with pytest.raises(Killed):
            train(flags, *more)


def test_a_run_that_starts_again_keeps_its_own_checkpoints(flags, tmp_path, monkeypatch, capsys):
    """An older run's later steps neither displace them nor pass for their result."""
    train(flags, "--model_dir", "run")
    old = result(tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [6, 12]
    train_and_kill(monkeypatch, 2, flags, "--model_dir", "run", "--resume", "off")
    assert saved_steps(tmp_path / "run") == [6, 12]  # old ones stay until a new one is there
    again = ["--model_dir", "run", "--seed", "7", "--checkpoint_steps", "3"]
    again += ["--keep_checkpoints", "1"]
    train_and_kill(monkeypatch, 5, flags, *again, "--resume", "off")
    assert saved_steps(tmp_path / "run") == [3]
    train(flags, *again)
    assert "step_00000003.pt: 3 of 12 steps done" in capsys.readouterr().out
    train(flags, "--model_dir", "undisturbed", "--seed", "7")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))
    assert not same(result(tmp_path / "run"), old)
    record = (tmp_path / "run/config.json").read_text()
    monkeypatch.setattr(engine_main, "train", None)  # which a finished run does not call
    train(flags, *again, "--compile")
    printed = capsys.readouterr().out
    assert "already finished; the last epoch: {" in printed
    assert f"--evaluate --pruned {tmp_path / 'run'}" in printed
    assert (tmp_path / "run/config.json").read_text() == record


def test_going_on_from_an_older_file_replaces_the_later_ones(flags, tmp_path, monkeypatch):
    more = ["--model_dir", "run", "--checkpoint_steps", "2", "--keep_checkpoints", "9"]
    train_and_kill(monkeypatch, 9, flags, *more)
    assert saved_steps(tmp_path / "run") == [2, 4, 6, 8]
    middle = str(tmp_path / "run/checkpoints/step_00000002.pt")
    train_and_kill(monkeypatch, 5, flags, *more, "--resume", middle)
    assert saved_steps(tmp_path / "run") == [2, 4]


def test_a_file_of_weights_is_no_checkpoint(flags, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "pruned.safetensors")
    torch.save({"model": {}}, tmp_path / "official.pth")
    for path in (tmp_path / "pruned.safetensors", tmp_path / "official.pth", tmp_path):
        with pytest.raises(UserError, match=f"--resume {path}: no checkpoint .* --pretrained"):
            train(flags, "--resume", str(path))


def test_a_run_killed_before_its_last_line_writes_it(flags, tmp_path, monkeypatch):
    """Though the log of a run before says that all steps are done."""
    more = ["--model_dir", "run", "--max_steps", "8"]
    train(flags, *more)
    old = result(tmp_path / "run")
    for step, first in ((6, ["--resume", "off"]), (8, [])):
        with monkeypatch.context() as patch:
            finish_epoch = loop.finish_epoch

            def killed(run, of_run, held_out, step=step, finish_epoch=finish_epoch):
                if of_run.progress.step == step:
                    raise Killed
                finish_epoch(run, of_run, held_out)

            patch.setattr(loop, "finish_epoch", killed)
            with pytest.raises(Killed):
                train(flags, *more, "--seed", "7", *first)
    assert saved_steps(tmp_path / "run") == [6, 8]
    train(flags, *more, "--seed", "7")
    assert [line["step"] for line in log_of(tmp_path / "run")] == [6, 8]
    train(flags, *more[2:], "--model_dir", "undisturbed", "--seed", "7")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))
    assert not same(result(tmp_path / "run"), old)


def test_skipped_samples_are_counted_by_epoch_and_survive_a_resume(scenes, tmp_path, monkeypatch):
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    records = json.loads((copy / "annotation/coco_karpathy_train.json").read_text())
    for record in records[:4:2]:
        (copy / "images" / record["image"]).write_bytes(b"\x89PNG, cut off")
    config = write_config(tmp_path / "c.yaml", copy, max_epoch=2, batch_size=4)
    flags = ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "2"]
    flags += ["--skip_bad_images", "--checkpoint_steps", "4", "--gradient_accumulation_steps", "2"]
    flags += ["--eval_epochs", "0", "--deltaT", "2"]
    train(flags, "--model_dir", "whole")
    train_and_kill(monkeypatch, 9, flags, "--model_dir", "killed")
    train(flags, "--model_dir", "killed")
    for name in ("whole", "killed"):
        assert [line["bad_images"] for line in log_of(tmp_path / name)] == [2, 2]
    assert same(result(tmp_path / "whole"), result(tmp_path / "killed"))


# --- what a result depends on, by content --------------------------------------------------------


def test_what_a_name_stands_for_counts_and_not_the_name(flags, scenes, tmp_path):
    """Another profile, other weights or another annotation under the same names: another run."""
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    config = write_config(tmp_path / "d.yaml", copy, max_epoch=2, batch_size=8)
    model = CAPTION.build_model(load_config(config))
    weights, profile = tmp_path / "weights.safetensors", tmp_path / "id.json"
    save_file({name: p.detach() for name, p in model.named_parameters()}, weights)
    profile.write_text(json.dumps(dict.fromkeys(prunable_layers(model), 2.0)))
    more = [*flags[2:], "--config", config, "--pretrained", str(weights)]
    more += ["--id_profile", str(profile), "--max_steps", "8", "--model_dir", "run"]
    train(more)
    shutil.copy(profile, tmp_path / "copy.json")
    train(more, "--id_profile", str(tmp_path / "copy.json"))  # the same run
    profile.write_text(profile.read_text().replace("2.0", "3.0"))
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights)
    annotation = copy / "annotation/coco_karpathy_train.json"
    annotation.write_text(annotation.read_text().replace("red", "blue"))
    with pytest.raises(UserError) as error:
        train(more)
    for what in ("ID profile", "starting weights", "training annotation"):
        assert f"the content of the {what} differs" in str(error.value)


IDENTITY_FLAGS = """
    seed amp pruner_name beta1 beta2 deltaT initial_threshold final_threshold initial_warmup
    final_warmup gradient_accumulation_steps
""".split()
FREE_KEYS = """
    pretrained image_root ann_root coco_gt_root id_profile max_epoch eval_batch_size num_workers
    vit_grad_ckpt vit_ckpt_layer max_length min_length num_beams length_normalization tokenizer
    med_config
""".split()


def test_the_flags_and_keys_that_make_another_run(plain):
    """A flag that is new, too, and that nobody has thought about."""
    run, _ = plain
    flags = vars(run.flags)
    for name in [*flags, "new_flag"]:
        changed = replace(run, flags=argparse.Namespace(**flags | {name: "changed"}))
        assert (changed.identity() != run.identity()) == (name in [*IDENTITY_FLAGS, "new_flag"])
    for key in SCHEMAS["caption"]:
        changed = replace(run, config={**run.config, key: "changed"})
        assert (changed.identity() == run.identity()) == (key in FREE_KEYS), key


def test_processes_and_steps_make_another_run(plain):
    own = plain[1].identity
    for key in ("processes", "samples", "steps_per_epoch", "epochs", "total_steps", "warmup_steps"):
        with pytest.raises(UserError, match=f"another run: {key} was {own[key]}, is 99"):
            check_identity(own, own | {key: 99}, "path")


def test_sizes_and_vocabulary_count_by_their_content(plain, scenes, tmp_path):
    run, of_run = plain

    def digests(**changes):
        dataset = of_run.loader.dataset.dataset
        return data_digests({**run.config, **changes}, dataset.records)

    fields = {"hidden_dropout_prob": 0.5, "hidden_size": 32}
    (tmp_path / "med.json").write_text(json.dumps(fields))
    inline = digests(med_config=dict(reversed(fields.items())))
    assert digests(med_config=str(tmp_path / "med.json")) == inline != digests()
    shutil.copytree(scenes / "tokenizer", tmp_path / "copy")
    assert digests(tokenizer=str(tmp_path / "copy")) == digests()
    with open(tmp_path / "copy/vocab.txt", "a") as file:
        file.write("more\n")
    changed = digests(tokenizer=str(tmp_path / "copy"))
    assert {key for key in changed if changed[key] != digests()[key]} == {
        "content of the tokenizer"
    }


def test_checkpoints_of_earlier_versions_are_compared_by_what_they_hold(plain, tmp_path):
    """Their names of what a result depends on are those of today."""
    check_identity({"seed": 1, "id_profile": "gone.json"}, {"seed": 1, "new": 2}, tmp_path)
    with pytest.raises(UserError, match="seed was 1, is 2"):
        check_identity({"seed": 1}, {"seed": 2, "new": 2}, tmp_path)
    of_config = "vit image_size prompt max_words max_tokens augment init_lr min_lr weight_decay"
    of_files = "starting weights|tokenizer|training annotation|ID profile".split("|")
    earlier = {*IDENTITY_FLAGS, *of_config.split(), "batch_size", "processes", "samples"}
    earlier |= {f"content of the {name}" for name in of_files} | {"content of med_config"}
    assert earlier <= plain[1].identity.keys()


# --- the loop's ends -----------------------------------------------------------------------------


def test_a_sparsity_that_was_missed_is_noted_in_the_last_line(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(state.Pruner, "note", lambda self: "asked for more")
    with pytest.warns(UserWarning, match="asked for more"):
        train(flags, "--model_dir", "run")
    assert [line.get("note") for line in log_of(tmp_path / "run")] == [None, "asked for more"]


def test_the_true_error_survives_the_first_step_after_a_log_line(flags, monkeypatch):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)
    train_step = loop.train_step

    def failing(run, of_run, parts, weights):
        if of_run.progress.step == 4:
            raise ValueError("the true error")
        train_step(run, of_run, parts, weights)

    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(ValueError, match="the true error"):
        train(flags)


def test_nan_scores_are_explained_by_the_loss(flags, monkeypatch):
    from models import Captioner

    forward = Captioner.forward
    monkeypatch.setattr(Captioner, "forward", lambda *args: forward(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        train(flags, "--pruner_name", "Taylor", "--initial_warmup", "0")


@pytest.mark.parametrize("eval_test", [False, True])
def test_epochs_between_validations(flags, eval_test, monkeypatch):
    """The score falls with each; but only the last epoch is at the final ratio."""
    validated, training = [], []
    train_step = loop.train_step

    def evaluate(model, dataset, split, options):
        assert not model.training and not options.meteor
        validated.append(split)
        return {"scores": {"CIDEr": 1 / len(validated)}}

    def step(run, of_run, parts, weights):
        training.append(of_run.model.training)
        train_step(run, of_run, parts, weights)

    monkeypatch.setattr(loop, "train_step", step)
    more = "--max_epoch 5 --batch_size 24 --warmup_steps 1 --eval_epochs 2".split()
    more += ["--eval_test"] * eval_test
    run, of_run = built(flags, *more)
    run = replace(run, task=replace(CAPTION, evaluate=evaluate))
    loop.train(run, of_run, dict.fromkeys(CAPTION.held_out))
    log = log_of(run.folder)
    assert ["val_CIDEr" in line for line in log] == [False, True, False, True, True]
    assert validated == (["val", "test"] if eval_test else ["val"]) * 3
    assert ("test_CIDEr" in log[-1]) == eval_test
    assert training == [True] * 10
    assert same(load_file(run.folder / loop.BEST_FILE), result(run.folder))


def test_a_checkpoint_by_time_where_it_is_cheap(flags, monkeypatch):
    run, of_run = built(flags)
    now = of_run.saved_at
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    assert not loop.checkpoint_is_due(0, of_run)
    now += loop.CHECKPOINT_SECONDS
    assert loop.checkpoint_is_due(0, of_run)
    of_run.save_seconds = 31.0  # which may come every 620 seconds
    assert not loop.checkpoint_is_due(0, of_run)
    now += 20
    assert loop.checkpoint_is_due(0, of_run)
    state.save(run, of_run)
    assert of_run.save_seconds == 0 and not loop.checkpoint_is_due(0, of_run)
    due = [loop.checkpoint_is_due(3, of_run) for of_run.progress.step in range(6)]
    assert due == [False, False, True] * 2
