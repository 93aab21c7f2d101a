"""The study: weightings, cells as commands, statistics on hand-made numbers, page and figures."""

import json
import os
import platform
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import study
import train_caption
import train_nlvr
from configs import load_config
from engine.processes import machine_of
from models import build_captioner, prunable_layers
from study import ID, MEAN, NONE, SHUFFLED, UNSEEN, WITHIN, Cell, Study, weigh
from tests.runs import make_scenes, write_config
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
VISION = [f"visual_encoder.blocks.{i}.mlp.fc1" for i in range(6)]
LANGUAGE = [f"text_decoder.bert.encoder.layer.{i}.output.dense" for i in range(6)]
IDS = {name: float(i) for i, name in enumerate(VISION + LANGUAGE, start=1)}  # 1..6, 7..12
MACHINE = {"processor": "a CPU", "torch": "2"}
LOSSES = {
    (f, w, s): 1.0 + s - (w == ID) + f for f in (0.2, 0.1) for w in (NONE, ID) for s in (0, 1)
}
GROUP = ("caption", "PLATON", (0.1,))


def parse(*argv):
    return study.parse_args(list(map(str, argv)))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The study of the repository, with its results."""
    folder = tmp_path_factory.mktemp("none")
    file = ROOT / "docs" / "study.json"
    return study.open_study(parse("--preset=embedded", "--file", file, "--output_dir", folder))


def study_of(losses: dict[tuple, float | None]) -> Study:
    """Captions pruned by PLATON; (fraction, weighting, seed) to loss, None for a cell to come."""
    cells = {
        Cell("caption", "PLATON", *key): {}
        if loss is None
        else {"result": {"loss": loss, "CIDEr": -loss, "seconds": 900.0, **MACHINE}}
        for key, loss in losses.items()
    }
    for record in cells.values():
        if record:
            record["result"]["sparsity"] = {"overall": 0.8, "vision": 0.9, "language": 0.7}
    return Study({"rule": "The rule."}, [0.2, 0.1], {}, cells)


# --- weightings


def test_shuffles_move_the_same_numbers_otherwise_for_each_seed():
    shuffled = [weigh(SHUFFLED, IDS, seed) for seed in range(4)]
    assert all(sorted(profile.values()) == sorted(IDS.values()) for profile in shuffled)
    assert len({tuple(profile[name] for name in IDS) for profile in shuffled}) == 4
    assert weigh(SHUFFLED, IDS, 2) == shuffled[2]
    assert any(shuffled[0][name] > 6 for name in VISION)
    for seed in range(4):
        within = weigh(WITHIN, IDS, seed)
        assert sorted(within[name] for name in VISION) == [1, 2, 3, 4, 5, 6]
        assert sorted(within[name] for name in LANGUAGE) == [7, 8, 9, 10, 11, 12]
        assert within != IDS


def test_means_inverse_and_powers():
    assert weigh(ID, IDS, 0) == IDS
    assert weigh(MEAN, IDS, 0) == dict.fromkeys(VISION, 3.5) | dict.fromkeys(LANGUAGE, 9.5)
    assert weigh("1/ID", IDS, 0) == {name: 1 / value for name, value in IDS.items()}
    assert weigh("ID^2", IDS, 0) == {name: value**2 for name, value in IDS.items()}
    assert weigh("ID^-0.5", IDS, 0)[VISION[3]] == 0.5
    with pytest.raises(UserError, match="no weighting 'id'"):
        weigh("id", IDS, 0)


# --- the plan and the file


def test_the_repositorys_study_is_read_whole_and_written_as_it_was(embedded, tmp_path):
    plan = study.planned(parse("--preset=embedded"))
    assert (list(embedded.cells), embedded.settings) == (list(plan.cells), plan.settings)
    assert (embedded.notes, embedded.pooled) == (plan.notes, plan.pooled)
    assert len(embedded.results) == 330
    names = [cell.name for cell in embedded.cells]
    assert len(set(names)) == 350 and not any("/" in name or " " in name for name in names)
    study.write_study(embedded, tmp_path / "study.json")
    assert (tmp_path / "study.json").read_text() == (ROOT / "docs" / "study.json").read_text()


def test_a_config_is_compared_with_all_controls(tmp_path):
    flags = ["--config=configs/nlvr_demo.yaml", "--id_profile=p", "--", "--max_steps=9"]
    new = study.planned(parse(*flags))
    assert new.settings["nlvr"] == {
        **{"config": "configs/nlvr_demo.yaml", "id_profile": "p"},
        **{"validation": 0, "flags": ["--max_steps=9"]},
    }
    first, *cells = new.cells
    assert first == Cell("nlvr", "dense", 1.0, NONE, 0) and len(cells) == 8 * 2 * 6
    assert [cell.weighting for cell in cells[:6]] == [NONE, ID, SHUFFLED, WITHIN, MEAN, "1/ID"]


@pytest.mark.parametrize("part", range(1, 6))
def test_shares_hold_what_is_compared_and_are_disjoint_and_whole(embedded, part):
    cells = list(embedded.cells)
    own, others = (study.share(cells, f"{i}/5") for i in (part, part % 5 + 1))
    blocks = {cell._replace(weighting="") for cell in own}
    assert own == [cell for cell in cells if cell._replace(weighting="") in blocks]
    assert not set(own) & set(others) and 50 < len(own) < 80
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="give I/N"):
            study.share(cells, wrong)


CONFIG = ["--config=configs/nlvr_demo.yaml", "--id_profile=p"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "what to study"),
        (CONFIG[:1], "what to study"),
        (["--preset=embedded", *CONFIG], "has a config of its own"),
        (["--preset=embedded", "--", "--device=cpu"], "go with --config"),
        (["--config=configs/retrieval_demo.yaml", "--id_profile=p"], "tasks caption, nlvr"),
        ([*CONFIG, "--", "--devise=cpu"], "--devise"),
        ([*CONFIG, "--", "--final_thr=0.5"], "--final_threshold after --: each cell"),
        ([*CONFIG, "--", "--useID"], "--useID after --"),
        (["--file=README.md"], "README.md is no study"),
        ([*CONFIG, "--file=docs/study.json"], "is of another study: its settings"),
    ],
)
def test_flags_that_describe_no_study_are_refused(argv, sentence, capsys):
    with pytest.raises((UserError, SystemExit)) as refused:
        study.open_study(parse(*argv))
    assert sentence in str(refused.value) + capsys.readouterr().err


def test_a_cell_is_a_training_and_an_evaluation_command(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    setting = {"config": "c.yaml", "id_profile": str(tmp_path / "ids.json"), "validation": 5}
    setting["flags"] = ["--seed=1", "--max_steps=9", "--compile"]
    args = parse("--preset=embedded", "--output_dir", tmp_path, "--device=cpu")
    cell = Cell("nlvr", "Magnitude", 0.25, SHUFFLED, 7)
    training, evaluation = study.commands(cell, setting, args)
    assert training[1] == evaluation[1] == str(ROOT / "train_nlvr.py")
    trained, scored = (train_nlvr.parse_args(command[2:]) for command in (training, evaluation))
    assert (trained.seed, trained.pruner_name, trained.final_threshold) == (7, "Magnitude", 0.25)
    assert (trained.max_steps, trained.eval_epochs, trained.config) == (9, 0, "c.yaml")
    assert json.loads(Path(trained.id_profile).read_text()) == weigh(SHUFFLED, IDS, 7)
    assert (scored.evaluate, scored.split, scored.eval_samples) == (True, "dev", 5)
    assert trained.compile and not scored.compile  # which an evaluation refuses
    assert scored.pruned == str(tmp_path / cell.name) and scored.device == "cpu"
    (evaluation,) = study.commands(cell._replace(method="dense"), setting, args)
    assert train_nlvr.parse_args(evaluation[2:]).pruned is None


# --- running, with scripts that stand for the trainers

SCRIPT = """
import json, signal, sys, time
from pathlib import Path
flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
folder = Path(flags["output_dir"], flags["model_dir"])
if "evaluate" in flags:
    loss = float(flags["seed"]) + (folder / "pruned.safetensors").exists()
    (folder / "results").mkdir(exist_ok=True)
    scores = {"dev": {"loss": loss, "accuracy": 0.5}}
    (folder / "results/scores.json").write_text(json.dumps(scores))
    sparsity = {"overall": 0.8, "by_modality": {"vision": 0.9, "language": 0.7}, "by_layer": {}}
    (folder / "sparsity.json").write_text(json.dumps(sparsity))
else:
    print("trained", flush=True)
    if flags["init_lr"] == "9":
        sys.exit("the loss is nan")
    if flags["init_lr"] == "0":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / "waits").touch()
        time.sleep(60)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "pruned.safetensors").touch()
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with a study of five cells, whose training script is SCRIPT."""
    (tmp_path / "train_nlvr.py").write_text(SCRIPT)
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    setting = {"config": "c", "id_profile": str(tmp_path / "ids.json"), "validation": 0}
    setting["flags"] = ["--init_lr=1", "--device=cpu"]
    keys = [(w, seed) for seed in range(2) for w in (NONE, SHUFFLED)]
    cells = [Cell("nlvr", "dense", 1.0, NONE, 0), *(Cell("nlvr", "PLATON", 0.1, *k) for k in keys)]
    plan = Study({"rule": "The rule."}, [0.1], {"nlvr": setting}, {cell: {} for cell in cells})
    study.write_study(plan, tmp_path / "study.json")
    return tmp_path


def run(folder, *flags, **setting):
    """The study's command; returns what its file holds afterwards."""
    file, output = folder / "study.json", folder / "out"
    content = json.loads(file.read_text())
    content["settings"]["nlvr"] |= setting
    file.write_text(json.dumps(content))
    args = parse("--file", file, "--output_dir", output, *flags)
    study.main(args)
    return study.open_study(args)


def log(folder, cell):
    return (folder / "out" / cell.name / "output.txt").read_text()


def test_shares_run_their_cells_once_and_a_report_collects_their_folders(scripts, capsys):
    for _ in range(2):
        for part in ("1/2", "2/2"):
            run(scripts, "--cells", part)
    assert '"result"' not in (scripts / "study.json").read_text()
    found = run(scripts, "--report")
    assert [result["loss"] for result in found.results.values()] == [0, 1, 1, 2, 2]
    assert capsys.readouterr().out.count("accuracy 0.5000") == 5
    cell = list(found.cells)[2]
    result = json.loads((scripts / "study.json").read_text())["cells"][2]["result"]
    assert result["sparsity"] == {"overall": 0.8, "vision": 0.9, "language": 0.7}
    assert result == result | machine_of(torch.device("cpu")) and result["seconds"] >= 0
    assert log(scripts, cell) == "trained\n"
    left = {path.name for path in (scripts / "out" / cell.name).iterdir()}
    assert left == {"cell.json", "output.txt", "results", "sparsity.json", "weighting.json"}
    assert "5 of 5 planned cells" in (scripts / "study.md").read_text()


def test_a_cell_that_another_machine_began_starts_anew(scripts, monkeypatch):
    cell = Cell("nlvr", "PLATON", 0.1, NONE, 1)
    (scripts / "out" / cell.name / "checkpoints").mkdir(parents=True)
    file = scripts / "out" / cell.name / "cell.json"
    setting = json.loads((scripts / "study.json").read_text())["settings"]["nlvr"]
    for machine, left in ((MACHINE, False), (machine_of(torch.device("cpu")), True)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"setting": setting, "machine": machine}))
        (file.parent / "begun").touch()
        args = parse("--file=f", "--output_dir", scripts / "out")
        study.run_cell(cell, setting, args)
        assert (file.parent / "begun").exists() == left


def test_a_command_that_fails_ends_the_study_with_its_last_line(scripts):
    with pytest.raises(UserError, match="nlvr-PLATON-0.1-none-0 failed: the loss is nan .*out"):
        run(scripts, init_lr=9, flags=["--init_lr=9", "--device=cpu"])


def test_a_folder_of_another_study_is_refused(scripts):
    run(scripts, "--cells=1/1")
    with pytest.raises(UserError, match="cell.json is of another study: choose another --output"):
        run(scripts, "--report", flags=["--init_lr=2"])


def test_a_signal_stops_the_commands_that_run(scripts):
    waiting = [scripts / "out" / f"nlvr-PLATON-0.1-{w}-0" / "waits" for w in (NONE, SHUFFLED)]

    def stop_when_they_wait():
        while not all(file.exists() for file in waiting):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_they_wait, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run(scripts, "--processes=2", flags=["--init_lr=0", "--device=cpu"])
    assert ended.value.code == 75
    assert not list((scripts / "out").glob("*-1"))


def test_a_cell_through_the_trainers_themselves(tmp_path, monkeypatch):
    """The loss is of the first samples; CIDEr of the tokenizer in Python; IDs reach the pruner."""
    monkeypatch.setattr(study, "ROOT", ROOT)
    config = write_config(tmp_path / "c.yaml", make_scenes(tmp_path / "data"), augment=False)
    layers = prunable_layers(build_captioner(load_config(config)))
    (tmp_path / "ids.json").write_text(json.dumps({n: 1 + i % 5 for i, n in enumerate(layers)}))
    setting = {"config": config, "id_profile": str(tmp_path / "ids.json"), "validation": 4}
    setting["flags"] = ["--max_steps=3", "--warmup_steps=1", "--deltaT=1", "--device=cpu"]
    args = parse("--file=f", "--output_dir", tmp_path)
    cell = Cell("caption", "PLATON", 0.5, "1/ID", 3)
    for command in study.commands(cell, setting, args):
        train_caption.main(train_caption.parse_args(command[2:]))
    found = study.scores(cell, tmp_path / cell.name)
    assert found["sparsity"]["overall"] == pytest.approx(0.5, abs=1e-3)
    images = json.loads((tmp_path / cell.name / "results" / "val_images.json").read_text())
    assert len(images) == 4
    images[0]["caption"], images[1]["caption"] = "A red; ring.", images[1]["references"][0]
    (tmp_path / cell.name / "results" / "val_images.json").write_text(json.dumps(images))
    assert study.scores(cell, tmp_path / cell.name)["CIDEr"] > found["CIDEr"] + 1


def test_a_machine_is_its_processor_with_the_instructions_in_use(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    monkeypatch.setattr(Path, "read_text", lambda path: "model name\t: Some CPU\nmodel name\t: B\n")
    threads = torch.get_num_threads()
    assert machine_of(torch.device("cpu")) == {
        **{"processor": "Some CPU, AVX9", "torch": torch.__version__, "threads": threads}
    }
    monkeypatch.setattr(Path, "read_text", lambda path: "processor: 0\n")  # as ARM's
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine_of(torch.device("cpu"))["processor"] == "arm64, AVX9"


# --- statistics


def verdict(differences, score):
    return study.compare(np.array(differences), score)


def test_verdicts_need_the_interval_and_the_signs():
    lower = [-0.02, -0.01, -0.03, -0.02, -0.01, -0.02]
    low, high, p, found = verdict(lower, "loss")
    assert found == "better" and verdict(lower, "CIDEr")[-1] == "worse"
    assert verdict([-d for d in lower], "accuracy")[-1] == "better"
    assert p == 2 / 2**6 and -0.03 < low < -0.11 / 6 < high < -0.01
    # five of one sign: 2 / 2^5 is above 0.05, whatever the interval
    assert verdict(lower[:5], "loss")[-1] == UNSEEN
    # seven of eight: 2 (1 + 8) / 2^8 = 0.07
    assert verdict([*lower, -0.01, 0.001], "loss")[2:] == (18 / 256, UNSEEN)
    # nine of ten are positive, p = 2 (1 + 10) / 2^10, but one outlier makes the mean unsure
    low, high, p, found = verdict([0.01] * 9 + [-0.2], "loss")
    assert (p, found) == (22 / 1024, UNSEEN) and low < 0 < high
    # 16 of 20 fall a little (p = 0.012), but the mean of four that rise much is above zero
    low, _, p, found = verdict([-0.001] * 16 + [1.0] * 4, "accuracy")
    assert p < 0.05 and low > 0 and found == UNSEEN
    # ties and rounding have no sign: five of one sign are left, 2 / 2^5
    assert verdict([0.0, 1e-17, -1e-17], "loss")[2:] == (1, UNSEEN)
    tie = verdict([-0.02, -0.01, -0.03, -0.02, -0.01, -1e-17], "loss")
    assert tie[2:] == (1 / 16, UNSEEN)


def test_the_interval_of_two_values_lies_between_them_and_of_one_is_unknown():
    # resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert study.interval(np.array([0.0, 1.0])) == (0, 1)
    assert np.isnan(study.interval(np.array([1.0]))).all()


def test_pairs_share_seed_fractions_and_machine():
    losses = {
        (f, w, s): f * s * (w == ID) for f in (0.2, 0.1) for w in (NONE, ID) for s in range(6)
    }
    made = study_of(losses | {(0.1, NONE, 4): None, (0.1, ID, 9): 1.0})
    others = [{"processor": "B"}, {"torch": "3"}, {"threads": 2}, {"threads": 1}]
    for seed, other in enumerate(others):
        made.cells[Cell("caption", "PLATON", 0.1, ID, seed)]["result"] |= other
    pair = study.matched(made, GROUP[:2] + ((0.2, 0.1),), "CIDEr", [ID, NONE])
    differences = pair[ID] - pair[NONE]
    assert differences.tolist() == pytest.approx(np.array([[-0.6, -0.3], [-1.0, -0.5]]))
    assert len(study.matched(made, GROUP[:2] + ((0.2,),), "loss")[ID]) == 6
    assert study.matched(made, GROUP, "loss", [ID, SHUFFLED]) == {}
    assert study.matched(made, GROUP[:2] + ((),), "loss") == {}
    assert study.matched(made, GROUP, "loss")[ID].tolist() == [
        [pytest.approx(0.3)],
        [pytest.approx(0.5)],
    ]


@pytest.mark.parametrize(
    ("elsewhere", "to_come", "pairs", "so_far"),
    [([], [], "8", ""), ([7], [], "7 of 8", ""), ([], [7], "7 of 8", " so far")],
)
def test_pairs_of_which_some_are_lost_or_to_come(elsewhere, to_come, pairs, so_far):
    losses = {(0.1, w, s): 1.0 - (w == ID) for w in (NONE, ID) for s in range(8)}
    made = study_of(losses | {(0.1, ID, seed): None for seed in to_come})
    for seed in elsewhere:
        result = made.cells[Cell("caption", "PLATON", 0.1, NONE, seed)]["result"]
        result["processor"] = "another CPU"
    row, _ = study.comparisons(made, GROUP)
    assert (row["pairs"], row["verdict"]) == (pairs, "better" + so_far)


# --- page and figures


def test_the_page_of_the_repositorys_study_is_the_one_in_docs(embedded, tmp_path):
    page = (ROOT / "docs" / "study.md").read_text()
    (tmp_path / "study.md").write_text(page)
    assert study.report(embedded, tmp_path / "study.json").read_text() == page


def test_a_page_keeps_what_people_wrote_and_shows_the_figures(tmp_path):
    made = study_of(LOSSES | {(0.1, "1/ID", s): None for s in (0, 1)})
    page = tmp_path / "study.md"
    page.write_text(f"# Ours\n\nWords.\n{study.MARK}\nstale\n")
    assert study.report(made, tmp_path / "study.json") == page
    text = page.read_text()
    assert text.startswith(f"# Ours\n\nWords.\n{study.MARK}\n") and "stale" not in text
    assert "8 of 10 planned cells are done, in 2.0 hours of one process, on a CPU, torch 2" in text
    assert "| 80 % and 90 % | ID        | none    | loss ↓  | 2     | -1.0000 " in text
    # of seeds 0 and 1: mean 0.5, standard deviation sqrt(1 / 2)
    assert (
        "| ID        | 2     | 0.7000 ± 0.7071 | -0.7000 ± 0.7071 | 90.0%         | 70.0% " in text
    )
    for name in ("scores", "differences", "sparsity"):
        assert (tmp_path / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](study_{name}.png)" in text
    empty = study_of({(0.1, NONE, 0): None})
    assert "0 of 1 planned cells" in study.report(empty, tmp_path / "empty.json").read_text()


def test_figures_draw_means_differences_and_shares_and_say_what_is_what():
    made = study_of(LOSSES)
    loss, cider = study.plot_scores(made).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[80, pytest.approx(1.7)], [90, pytest.approx(1.6)]],
        [[80, pytest.approx(0.7)], [90, pytest.approx(0.6)]],
    ]
    assert len({(line.get_marker(), line.get_linestyle()) for line in loss.lines}) == 2
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [NONE, ID]
    assert cider.get_ylabel() == "validation CIDEr"
    to_none, to_shuffled, *_ = study.plot_differences(made).axes
    assert to_none.lines[0].get_xydata().tolist() == [[pytest.approx(-1), 1]] * 2
    assert to_none.get_xlabel() == "difference in validation loss"
    assert to_none.get_title() == "caption, PLATON, 80 % pruned, against none"
    five = study_of({(f, NONE, 0): 1.0 for f in (0.5, 0.4, 0.3, 0.2, 0.1)})
    figure = study.plot_sparsity(five)
    assert len(figure.axes) == 5
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == pytest.approx([90, 70, 50])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("vision layers", "language layers", "all layers")
    ]
