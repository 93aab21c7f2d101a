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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_caption
from configs import SCHEMAS, load_config
from engine import loop, state
from engine.plan import StepPlan
from engine.run import prepare_run
from engine.state import build_state, check_identity
from engine.stopping import EXIT_STOPPED
from engine.tasks import CAPTION
from models import prunable_layers
from tests.runs import make_scenes, result, same, saved_steps, write_config
from utils import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture
def flags(scenes, tmp_path):
    config = write_config(tmp_path / "c.yaml", scenes, max_epoch=2)
    return ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "3"]


def train(flags, *more):
    train_caption.main(train_caption.parse_args([*flags, "--eval_epochs", "0", *more]))


def built(flags, *more):
    args = train_caption.parse_args([*flags, *more])
    run, model, train_set, _ = prepare_run(args, CAPTION)
    return run, build_state(run, model, train_set)


# --- flags and config arrive ---------------------------------------------------------------------

PRUNING = {
    "--deltaT 7": lambda s: s.pruner.schedule.delta_t == 7 and s.pruner.score.delta_t == 7,
    "--beta1 0.25": lambda s: s.pruner.score.beta1 == 0.25,
    "--beta2 0.25": lambda s: s.pruner.score.beta2 == 0.25,
    "--initial_threshold 0.75": lambda s: s.pruner.schedule.initial_threshold == 0.75,
    "--final_threshold 0.375": lambda s: s.pruner.schedule.final_threshold == 0.375,
    "--initial_warmup 2": lambda s: s.pruner.schedule.initial_warmup == 2,
    "--final_warmup 3": lambda s: s.pruner.schedule.final_warmup == 3,
    "--warmup_steps 5": lambda s: s.pruner.schedule.warmup_steps == 5,
    "--max_steps 33": lambda s: s.pruner.schedule.total_steps == 33,
    "--batch_size 4": lambda s: s.pruner.schedule.steps_per_epoch == 12,
    "--pruner_name Taylor": lambda s: s.pruner.method == "Taylor",
    "--final_threshold 1": lambda s: s.pruner is None,
    "--init_lr 0.5": lambda s: s.optimizer.param_groups[0]["lr"] == 0.5,
    "--max_epoch 3": lambda s: s.plan.epochs == 3,
    "--gradient_accumulation_steps 2": lambda s: s.plan.steps_per_epoch == 12,
    "--num_workers 1": lambda s: s.loader.num_workers == 1,
    "--seed 5": lambda s: s.loader.batch_sampler.seed == 5,
    "--skip_bad_images": lambda s: s.loader.dataset.dataset.skip_bad_images,
}


@pytest.mark.parametrize("flag", PRUNING)
def test_a_flag_arrives(flags, flag):
    assert not PRUNING[flag](built(flags)[1])
    assert PRUNING[flag](built(flags, *flag.split())[1])


def test_mistakes_in_the_schedule_name_flags(flags):
    with pytest.raises(UserError, match="window of --deltaT 99 .* lower --deltaT or .*--max_steps"):
        built(flags, "--deltaT", "99")


def test_weights_decay_by_the_configs_value(scenes, tmp_path):
    config = write_config(tmp_path / "c.yaml", scenes, weight_decay=0.125)
    _, of_run = built(["--config", config, "--output_dir", str(tmp_path)], "--warmup_steps", "3")
    assert {group["weight_decay"] for group in of_run.optimizer.param_groups} == {0.125}
    assert isinstance(of_run.optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_amp_chooses_the_precision_of_products(flags, amp, dtype):
    run, of_run = built(flags, "--amp", amp)
    layer = next(iter(prunable_layers(of_run.model).values()))
    with run.autocast():
        assert layer(torch.ones(1, layer.in_features)).dtype == dtype


def test_processes_draw_their_own_dropout(flags, monkeypatch):
    run, of_run = built(flags)
    drawn = []
    for rank in (0, 1):
        object.__setattr__(run.process, "rank", rank)
        state.resume(run, of_run)
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)
    torch.manual_seed(run.args.seed + 1)
    assert torch.equal(drawn[1], torch.rand(3))


def test_compiled_steps_use_the_compiled_model(flags, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    built(flags)
    assert compiled == []
    built(flags, "--compile")
    assert [kind.__name__ for kind in compiled] == ["Captioner"]


def test_length_normalization_comes_from_the_config(scenes, tmp_path):
    for word in ("total", "generated"):
        path = write_config(tmp_path / "c.yaml", scenes, length_normalization=word)
        model = CAPTION.build_model(load_config(path))
        assert model.length_normalization == word


def test_the_learning_rate_falls_to_the_configs_least(scenes, tmp_path):
    config = write_config(tmp_path / "c.yaml", scenes, max_epoch=2, init_lr=1e-3, min_lr=5e-4)
    train(["--config", config, "--output_dir", str(tmp_path)], "--final_threshold", "1")
    log = [json.loads(line) for line in (tmp_path / "c/log.txt").read_text().splitlines()]
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 7.5e-4])


@pytest.mark.parametrize(("method", "averages"), [("PLATON", 3), ("Taylor", 0), ("Magnitude", 0)])
def test_the_disk_must_hold_all_checkpoints_and_averages(flags, monkeypatch, method, averages):
    """Float32: the weights, two averages of AdamW's, PLATON's three; and three files of weights."""
    more = ["--pruner_name", method, "--keep_checkpoints", "3"]
    _, of_run = built(flags, *more)
    parameters = sum(p.numel() for p in of_run.model.parameters())
    checkpoint = 4 * (3 * parameters + averages * of_run.pruner.numel)
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
    assert saved_steps(tmp_path / "run") == [24, 48]
    again = ["--model_dir", "run", "--seed", "7", "--checkpoint_steps", "5"]
    again += ["--keep_checkpoints", "1"]
    train_and_kill(monkeypatch, 12, flags, *again, "--resume", "off")
    assert saved_steps(tmp_path / "run") == [10]
    train(flags, *again)
    assert "step_00000010.pt: 10 of 48 steps done" in capsys.readouterr().out
    train(flags, "--model_dir", "undisturbed", "--seed", "7")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))
    assert not same(result(tmp_path / "run"), old)


def test_old_checkpoints_stay_until_a_new_one_is_there(flags, tmp_path, monkeypatch):
    train(flags, "--model_dir", "run")
    train_and_kill(monkeypatch, 3, flags, "--model_dir", "run", "--resume", "off")
    assert saved_steps(tmp_path / "run") == [24, 48]


def test_going_on_from_an_older_file_replaces_the_later_ones(flags, tmp_path, monkeypatch):
    train(flags, "--model_dir", "run", "--checkpoint_steps", "10", "--keep_checkpoints", "9")
    assert saved_steps(tmp_path / "run") == [10, 20, 24, 30, 40, 48]
    middle = str(tmp_path / "run/checkpoints/step_00000020.pt")
    more = ["--model_dir", "run", "--checkpoint_steps", "10", "--keep_checkpoints", "9"]
    train_and_kill(monkeypatch, 26, flags, *more, "--resume", middle)
    assert saved_steps(tmp_path / "run") == [10, 20, 24]


def test_resume_off_starts_again(flags, tmp_path, capsys):
    train(flags, "--model_dir", "run", "--max_steps", "20")
    train(flags, "--model_dir", "run", "--max_steps", "20", "--resume", "off")
    assert "resumed" not in capsys.readouterr().out


def test_a_finished_run_says_so_and_does_nothing(flags, tmp_path, capsys, monkeypatch):
    train(flags, "--model_dir", "run")
    monkeypatch.setattr(loop, "finish_epoch", None)
    train(flags, "--model_dir", "run")
    said = capsys.readouterr().out
    assert "already finished; the last epoch: {" in said
    assert f"--evaluate --pruned {tmp_path / 'run'}" in said


def test_a_file_of_weights_is_no_checkpoint(flags, tmp_path):
    train(flags, "--model_dir", "run")
    torch.save({"model": {}}, tmp_path / "official.pth")
    for path in (tmp_path / "run/pruned.safetensors", tmp_path / "official.pth", tmp_path / "run"):
        with pytest.raises(UserError, match=f"--resume {path}: no checkpoint .* --pretrained"):
            train(flags, "--resume", str(path))


def test_a_run_killed_before_its_last_line_writes_it(flags, tmp_path, monkeypatch):
    """Though the log of a run before says that all steps are done."""
    more = ["--model_dir", "run", "--max_steps", "30"]
    train(flags, *more)
    old = result(tmp_path / "run")
    for stage, first in (("first", ["--resume", "off"]), ("last", [])):
        with monkeypatch.context() as patch:
            finish_epoch = loop.finish_epoch

            def killed(run, of_run, held_out, stage=stage, finish_epoch=finish_epoch):
                if of_run.progress.step == {"first": 24, "last": 30}[stage]:
                    raise Killed
                finish_epoch(run, of_run, held_out)

            patch.setattr(loop, "finish_epoch", killed)
            with pytest.raises(Killed):
                train(flags, *more, "--seed", "7", *first)
    assert saved_steps(tmp_path / "run") == [24, 30]
    train(flags, *more, "--seed", "7")
    log = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert [line["step"] for line in log] == [24, 30]
    train(flags, *more[2:], "--model_dir", "undisturbed", "--seed", "7")
    assert same(result(tmp_path / "run"), result(tmp_path / "undisturbed"))
    assert not same(result(tmp_path / "run"), old)


# --- what a result depends on, by content --------------------------------------------------------


def test_a_profile_that_was_measured_anew_is_another_run(flags, tmp_path):
    names = prunable_layers(CAPTION.build_model(load_config(flags[1])))
    profile = tmp_path / "id.json"
    profile.write_text(json.dumps(dict.fromkeys(names, 2.0)))
    more = ["--model_dir", "run", "--id_profile", str(profile)]
    train(flags, *more)
    shutil.copy(profile, tmp_path / "copy.json")
    train(flags, *more[:2], "--id_profile", str(tmp_path / "copy.json"))  # the same run
    profile.write_text(json.dumps(dict.fromkeys(names, 3.0)))
    with pytest.raises(UserError, match="another run: the content of the ID profile differs"):
        train(flags, *more)


def test_other_starting_weights_under_the_same_name_are_another_run(flags, tmp_path):
    train(flags, "--model_dir", "start", "--max_steps", "12")
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tmp_path / "start/pruned.safetensors", weights)
    more = ["--model_dir", "run", "--pretrained", str(weights)]
    train(flags, *more)
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="another run: the content of the starting weights differs"):
        train(flags, *more)


def test_another_annotation_of_the_same_length_is_another_run(scenes, tmp_path):
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    config = write_config(tmp_path / "c.yaml", copy, max_epoch=1)
    flags = ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "3"]
    train(flags)
    annotation = copy / "annotation/coco_karpathy_train.json"
    annotation.write_text(annotation.read_text().replace("red", "blue"))
    with pytest.raises(UserError, match="the content of the training annotation differs"):
        train(flags)


# What may change between a stop and a resume: places, speed, evaluation, what is said and kept.
# --max_steps, --warmup_steps and --max_epoch count as the steps that they come to.
FREE_FLAGS = """
    config output_dir model_dir device check resume checkpoint_steps keep_checkpoints compile
    skip_bad_images evaluate pruned sparse eval_epochs eval_test spice samples score_only
    pretrained init_lr max_epoch batch_size num_workers max_steps warmup_steps useID id_profile
    n_gpu world_size dist_url distributed local_rank
""".split()
FREE_KEYS = """
    pretrained image_root ann_root coco_gt_root id_profile max_epoch eval_batch_size num_workers
    vit_grad_ckpt vit_ckpt_layer max_length min_length num_beams length_normalization
""".split()


@pytest.fixture
def identity_of(flags):
    """The identity of a run whose flags, config, steps or number of processes are changed."""
    run, of_run = built(flags)
    dataset = of_run.loader.dataset.dataset

    def identity(keys=(), flags=(), plan=None, world_size=1):
        args = argparse.Namespace(**{**vars(run.args), **dict(flags)})
        process = replace(run.process, world_size=world_size)
        changed = replace(run, args=args, config={**run.config, **dict(keys)}, process=process)
        return state.run_identity(changed, of_run.model, dataset, plan or of_run.plan)

    assert identity() == of_run.identity
    return identity


def test_all_flags_but_a_few_make_another_run(flags, identity_of):
    own = set(vars(train_caption.parse_args([])))
    assert set(FREE_FLAGS) <= own
    for flag in own - set(FREE_FLAGS):
        with pytest.raises(UserError, match=f"another run: {flag} was .*, is 'changed'"):
            check_identity(identity_of(), identity_of(flags={flag: "changed"}), "path")
    for flag in FREE_FLAGS:
        assert identity_of(flags={flag: "changed"}) == identity_of()


def test_all_keys_of_configs_but_a_few_make_another_run(identity_of, tmp_path):
    (tmp_path / "vocab.txt").write_text("other\n")
    texts = {"med_config": {"hidden_size": 8}, "tokenizer": str(tmp_path)}
    keys = {key for schema in SCHEMAS.values() for key in schema}
    for key in keys:
        before = identity_of() if key in texts else identity_of({key: ""})
        after = identity_of({key: texts.get(key, "changed")})
        assert (before == after) == (key in FREE_KEYS), key


def test_processes_and_steps_make_another_run(identity_of):
    plan = StepPlan(24, 2, 48, 3)
    assert identity_of(plan=plan) == identity_of() != identity_of(world_size=2)
    for name in ("steps_per_epoch", "epochs", "total_steps", "warmup_steps"):
        changed = replace(plan, **{name: 7})
        with pytest.raises(UserError, match=f"{name} was .*, is 7"):
            check_identity(identity_of(), identity_of(plan=changed), "path")


def test_sizes_and_vocabulary_count_by_their_content(identity_of, scenes, tmp_path):
    fields = {"hidden_dropout_prob": 0.5, "hidden_size": 32}
    (tmp_path / "med.json").write_text(json.dumps(fields))
    inline = identity_of({"med_config": dict(reversed(fields.items()))})
    assert identity_of({"med_config": str(tmp_path / "med.json")}) == inline != identity_of()
    (tmp_path / "med.json").write_text(json.dumps(fields | {"hidden_dropout_prob": 0.1}))
    with pytest.raises(UserError, match="another run: the content of med_config differs"):
        check_identity(inline, identity_of({"med_config": str(tmp_path / "med.json")}), "path")
    shutil.copytree(scenes / "tokenizer", tmp_path / "copy")
    copied = identity_of({"tokenizer": str(tmp_path / "copy")})
    assert copied == identity_of()
    with open(tmp_path / "copy/vocab.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="another run: the content of the tokenizer differs"):
        check_identity(copied, identity_of({"tokenizer": str(tmp_path / "copy")}), "path")


def test_checkpoints_of_earlier_versions_are_compared_by_what_they_hold(tmp_path):
    check_identity({"seed": 1, "id_profile": "gone.json"}, {"seed": 1, "new": 2}, tmp_path)
    with pytest.raises(UserError, match="seed was 1, is 2"):
        check_identity({"seed": 1}, {"seed": 2, "new": 2}, tmp_path)


# --- the loop's ends -----------------------------------------------------------------------------


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


def test_tensorboard_holds_all_when_a_run_is_stopped(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)
    train_step = loop.train_step

    def stopped(run, of_run, parts, weights):
        train_step(run, of_run, parts, weights)
        if of_run.progress.step == 10:
            raise SystemExit(EXIT_STOPPED)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(SystemExit):
        train(flags, "--model_dir", "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_losses_that_are_told_are_means_over_their_steps(flags, tmp_path):
    """Of an epoch that ends early, too."""
    train(flags, "--model_dir", "run", "--max_steps", "36", "--checkpoint_steps", "12")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    log = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    expected = [(told[12] + told[24]) / 2, told[36]]  # kept in float32
    assert [line["loss"] for line in log] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("eval_test", [False, True])
def test_epochs_between_validations(flags, eval_test, monkeypatch):
    """The score falls with each; but only the last epoch is at the final ratio."""
    validated, training = [], []
    train_step = loop.train_step

    def evaluate(run, model, dataset, split):
        assert not model.training
        validated.append(split)
        return {"scores": {"CIDEr": 1 / len(validated)}}

    def step(run, of_run, parts, weights):
        training.append(of_run.model.training)
        train_step(run, of_run, parts, weights)

    monkeypatch.setattr(loop, "train_step", step)

    more = ["--max_epoch", "5", "--eval_epochs", "2", *["--eval_test"] * eval_test]
    run, model, train_set, held_out = prepare_run(
        train_caption.parse_args([*flags, *more]), CAPTION
    )
    object.__setattr__(run, "task", type("Task", (), {**vars(CAPTION), "evaluate": evaluate}))
    loop.train(run, model, train_set, held_out)
    log = [json.loads(line) for line in (run.folder / "log.txt").read_text().splitlines()]
    assert ["val_CIDEr" in line for line in log] == [False, True, False, True, True]
    assert validated == (["val", "test"] if eval_test else ["val"]) * 3
    assert ("test_CIDEr" in log[-1]) == eval_test
    assert training == [True] * 120
    assert same(load_file(run.folder / loop.BEST_FILE), result(run.folder))


def test_a_checkpoint_by_time_where_it_is_cheap(flags, monkeypatch):
    run, of_run = built(flags)
    now = of_run.saved_at
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    assert not loop.checkpoint_is_due(run, of_run)
    now += loop.CHECKPOINT_SECONDS
    assert loop.checkpoint_is_due(run, of_run)
    of_run.save_seconds = 31.0  # which may come every 620 seconds
    assert not loop.checkpoint_is_due(run, of_run)
    now += 20
    assert loop.checkpoint_is_due(run, of_run)
    state.save(run, of_run)
    assert of_run.save_seconds == 0 and not loop.checkpoint_is_due(run, of_run)
    run.args.checkpoint_steps = 3
    assert [loop.checkpoint_is_due(run, of_run) for of_run.progress.step in range(6)] == [
        *(False, False, True),
        *(False, False, True),
    ]


def test_skipped_samples_are_counted_by_epoch_and_survive_a_resume(scenes, tmp_path, monkeypatch):
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    records = json.loads((copy / "annotation/coco_karpathy_train.json").read_text())
    for record in records[:4:2]:
        (copy / "images" / record["image"]).write_bytes(b"\x89PNG, cut off")
    config = write_config(tmp_path / "c.yaml", copy, max_epoch=2, num_workers=1)
    flags = ["--config", config, "--output_dir", str(tmp_path), "--warmup_steps", "3"]
    flags += ["--skip_bad_images", "--checkpoint_steps", "5", "--gradient_accumulation_steps", "2"]
    train(flags, "--model_dir", "whole")
    train_and_kill(monkeypatch, 19, flags, "--model_dir", "killed")
    train(flags, "--model_dir", "killed")
    for name in ("whole", "killed"):
        log = [json.loads(x) for x in (tmp_path / name / "log.txt").read_text().splitlines()]
        assert [line["bad_images"] for line in log] == [2, 2]
    assert same(result(tmp_path / "whole"), result(tmp_path / "killed"))
