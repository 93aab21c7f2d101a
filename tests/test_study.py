"""The study: weightings, cells as commands, statistics on hand-made numbers, page and figures."""

import json
import os
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
from dimension.profile import load_profile
from engine.processes import machine_of
from models import build_captioner, prunable_layers
from study import ID, MEAN, NONE, SHUFFLED, UNSEEN, WITHIN, Cell, Study, weigh
from tests.runs import write_config
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
VISION = [f"visual_encoder.blocks.{i}.mlp.fc1" for i in range(6)]
LANGUAGE = [f"text_decoder.bert.encoder.layer.{i}.output.dense" for i in range(6)]
IDS = {name: float(i) for i, name in enumerate(VISION + LANGUAGE, start=1)}  # 1..6, 7..12
MACHINE = {"processor": "a CPU", "torch": "2"}
GROUP = ("caption", "PLATON", (0.1,))
FALL = [-0.02, -0.01, -0.03, -0.02, -0.01, -0.02]
CONFIG = ["--config=configs/nlvr_demo.yaml", "--id_profile=p"]
SETTING = {"config": "c", "id_profile": "p", "validation": 5, "flags": []}


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
    cells, sparsity = {}, {"overall": 0.8, "vision": 0.9, "language": 0.7}
    for key, loss in losses.items():
        result = {"loss": loss, "CIDEr": 0.0, "seconds": 900.0, "sparsity": sparsity, **MACHINE}
        cells[Cell("caption", "PLATON", *key)] = {} if loss is None else {"result": result}
    return Study({"rule": "The rule."}, [0.2, 0.1], {}, cells)


# --- weightings


def test_shuffles_move_the_same_numbers_otherwise_for_each_seed():
    shuffled = [weigh(SHUFFLED, IDS, seed) for seed in range(4)]
    assert all(sorted(profile.values()) == sorted(IDS.values()) for profile in shuffled)
    assert len({tuple(profile[name] for name in IDS) for profile in shuffled}) == 4
    assert weigh(SHUFFLED, IDS, 2) == shuffled[2]
    assert any(shuffled[0][name] > 6 for name in VISION)
    within = weigh(WITHIN, IDS, 0)
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
    assert len(embedded.results) == 350
    names = [cell.name for cell in embedded.cells]
    assert len(set(names)) == 350 and not any("/" in name or " " in name for name in names)
    study.write_study(embedded, tmp_path / "study.json")
    assert (tmp_path / "study.json").read_text() == (ROOT / "docs" / "study.json").read_text()


def test_a_config_is_compared_with_all_controls():
    new = study.planned(parse(*CONFIG, "--", "--max_steps=9"))
    setting = {"config": "configs/nlvr_demo.yaml", "id_profile": "p", "validation": 0}
    assert new.settings == {"nlvr": setting | {"flags": ["--max_steps=9"]}}
    first, *cells = new.cells
    assert first == Cell("nlvr", "dense", 1.0, NONE, 0) and len(cells) == 8 * 2 * 6
    assert [cell.weighting for cell in cells[:6]] == [NONE, ID, SHUFFLED, WITHIN, MEAN, "1/ID"]


def test_shares_hold_what_is_compared_and_are_disjoint_and_whole(embedded):
    cells = list(embedded.cells)
    shares = [study.share(cells, f"{part}/5") for part in range(1, 6)]
    assert sorted(sum(shares, [])) == sorted(cells)
    for own in shares:
        blocks = {cell._replace(weighting="") for cell in own}
        assert own == [cell for cell in cells if cell._replace(weighting="") in blocks]
        assert 50 < len(own) < 80


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "what to study"),
        (["--preset=embedded", *CONFIG], "has a config of its own"),
        (["--preset=embedded", "--", "--device=cpu"], "go with --config"),
        (["--config=configs/retrieval_demo.yaml", "--id_profile=p"], "tasks caption, nlvr"),
        ([*CONFIG, "--", "--devise=cpu"], "--devise"),
        ([*CONFIG, "--", "--final_thr=0.5"], "--final_threshold after --: each cell"),
        ([*CONFIG, "--", "--useID"], "--useID after --"),
        (["--file=README.md"], "README.md is no study"),
        ([*CONFIG, "--file=docs/study.json"], "is of another study: its settings"),
        (["--file=docs/study.json", "--cells=3/2"], "give I/N"),
        (["--file=docs/study.json", "--cells=a/b"], "give I/N"),
    ],
)
def test_flags_that_describe_no_study_are_refused(argv, sentence, capsys):
    with pytest.raises((UserError, SystemExit)) as refused:
        args = parse(*argv)
        study.share(list(study.open_study(args).cells), args.cells or "1/1")
    assert sentence in str(refused.value) + capsys.readouterr().err


def test_a_cell_is_a_training_and_an_evaluation_command(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    setting = SETTING | {"id_profile": tmp_path / "ids.json"}
    setting["flags"] = ["--seed=1", "--max_steps=9", "--compile", "--device=cpu"]
    args = parse("--preset=embedded", "--output_dir", tmp_path)
    cell = Cell("nlvr", "Magnitude", 0.25, SHUFFLED, 7)
    training, evaluation = study.commands(cell, setting, args)
    assert training[1] == evaluation[1] == str(ROOT / "train_nlvr.py")
    trained, scored = (train_nlvr.parse_args(command[2:]) for command in (training, evaluation))
    assert (trained.seed, trained.pruner_name, trained.final_threshold) == (7, "Magnitude", 0.25)
    assert (trained.max_steps, trained.eval_epochs, trained.config) == (9, 0, "c")
    assert json.loads(Path(trained.id_profile).read_text()) == weigh(SHUFFLED, IDS, 7)
    assert (scored.evaluate, scored.split, scored.eval_samples) == (True, "dev", 5)
    assert trained.compile and not scored.compile  # which an evaluation refuses
    assert scored.pruned == str(tmp_path / cell.name) and scored.device == "cpu"
    (tmp_path / "ids_one_length.json").write_text('{"a": 3.0}')  # beside that of the IDs
    training, _ = study.commands(cell._replace(weighting="ID, one length"), setting, args)
    assert load_profile(train_nlvr.parse_args(training[2:]).id_profile) == {"a": 3.0}
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
    sparsity = {"overall": 0.8, "by_modality": {"vision": 0.9, "language": 0.7}}
    (folder / "sparsity.json").write_text(json.dumps(sparsity))
elif flags["init_lr"] == "9":
    sys.exit("the loss is nan")
elif flags["init_lr"] == "0":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waits").touch()
    time.sleep(60)
    print("it slept enough")
else:
    print("trained", flush=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "pruned.safetensors").touch()
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with a study of five cells, whose training script is SCRIPT."""
    (tmp_path / "train_nlvr.py").write_text(SCRIPT)
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    keys = [(w, seed) for seed in range(2) for w in (NONE, SHUFFLED)]
    cells = [Cell("nlvr", "dense", 1.0, NONE, 0), *(Cell("nlvr", "PLATON", 0.1, *k) for k in keys)]
    study.write_study(Study({}, [0.1], {"nlvr": SETTING}, {c: {} for c in cells}), tmp_path / "s")
    return tmp_path


def run(folder, *flags, lr=1):
    """The study's command; returns what its file holds afterwards."""
    content = json.loads((folder / "s").read_text())
    content["settings"]["nlvr"]["flags"] = [f"--init_lr={lr}", "--device=cpu"]
    content["settings"]["nlvr"]["id_profile"] = str(folder / "ids.json")
    (folder / "s").write_text(json.dumps(content))
    args = parse("--file", folder / "s", "--output_dir", folder / "out", *flags)
    study.main(args)
    return study.open_study(args)


def test_shares_run_their_cells_once_and_a_report_collects_their_folders(scripts, capsys):
    for part in ("1/2", "2/2", "2/2"):
        run(scripts, "--cells", part)
    assert '"result"' not in (scripts / "s").read_text()
    found = run(scripts, "--report")
    assert [result["loss"] for result in found.results.values()] == [0, 1, 1, 2, 2]
    assert capsys.readouterr().out.count("accuracy 0.5000") == 5
    cell = list(found.cells)[2]
    result = json.loads((scripts / "s").read_text())["cells"][2]["result"]
    assert result["sparsity"] == {"overall": 0.8, "vision": 0.9, "language": 0.7}
    assert result == result | machine_of(torch.device("cpu")) and result["seconds"] >= 0
    assert (scripts / "out" / cell.name / "output.txt").read_text() == "trained\n"
    left = {path.name for path in (scripts / "out" / cell.name).iterdir()}
    assert left == {"cell.json", "output.txt", "results", "sparsity.json", "weighting.json"}
    assert "5 of 5 planned cells" in (scripts / "s.md").read_text()


def test_a_cell_that_another_machine_began_starts_anew(scripts):
    args = parse("--file=f", "--output_dir", scripts / "out")
    cell = Cell("nlvr", "PLATON", 0.1, NONE, 1)
    setting = SETTING | {"flags": ["--init_lr=1", "--device=cpu"]}
    folder = scripts / "out" / cell.name
    for machine, left in ((MACHINE, False), (machine_of(torch.device("cpu")), True)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cell.json").write_text(json.dumps({"setting": setting, "machine": machine}))
        (folder / "begun").touch()
        study.run_cell(cell, setting, args)
        assert (folder / "begun").exists() == left


def test_a_command_that_fails_ends_the_study_with_its_last_line(scripts):
    with pytest.raises(UserError, match="nlvr-PLATON-0.1-none-0 failed: the loss is nan .*out"):
        run(scripts, lr=9)


def test_a_folder_of_another_study_is_refused(scripts):
    run(scripts, "--cells=1/1")
    with pytest.raises(UserError, match="cell.json is of another study: choose another --output"):
        run(scripts, "--report", lr=2)


def test_a_signal_stops_the_commands_that_run(scripts):
    waiting = [scripts / "out" / f"nlvr-PLATON-0.1-{w}-0" / "waits" for w in (NONE, SHUFFLED)]

    def stop_when_they_wait():
        while not all(file.exists() for file in waiting):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_they_wait, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run(scripts, "--processes=2", lr=0)
    assert ended.value.code == 75
    assert not list((scripts / "out").glob("*-1"))
    assert [file.with_name("output.txt").read_text() for file in waiting] == ["", ""]


def test_a_cell_through_the_trainers_themselves(tmp_path, scenes):
    """The loss is of the first samples; CIDEr of the tokenizer in Python; IDs reach the pruner."""
    config = write_config(tmp_path / "c.yaml", scenes, augment=False)
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
    file = tmp_path / cell.name / "results" / "val_images.json"
    images = json.loads(file.read_text())
    assert len(images) == 4
    images[0]["caption"], images[1]["caption"] = "A red; ring.", images[1]["references"][0]
    file.write_text(json.dumps(images))
    assert study.scores(cell, tmp_path / cell.name)["CIDEr"] > found["CIDEr"] + 1


def test_a_machine_is_its_processor_with_the_instructions_in_use(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "model name\t: A CPU\nmodel name\t: B\n")
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    assert machine_of(torch.device("cpu")) == versions | {"processor": "A CPU, AVX9"}


# --- statistics


@pytest.mark.parametrize(
    ("differences", "score", "p", "verdict"),
    [
        (FALL, "loss", 2 / 2**6, "better"),
        (FALL, "CIDEr", 2 / 2**6, "worse"),
        ([-x for x in FALL], "accuracy", 2 / 2**6, "better"),
        (FALL[:5], "loss", 2 / 2**5, UNSEEN),  # whatever the interval
        ([*FALL, -0.01, 0.001], "loss", 2 * (1 + 8) / 2**8, UNSEEN),
        # one outlier makes the mean unsure
        ([0.01] * 9 + [-0.2], "loss", 2 * (1 + 10) / 2**10, UNSEEN),
        # 16 of 20 fall a little, but the mean of four that rise much is above zero
        ([-0.001] * 16 + [1.0] * 4, "accuracy", pytest.approx(0.0118, abs=1e-4), UNSEEN),
        # ties and rounding have no sign
        ([0.0, 1e-17, -1e-17], "loss", 1, UNSEEN),
        ([*FALL[:5], -1e-17], "loss", 2 / 2**5, UNSEEN),
    ],
)
def test_verdicts_need_the_interval_and_the_signs(differences, score, p, verdict):
    assert study.compare(np.array(differences), score)[2:] == (p, verdict)


def test_pairs_share_seed_fractions_and_machine():
    both = GROUP[:2] + ((0.2, 0.1),)
    losses = {(f, w, s): f * s * (w == ID) for f in both[2] for w in (NONE, ID) for s in range(6)}
    made = study_of(losses | {(0.1, NONE, 4): None, (0.1, ID, 9): 1.0})
    others = [{"processor": "B"}, {"torch": "3"}, {"threads": 2}, {"threads": 1}]
    for seed, other in enumerate(others):
        made.cells[Cell("caption", "PLATON", 0.1, ID, seed)]["result"] |= other
    pair = study.matched(made, both, "loss", [ID, NONE])  # seeds 3 and 5
    assert pair[ID] - pair[NONE] == pytest.approx(np.array([[0.6, 0.3], [1.0, 0.5]]))
    assert len(study.matched(made, GROUP[:2] + ((0.2,),), "loss")[ID]) == 6
    assert study.matched(made, GROUP, "loss", [ID, SHUFFLED]) == {}
    assert study.matched(made, GROUP[:2] + ((),), "loss") == {}


def test_pairs_of_which_some_are_lost_or_to_come():
    losses = {(0.1, w, s): 1.0 - (w == ID) for w in (NONE, ID) for s in range(8)}
    made = study_of(losses)
    made.cells[Cell(*GROUP[:2], 0.1, NONE, 1)]["result"]["processor"] = "another"
    to_come = study_of(losses | {(0.1, ID, 0): None})
    for found, verdict in ((made, "better"), (to_come, "better so far")):
        row, _ = study.comparisons(found, GROUP)
        assert (row["pairs"], row["verdict"]) == ("7 of 8", verdict)


# --- page and figures


def test_the_page_of_the_repositorys_study_is_the_one_in_docs(embedded, tmp_path):
    """What people wrote above the mark stays, what was below goes."""
    page = (ROOT / "docs" / "study.md").read_text()
    (tmp_path / "study.md").write_text(f"{page.split(study.MARK)[0]}{study.MARK}\nstale\n")
    assert study.report(embedded, tmp_path / "study.json").read_text() == page
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"study_scores.png", "study_differences.png"}


def test_figures_draw_means_differences_and_shares():
    losses = {(f, w, s): f + s - (w == ID) for f in (0.2, 0.1) for w in (NONE, ID) for s in (0, 1)}
    scores, differences = (
        plot(study_of(losses)).axes[0].lines for plot in (study.plot_scores, study.plot_differences)
    )
    assert [line.get_ydata().tolist() for line in scores] == [
        pytest.approx([0.7, 0.6]),
        pytest.approx([-0.3, -0.4]),
    ]
    assert differences[0].get_xydata().tolist() == [[pytest.approx(-1), 1]] * 2
