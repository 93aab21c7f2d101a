"""The study: weightings, cells and their file, statistics on hand-made numbers, a tiny grid."""

import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from torch.utils.data import Subset

import study
import train_nlvr
from configs import SCHEMAS, load_config
from engine import loop
from evaluation import metrics
from models import build_captioner, prunable_layers
from reports.runs import PRUNED_FILE
from studies.cells import (
    Runner,
    cache_images,
    cider,
    mean_loss,
    processor_name,
    with_references,
)
from studies.figures import plot_differences, plot_scores, plot_sparsity_shares
from studies.grid import (
    DENSE,
    Cell,
    Setting,
    Study,
    changing,
    grid,
    open_study,
    share,
    trainer_flags,
)
from studies.page import MARK, difference_tables, progress, report, verdict_table
from studies.presets import embedded, of_config
from studies.statistics import (
    BETTER,
    RULE,
    UNSEEN,
    WORSE,
    compare,
    comparisons,
    interval,
    machine,
    paired_differences,
    planned_pairs,
    pooled_differences,
    results_by_weighting,
)
from studies.weightings import ID, MEAN, NONE, SHUFFLED, WEIGHTINGS, WITHIN, weigh, write_weighting
from tests.runs import finish, make_scenes, processes, same, start, write_config
from utils import UserError

VISION = [f"visual_encoder.blocks.{i}.mlp.fc1" for i in range(6)]
LANGUAGE = [f"text_decoder.bert.encoder.layer.{i}.output.dense" for i in range(6)]
IDS = {name: float(i) for i, name in enumerate(VISION + LANGUAGE, start=1)}  # 1..6, 7..12


# --- weightings


def test_none_writes_no_file_and_id_is_the_profile(tmp_path):
    assert write_weighting(tmp_path / "none.json", NONE, IDS, 0) is None
    assert list(tmp_path.iterdir()) == []
    written = write_weighting(tmp_path / "id.json", ID, IDS, 0)
    assert json.loads(written.read_text()) == IDS


def test_a_shuffle_moves_the_same_numbers_between_all_layers_otherwise_for_each_seed():
    shuffled = [weigh(SHUFFLED, IDS, seed) for seed in range(4)]
    assert all(list(profile) == list(IDS) for profile in shuffled)
    assert all(sorted(profile.values()) == sorted(IDS.values()) for profile in shuffled)
    assert len({tuple(profile.values()) for profile in shuffled}) == 4
    assert weigh(SHUFFLED, IDS, 2) == shuffled[2]
    assert any(shuffled[0][name] > 6 for name in VISION)


def test_a_shuffle_within_modality_keeps_the_numbers_of_each():
    for seed in range(4):
        profile = weigh(WITHIN, IDS, seed)
        assert list(profile) == list(IDS)
        assert sorted(profile[name] for name in VISION) == [1, 2, 3, 4, 5, 6]
        assert sorted(profile[name] for name in LANGUAGE) == [7, 8, 9, 10, 11, 12]
        assert profile != IDS


def test_means_inverse_and_powers():
    assert weigh(MEAN, IDS, 0) == dict.fromkeys(VISION, 3.5) | dict.fromkeys(LANGUAGE, 9.5)
    assert weigh("1/ID", IDS, 0) == {name: 1 / value for name, value in IDS.items()}
    assert weigh("ID^2", IDS, 0) == {name: value**2 for name, value in IDS.items()}
    assert weigh("ID^-0.5", IDS, 0)[VISION[3]] == 0.5
    with pytest.raises(UserError, match="'id' is none of none, ID"):
        weigh("id", IDS, 0)


# --- cells and their file


def test_neighbours_in_a_grid_are_those_that_are_compared():
    cells = grid("caption", ["PLATON"], [0.1, 0.05], [NONE, ID], range(2))
    assert [(c.seed, c.remaining, c.weighting) for c in cells] == [
        *[(0, 0.1, NONE), (0, 0.1, ID), (0, 0.05, NONE), (0, 0.05, ID)],
        *[(1, 0.1, NONE), (1, 0.1, ID), (1, 0.05, NONE), (1, 0.05, ID)],
    ]


@pytest.mark.parametrize("parts", [2, 5, 330])
def test_shares_are_disjoint_and_whole(parts):
    cells = embedded().cells
    shares = [share(cells, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, cells))
    assert max(map(len, shares)) - min(map(len, shares)) <= 8  # cells of the largest block
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="give I/N"):
            share(cells, wrong)


def test_cells_that_are_compared_are_in_one_share():
    cells = grid("caption", ["PLATON"], [0.2, 0.1], WEIGHTINGS, range(3))
    for parts in (2, 3, 6):
        for part in range(1, parts + 1):
            own = share(cells, f"{part}/{parts}")
            assert len(own) == len(cells) / parts
            assert own == [c for c in cells if (c.remaining, c.seed) in blocks_of(own)]
    assert [len(share(cells, f"{part}/36")) for part in range(1, 37)] == [1] * 36


def blocks_of(cells: list[Cell]) -> set[tuple]:
    return {(cell.remaining, cell.seed) for cell in cells}


def test_a_study_comes_back_from_its_file_with_its_results(tmp_path):
    path = tmp_path / "study.json"
    cells = grid("caption", ["PLATON"], [0.1], WEIGHTINGS, [3])
    one = Study(
        {"caption": Setting("c.yaml", "p.json", 5, ["--lr", "1"])}, cells, notes={"rule": RULE}
    )
    one.write(path)
    with changing(path) as changed:
        changed.results[cells[1]] = {"loss": 1.25}
        changed.failures[cells[2]] = "the loss is nan"
    results, failures = {cells[1]: {"loss": 1.25}}, {cells[2]: "the loss is nan"}
    assert Study.read(path) == Study(one.settings, cells, results, failures, one.notes)
    records = json.loads(path.read_text())["cells"]
    assert records[1] == asdict(cells[1]) | {"result": {"loss": 1.25}}
    assert records[2] == asdict(cells[2]) | {"failure": "the loss is nan"}
    assert records[0] == asdict(cells[0])


def test_a_file_of_another_study_is_refused_and_one_alone_goes_on(tmp_path):
    path = tmp_path / "study.json"
    with pytest.raises(UserError, match="no study that study.py wrote"):
        open_study(path, None)
    one = Study({}, grid("nlvr", ["Taylor"], [0.1], [NONE, ID], [0]))
    open_study(path, one)
    with changing(path) as changed:
        changed.results[one.cells[0]] = {"loss": 1.0}
    open_study(path, one)
    open_study(path, None)
    assert Study.read(path).results == {one.cells[0]: {"loss": 1.0}}
    with pytest.raises(UserError, match="of another study"):
        open_study(path, Study({}, one.cells[:1]))
    with pytest.raises(UserError, match="of another study"):
        open_study(path, Study({"nlvr": Setting("c", "p")}, one.cells))


def add_results(path: Path, cells: list[Cell], together) -> None:
    together.wait()
    for cell in cells:
        with changing(path) as changed:
            changed.results[cell] = {"loss": float(cell.seed)}


def test_processes_that_add_results_at_once_lose_none(tmp_path):
    path, cells = tmp_path / "study.json", grid("nlvr", ["Taylor"], [0.1], [NONE, ID], range(10))
    Study({}, cells).write(path)
    together = processes.Barrier(2)
    adding = [
        processes.Process(target=add_results, args=(path, cells[half::2], together))
        for half in (0, 1)
    ]
    for process in adding:
        process.start()
    assert finish(adding) == [0, 0]
    assert Study.read(path).results == {cell: {"loss": float(cell.seed)} for cell in cells}


def test_a_study_keeps_the_digests_of_its_first_cells_and_refuses_others(tmp_path):
    one, path = Study({}, grid("nlvr", ["Taylor"], [0.1], [NONE], [0])), tmp_path / "study.json"
    one.write(path)
    assert "digests" not in path.read_text() and Study.read(path).digests == {}
    with changing(path) as changed:
        changed.keep_digests("nlvr", {"the config": "a", "the ID profile": "b"})
    kept = Study.read(path)
    assert kept.digests == {"nlvr": {"the config": "a", "the ID profile": "b"}}
    kept.keep_digests("nlvr", {"the config": "a", "the ID profile": "b"})
    kept.keep_digests("caption", {"the config": "c"})
    with pytest.raises(UserError, match="nlvr cell .* changed of the ID profile: put it back"):
        kept.keep_digests("nlvr", {"the config": "a", "the ID profile": "c"})


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seed=3", "seed"),
        ("--final_thr=0.5", "final_threshold"),
        ("--pruner_name=Taylor", "pruner_name"),
        ("--id_profile=q", "id_profile"),
        ("--model_dir=m", "model_dir"),
        ("--output_dir=o", "output_dir"),
        ("--config=c", "config"),
        ("--eval_epochs=1", "eval_epochs"),
        ("--useID", "useID"),
        ("--check", "check"),
        ("--evaluate", "evaluate"),
    ],
)
def test_flags_that_are_the_cells_own_are_refused(tmp_path, flag, named):
    file = tmp_path / "study.json"
    argv = ["--config=configs/nlvr_demo.yaml", "--id_profile=p", f"--file={file}", "--"]
    with pytest.raises(UserError, match=f"^--{named} after --: each cell has its own"):
        study.main(study.parse_args([*argv, "--max_steps=9", flag]))
    assert not file.exists()
    assert of_config(study.parse_args([*argv, "--max_steps=9"])).settings["nlvr"].flags == [
        "--max_steps=9"
    ]


def test_a_cells_own_flags_come_after_the_settings():
    setting = Setting("c", "p", flags=["--seed=1", "--pruner_name=Taylor", "--max_steps=9"])
    cell = Cell("nlvr", "Magnitude", 0.25, ID, 7)
    args = train_nlvr.parse_args(trainer_flags(cell, setting, Path("o"), Path("w")))
    assert (args.seed, args.pruner_name, args.final_threshold) == (7, "Magnitude", 0.25)
    assert (args.max_steps, args.id_profile, args.model_dir) == (9, "w", cell.name)


def test_flags_of_the_machine_are_those_that_were_given():
    assert study.machine_flags(study.parse_args(["--preset=embedded"])) == []
    args = study.parse_args(["--preset=embedded", "--device=cpu", "--num_workers=0"])
    assert study.machine_flags(args) == ["--device=cpu", "--num_workers=0"]


def test_the_time_left_is_of_cells_that_train():
    cells = [Cell("nlvr", DENSE, 1.0, NONE, 0), *grid("nlvr", ["Taylor"], [0.1], [NONE], range(3))]
    assert study.time_left([], cells) == "?"
    assert study.time_left([1800, 5400], cells) == "3:00"
    assert study.time_left([60], []) == "0:00"
    assert [study.hours(s) for s in (29, 31, 3599, 25 * 3600 + 300)] == [
        *("0:00", "0:01", "1:00", "25:05")
    ]


@pytest.mark.parametrize(
    ("argv", "expected"), [(["--preset=embedded"], 6), (["--file=study.json"], 1)]
)
def test_processes_are_as_many_as_cpus_for_small_models(monkeypatch, argv, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert study.default_processes(study.parse_args(argv)) == expected


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "what to study"),
        (
            ["--preset", "embedded", "--config", "configs/caption_demo.yaml"],
            "has a config of its own",
        ),
        (["--config", "configs/caption_demo.yaml"], "what to study"),
        (["--config=configs/retrieval_demo.yaml", "--id_profile=p"], "tasks caption, nlvr"),
        (["--config=configs/nlvr_demo.yaml", "--id_profile=p", "--weightings", "ID^x"], "ID\\^x"),
        (
            ["--config=configs/nlvr_demo.yaml", "--id_profile=p", "--remaining", ".1", "0.1"],
            "twice",
        ),
        (["--preset=embedded", "--", "--device=cpu"], "go with --config"),
    ],
)
def test_flags_that_describe_no_study_are_refused(tmp_path, argv, sentence):
    file = [] if not argv else ["--file", str(tmp_path / "study.json")]
    with pytest.raises(UserError, match=sentence):
        study.main(study.parse_args([*file, *argv]))
    assert not (tmp_path / "study.json").exists()


@pytest.mark.parametrize("wrong", [["--", "--devise=cpu"], ["--methods", "Platon"]])
def test_a_wrong_flag_of_the_training_script_is_told_before_the_file_is_written(
    tmp_path, capsys, wrong
):
    file = tmp_path / "study.json"
    argv = ["--config=configs/nlvr_demo.yaml", "--id_profile=p", f"--file={file}", *wrong]
    with pytest.raises(SystemExit):
        study.main(study.parse_args(argv))
    assert wrong[1] in capsys.readouterr().err
    assert not file.exists()


def test_a_command_starts_its_shares_and_a_share_runs_itself(monkeypatch, tmp_path):
    file = tmp_path / "study.json"
    Study({}, grid("nlvr", ["Taylor"], [0.1], [NONE, ID], [0]), notes={"rule": RULE}).write(file)
    started, ran = [], []

    class Started:
        def __init__(self, command, env):
            started.append((command, env["OMP_NUM_THREADS"]))

        def wait(self):
            return 0

    argv = ["study.py", "--processes", "2", "--file", str(file), "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(study.subprocess, "Popen", Started)
    monkeypatch.setattr(study, "run_cells", lambda path, args: ran.append((path, args.cells)))
    study.main(study.parse_args(argv[1:]))
    flags = [*argv, "--cells={}/2"]
    assert started == [
        ([sys.executable, *(flag.format(number) for flag in flags)], "1") for number in (1, 2)
    ]
    assert ran == []
    for command, _ in list(started):
        study.main(study.parse_args(command[2:]))
    assert ran == [(file, "1/2"), (file, "2/2")] and len(started) == 2


WAITS = """
import signal, sys, time
from pathlib import Path
here = Path(__file__).parent / sys.argv[-1].replace("/", "_")
def stop(number, frame):
    here.write_text(f"told {number}")
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
here.write_text("ready")
time.sleep(60)
"""


def test_a_signal_goes_on_to_the_shares(monkeypatch, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    monkeypatch.setattr(sys, "argv", [str(script)])
    said = [tmp_path / f"--cells={number}_2" for number in (1, 2)]

    def stop_when_ready():
        while not all(file.exists() and file.read_text() for file in said):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        study.run_side_by_side(2)
    assert ended.value.code == 75
    assert [file.read_text() for file in said] == [f"told {signal.SIGTERM.value}"] * 2


def test_a_signal_that_comes_while_shares_start_goes_on_to_all(monkeypatch):
    told = []

    class Started:
        def __init__(self, command, env):
            if command[-1] == "--cells=1/2":
                os.kill(os.getpid(), signal.SIGTERM)
            self.share = command[-1]

        def send_signal(self, number):
            told.append((self.share, number))

        def wait(self):
            return 75

    monkeypatch.setattr(sys, "argv", ["study.py"])
    monkeypatch.setattr(study.subprocess, "Popen", Started)
    with pytest.raises(SystemExit):
        study.run_side_by_side(2)
    assert told == [(f"--cells={number}/2", signal.SIGTERM) for number in (1, 2)]


def test_names_of_cells_differ_and_are_fit_for_folders():
    names = [cell.name for cell in embedded().cells]
    assert len(set(names)) == len(names)
    assert not any("/" in name or " " in name for name in names)


def test_the_embedded_preset_is_the_study_that_was_run():
    kept, preset = Study.read(Path("docs/study.json")), embedded()
    assert (kept.cells, kept.settings) == (preset.cells, preset.settings)
    assert (kept.notes, kept.pooled) == (preset.notes, preset.pooled)


def test_the_readmes_table_is_the_studys():
    page = verdict_table(Study.read(Path("docs/study.json")))
    of_readme = table_rows(Path("README.md").read_text().partition("### Does it help?")[2])
    head, _, *rows = [row for row in of_readme if len(row) == 10]
    assert head[0] == "task" and len(rows) == 10
    expected = [row[:9] + row[10:] for row in table_rows(page)]  # without the sign test
    assert all(row in expected for row in [head, *rows])


def table_rows(text: str) -> list[list[str]]:
    """The cells of the lines of tables in Markdown."""
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


# --- statistics


def test_verdicts_need_the_interval_and_the_signs():
    lower = [-0.02, -0.01, -0.03, -0.02, -0.01, -0.02]
    found = compare(lower, "loss")
    assert found.verdict == BETTER and compare(lower, "CIDEr").verdict == WORSE
    assert compare([-d for d in lower], "accuracy").verdict == BETTER
    assert found.pairs == 6 and found.mean == pytest.approx(-0.11 / 6)
    assert found.p == pytest.approx(2 / 2**6)  # all of one sign, either one
    assert -0.03 < found.low < found.mean < found.high < -0.01
    # five of one sign: 2 / 2^5 is above 0.05, whatever the interval
    assert compare(lower[:5], "loss").verdict == UNSEEN
    # seven of eight: 2 (1 + 8) / 2^8 = 0.07
    seven = compare([*lower, -0.01, 0.001], "loss")
    assert seven.p == pytest.approx(18 / 256) and seven.verdict == UNSEEN
    # all but one of 10 are positive, p = 2 (1 + 10) / 2^10, but one outlier makes the mean unsure
    outlier = compare([0.01] * 9 + [-0.2], "loss")
    assert outlier.p < 0.05 and outlier.low < 0 < outlier.high
    assert outlier.verdict == UNSEEN


def test_differences_of_zero_say_nothing():
    found = compare([0.0, 0.0, 0.0], "loss")
    assert (found.mean, found.p, found.verdict) == (0, 1, UNSEEN)
    # so do those of rounding: six of one sign would give p = 2 / 2^6
    assert compare([1e-17] * 6, "loss").p == 1
    # a tie is as a pair that is missing: five of one sign are left, 2 / 2^5
    tie = compare([-0.02, -0.01, -0.03, -0.02, -0.01, -1e-17], "loss")
    assert tie.p == pytest.approx(1 / 16) and tie.verdict == UNSEEN


@pytest.mark.parametrize("sign", [1, -1])
def test_a_verdict_is_not_against_most_of_its_signs(sign):
    # 16 of 20 fall a little (p = 0.012), but the mean of four that rise much is surely above zero
    found = compare([sign * d for d in [-0.001] * 16 + [1.0] * 4], "accuracy")
    assert found.p < 0.05 and min(sign * found.low, sign * found.high) > 0
    assert found.verdict == UNSEEN


def test_the_interval_of_two_values_lies_between_them_and_of_one_is_unknown():
    # resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert interval([0.0, 1.0]) == (0, 1)
    assert all(map(math.isnan, interval([1.0])))


MACHINE = {"processor": "a CPU", "torch": "2"}


def results_of(table: dict[tuple, float]) -> dict[Cell, dict]:
    return {
        Cell("caption", "PLATON", *key): {"loss": loss, "CIDEr": -loss, **MACHINE}
        for key, loss in table.items()
    }


def test_pairs_share_the_seed_and_the_fraction():
    results = results_of(
        {
            (0.1, NONE, 0): 1.0,
            (0.1, NONE, 1): 2.0,
            (0.1, NONE, 2): 9.0,
            (0.1, ID, 1): 2.5,
            (0.1, ID, 0): 0.75,
            (0.2, ID, 2): 9.0,
        }
    )
    found = paired_differences(results, ("caption", "PLATON", 0.1), ID, NONE)
    assert found == {"loss": {0: -0.25, 1: 0.5}, "CIDEr": {0: 0.25, 1: -0.5}}
    assert paired_differences(results, ("caption", "PLATON", 0.2), ID, NONE) == {}


@pytest.mark.parametrize("other", [{"processor": "another CPU"}, {"torch": "3"}, {"threads": 2}])
def test_pairs_are_of_one_machine(other):
    results = results_of({(0.1, w, s): 1.0 + (w == ID) for w in (NONE, ID) for s in range(2)})
    results[Cell("caption", "PLATON", 0.1, ID, 0)] |= other
    found = paired_differences(results, ("caption", "PLATON", 0.1), ID, NONE)
    assert found == {"loss": {1: 1.0}, "CIDEr": {1: -1.0}}


def test_results_that_tell_no_threads_are_of_one():
    assert machine(MACHINE) == machine(MACHINE | {"threads": 1}) == "a CPU, torch 2"
    assert machine(MACHINE | {"threads": 4}) == "a CPU, torch 2, 4 threads"


def test_means_are_over_the_seeds_that_all_weightings_have():
    losses = {(0.1, w, s): 1.0 + s for w in (NONE, ID) for s in range(3)} | {(0.1, "1/ID", 2): 9.0}
    results, group = results_of(losses), ("caption", "PLATON", 0.1)
    found = results_by_weighting(list(results), results, group)
    assert {w: [r["loss"] for r in of] for w, of in found.items()} == {
        **{NONE: [3.0], ID: [3.0]},
        "1/ID": [9.0],
    }
    del results[Cell(*group, "1/ID", 2)]
    found = results_by_weighting(list(results), results, group)
    assert {w: [r["loss"] for r in of] for w, of in found.items()} == {
        w: [1.0, 2.0, 3.0] for w in (NONE, ID)
    }
    results[Cell(*group, ID, 1)] |= {"processor": "another CPU"}
    for weighting in (NONE, ID):  # both elsewhere
        results[Cell(*group, weighting, 2)] |= {"processor": "another CPU"}
    found = results_by_weighting(list(results), results, group)
    assert {w: [r["loss"] for r in of] for w, of in found.items()} == {
        w: [1.0, 3.0] for w in (NONE, ID)
    }


def test_pairs_are_counted_that_the_cells_plan():
    cells = grid("caption", ["PLATON"], [0.2, 0.1], [NONE, ID], range(3))
    cells += grid("caption", ["PLATON"], [0.1], [NONE, ID], [7])
    task = ("caption", "PLATON")
    single = planned_pairs(cells, *task, [0.1], (ID, NONE))
    assert single == [[Cell(*task, 0.1, w, s) for w in (ID, NONE)] for s in (0, 1, 2, 7)]
    pooled = planned_pairs(cells, *task, [0.1, 0.2], (ID, NONE))
    assert [{cell.seed for cell in pair} for pair in pooled] == [{0}, {1}, {2}]
    assert set(pooled[1]) == {Cell(*task, f, w, 1) for f in (0.1, 0.2) for w in (ID, NONE)}
    assert planned_pairs(cells, *task, [0.1], (ID, SHUFFLED)) == []


def test_pooled_differences_are_of_seeds_with_all_fractions():
    results = results_of(
        {(f, w, s): f * s * (w == ID) for f in (0.25, 0.5) for w in (NONE, ID) for s in range(4)}
    )
    del results[Cell("caption", "PLATON", 0.5, NONE, 2)]
    found = pooled_differences(results, "caption", "PLATON", [0.25, 0.5], ID, NONE)
    assert found["loss"] == {0: 0, 1: 0.375, 3: 1.125}
    assert list(found) == ["loss", "CIDEr"]
    assert pooled_differences(results, "caption", "PLATON", [0.25, 0.1], ID, NONE) == {}
    assert pooled_differences(results, "caption", "PLATON", [], ID, NONE) == {}


def test_comparisons_are_with_the_baselines_and_of_ids_with_their_controls():
    assert comparisons([NONE, ID, SHUFFLED]) == [(ID, NONE), (SHUFFLED, NONE), (ID, SHUFFLED)]
    both = comparisons(list(WEIGHTINGS))
    assert both[-2:] == [(ID, WITHIN), (ID, MEAN)]
    assert (NONE, SHUFFLED) not in both and (SHUFFLED, SHUFFLED) not in both


# --- page and figures


@pytest.mark.parametrize(
    ("weighting", "change", "pairs", "so_far"),
    [
        (NONE, "elsewhere", "7 of 8, 1 lost", ""),
        (ID, "diverged", "7 of 8, 1 lost", ""),
        (ID, "to come", "7 of 8", " so far"),
        (ID, "both", "6 of 8, 1 lost", " so far"),
        (ID, "", "8", ""),
    ],
)
def test_pairs_that_are_lost_are_told_apart_from_those_to_come(weighting, change, pairs, so_far):
    losses = {(0.1, w, s): 1.0 - (w == ID) for w in (NONE, ID) for s in range(8)}
    results = results_of(losses)
    one = Study({}, list(results), results)
    cell = Cell("caption", "PLATON", 0.1, weighting, 7)
    if change == "elsewhere":
        results[cell] |= {"processor": "another CPU"}
    if change in ("to come", "diverged", "both"):
        del results[cell]
    if change == "both":
        cell = replace(cell, seed=0)
        del results[cell]
    if change in ("diverged", "both"):
        one.failures[cell] = "the loss is nan"
    (table,) = difference_tables(one)
    row = next(row for row in table_rows(table) if row[:3] == [ID, NONE, "loss ↓"])
    assert (row[3], row[-1]) == (pairs, BETTER + so_far)


@pytest.fixture
def reported(tmp_path) -> Path:
    """The file of a study with half of its results: two fractions, six seeds, ID better by 0.1."""
    cells = grid("caption", ["PLATON"], [0.2, 0.1], [NONE, ID, "1/ID"], range(6))
    sparsity = {"overall": 0.8, "vision": 0.9, "language": 0.7}
    results = {
        cell: {
            "loss": 1 + cell.seed - 0.25 * (cell.weighting == ID) + cell.remaining,
            "CIDEr": 4.0 + cell.seed,
            "sparsity": sparsity,
            "seconds": 900,
            **MACHINE,
        }
        for cell in cells
        if cell.weighting != "1/ID"
    }
    path = tmp_path / "study.json"
    Study({}, cells, results, notes={"rule": RULE}, pooled=[0.2, 0.1]).write(path)
    return path


def test_the_page_says_what_the_file_holds_and_keeps_what_people_wrote(reported):
    page = reported.with_suffix(".md")
    page.write_text(f"# Ours\n\nWords.\n{MARK}\nstale\n")
    assert report(reported) == page
    text = page.read_text()
    assert text.startswith(f"# Ours\n\nWords.\n{MARK}\n") and "stale" not in text
    assert "24 of 36 planned cells are done, in 6.0 hours of one process" in text
    assert "on a CPU, torch 2 (24 cells)" in text and RULE in text
    rows = table_rows(text)
    pooled = ["caption", "PLATON", "80 % and 90 %", ID, NONE]
    assert [*pooled, "loss ↓", "6", "-0.2500", "-0.2500 to -0.2500", "p 0.031", BETTER] in rows
    assert [
        *pooled,
        "CIDEr ↑",
        "6",
        "+0.0000",
        "+0.0000 to +0.0000",
        "p 1.000",
        UNSEEN,
    ] in rows
    # seeds 0 to 5: mean 2.5, standard deviation sqrt(3.5)
    spread = ["6", "3.7000 ± 1.8708", "6.5000 ± 1.8708", "90.0%", "70.0%"]
    assert [NONE, *spread] in rows
    for figure in ("scores", "differences", "sparsity"):
        with Image.open(reported.with_name(f"study_{figure}.png")) as image:
            image.verify()
        assert f"](study_{figure}.png)" in text


def test_a_study_without_results_has_a_page(tmp_path):
    Study({}, embedded().cells).write(tmp_path / "study.json")
    assert "0 of 330 planned" in report(tmp_path / "study.json").read_text()


def test_figures_draw_means_differences_and_shares(reported):
    study_ = Study.read(reported)
    loss, cider = plot_scores(study_)[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {
        NONE: [[80, pytest.approx(3.7)], [90, pytest.approx(3.6)]],
        ID: [[80, pytest.approx(3.45)], [90, pytest.approx(3.35)]],
    }
    assert cider.get_ylabel() == "validation CIDEr"
    to_none, to_shuffled, *_ = plot_differences(study_)[0].axes
    dots = to_none.lines[0].get_xydata()
    assert dots.tolist() == [[pytest.approx(-0.25), 1]] * 6
    assert to_none.get_title() == "caption, PLATON, 80 % pruned, against none"
    assert [t.get_text() for t in to_none.get_yticklabels()] == [NONE, ID]
    shares, _ = plot_sparsity_shares(study_)[0].axes
    assert [line.get_ydata()[0] for line in shares.lines[:2]] == pytest.approx([90, 70])


def test_panels_without_a_group_are_not_drawn():
    results = results_of({(f, NONE, 0): 1.0 for f in (0.5, 0.4, 0.3, 0.2, 0.1)})
    for result in results.values():
        result["sparsity"] = {"vision": 0.9, "language": 0.7}
    panels = plot_sparsity_shares(Study({}, list(results), results))[0].axes
    assert [panel.axison for panel in panels] == [True] * 5 + [False] * 3


# --- a tiny grid through the script


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a config of a tiny captioner, scenes, and IDs of its layers."""
    folder = tmp_path_factory.mktemp("study")
    config = write_config(folder / "tiny.yaml", make_scenes(folder / "data"), augment=False)
    layers = prunable_layers(build_captioner(load_config(config)))
    ids = {name: 1 + index % 5 for index, name in enumerate(layers)}
    (folder / "ids.json").write_text(json.dumps(ids))
    return folder


def flags(folder: Path, name: str) -> list[str]:
    """Of a study of two seeds and the dense start; one file of results a name."""
    return [
        *("--config", str(folder / "tiny.yaml"), "--id_profile", str(folder / "ids.json")),
        *("--file", str(folder / f"{name}.json"), "--output_dir", str(folder / name)),
        *("--weightings", NONE, SHUFFLED, "--seeds", "2", "--remaining", "0.5"),
        *("--validation", "4"),
        *("--", "--max_steps=6", "--warmup_steps=1", "--deltaT=2", "--device=cpu"),
        "--checkpoint_steps=2",
    ]


def scores(path: Path) -> dict[str, tuple]:
    results = Study.read(path).results
    return {cell.name: (r["loss"], r["CIDEr"], r["sparsity"]) for cell, r in results.items()}


def test_a_killed_study_goes_on_to_the_results_of_one_that_was_not(tiny):
    assert finish(start(flags(tiny, "whole"), script="study")) == [0]
    whole, file = scores(tiny / "whole.json"), tiny / "killed.json"
    plan = Study.read(tiny / "whole.json")
    assert list(whole) == [cell.name for cell in plan.cells] and len(whole) == 5

    (process,) = start(flags(tiny, "killed"), script="study")
    of_seed_1 = tiny / "killed" / plan.cells[3].name
    while process.is_alive() and not list(of_seed_1.glob("checkpoints/step_*.pt")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = Study.read(file).results
    assert plan.cells[3].seed == 1 and list(kept) == plan.cells[:3]
    assert finish(start(flags(tiny, "killed"), script="study")) == [0]
    assert scores(file) == whole
    assert "resumed from" in (of_seed_1 / "output.txt").read_text()
    after = Study.read(file).results
    assert {cell: after[cell] for cell in kept} == kept  # with their seconds: not run again
    weights = [*tiny.rglob("killed/**/*.safetensors"), *tiny.rglob("killed/**/checkpoints")]
    assert weights == []


def test_finished_cells_run_again_give_their_scores(tiny, capsys):
    if not (tiny / "whole.json").exists():
        assert finish(start(flags(tiny, "whole"), script="study")) == [0]
    before = (tiny / "whole.json").read_text()
    again = ["--file", str(tiny / "whole.json"), "--output_dir", str(tiny / "whole"), "--again=2"]
    study.main(study.parse_args(again))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        Study.read(tiny / "whole.json").cells[place].name for place in (0, 2)
    ]
    assert all("loss +0.00e+00  CIDEr +0.00e+00" in line for line in lines)
    assert (tiny / "whole.json").read_text() == before


def test_a_cell_that_diverges_is_kept_as_such_and_the_others_go_on(tiny, monkeypatch, capsys):
    cells = grid("caption", ["PLATON"], [0.5], [NONE, ID, SHUFFLED], [0])
    file = tiny / "diverging.json"
    Study({}, cells).write(file)
    tried = []

    def run_cell(self, cell):
        tried.append(cell)
        if cell.weighting == ID:
            raise FloatingPointError("the loss is nan at step 3")
        return {"loss": 1.0, "CIDEr": 2.0, "seconds": 1, **MACHINE}

    monkeypatch.setattr(Runner, "run_cell", run_cell)
    argv = ["--file", str(file), "--cells=1/1", f"--output_dir={tiny}"]
    for _ in range(2):
        study.main(study.parse_args(argv))
    assert tried == cells
    found = Study.read(file)
    assert list(found.results) == [cells[0], cells[2]]
    assert found.failures == {cells[1]: "the loss is nan at step 3"}
    assert f"{cells[1].name}  diverged: the loss is nan" in capsys.readouterr().out
    assert f"- {cells[1].name}: the loss is nan at step 3" in progress(found)


def test_cells_are_pruned_as_asked_and_by_their_weighting(tiny):
    found = scores(tiny / "whole.json")
    losses = [loss for loss, _, _ in found.values()]
    assert len(set(losses)) == 5
    for name, (loss, _, sparsity) in found.items():
        # the k-th score, which stays, is one of more than 10,000
        assert DENSE in name or sparsity["overall"] == pytest.approx(0.5, abs=1e-4)
        assert math.isfinite(loss)


# --- what a cell is made of


@pytest.fixture
def runner(tiny, tmp_path):
    setting = Setting(
        str(tiny / "tiny.yaml"),
        str(tiny / "ids.json"),
        4,
        ["--max_steps=6", "--warmup_steps=1", "--deltaT=2", "--device=cpu", "--num_workers=0"],
    )
    return Runner(Study({"caption": setting}, []), tmp_path)


def prepare(runner: Runner, cell: Cell):
    return runner.prepare(cell, runner.trainer_args(cell))


def test_the_second_cell_starts_from_the_same_weights_with_its_own_seed_and_weighting(runner, tiny):
    ids = json.loads((tiny / "ids.json").read_text())
    run, bench = prepare(runner, Cell("caption", "PLATON", 0.5, NONE, 3))
    start = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    assert run.layer_id is None and bench.train_set.seed == 3
    assert (run.args.seed, run.args.final_threshold, run.args.pruner_name) == (3, 0.5, "PLATON")
    for parameter in bench.model.parameters():
        parameter.data.zero_()
    run, again = prepare(runner, Cell("caption", "Magnitude", 0.25, SHUFFLED, 7))
    assert again is bench and same(bench.model.state_dict(), start)
    assert run.layer_id == weigh(SHUFFLED, ids, 7) and bench.train_set.seed == 7
    assert (run.args.seed, run.args.final_threshold, run.args.pruner_name) == (7, 0.25, "Magnitude")
    assert run.args.max_steps == 6 and len(bench.validation) == 4


def test_cells_start_from_the_same_weights_whichever_runs_first(runner):
    first, second = (Cell("caption", "PLATON", 0.5, NONE, seed) for seed in (0, 1))
    prepare(runner, first)
    _, bench = prepare(runner, second)
    run, restarted = prepare(Runner(runner.study, runner.folder), second)
    assert same(restarted.model.state_dict(), bench.model.state_dict())
    assert run.args.seed == 1 and restarted.train_set.seed == 1


def test_a_cell_that_diverges_leaves_nothing_to_the_next(runner, tmp_path, monkeypatch):
    cells = grid("caption", ["PLATON"], [0.5], [NONE, SHUFFLED], [0])
    with monkeypatch.context() as diverging:
        diverging.setattr(loop, "move", lambda part, _: (part[0] * math.nan, *part[1:]))
        with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
            runner.run_cell(cells[0])
    assert any(p.grad.isnan().any() for p in runner.benches["caption"].model.parameters())
    after, fresh = (
        of.run_cell(cells[1]) for of in (runner, Runner(runner.study, tmp_path / "fresh"))
    )
    assert [after[s] for s in ("loss", "CIDEr")] == [fresh[s] for s in ("loss", "CIDEr")]
    assert math.isfinite(after["loss"]) and after["sparsity"] == fresh["sparsity"]


def test_images_are_decoded_once_unless_each_look_at_one_is_another(runner):
    run, bench = prepare(runner, Cell("caption", "PLATON", 0.5, NONE, 0))
    train_set, test = bench.train_set, bench.splits["test"]
    path = train_set.image_paths(0)[0]
    del train_set.open, test.open
    cache_images(replace(run, config=run.config | {"augment": True}), train_set, test)
    assert train_set.open(path) is not train_set.open(path)
    assert test.open(path) is test.open(path)
    cache_images(run, train_set)
    assert train_set.open(path) is train_set.open(path)


def test_every_reference_of_a_validation_image_counts_in_the_loss(runner):
    run, bench = prepare(runner, Cell("caption", "PLATON", 0.5, NONE, 0))
    first, second = (bench.splits["val"].records[i] for i in range(2))
    references = {first["image_id"]: ["a", "b"], second["image_id"]: ["c"]}
    pairs = with_references(run, Subset(bench.splits["val"], range(2)), references)
    assert [(r["image"], r["caption"]) for r in pairs.records] == [
        *[(first["image"], "a"), (first["image"], "b")],
        (second["image"], "c"),
    ]
    assert pairs[2][1] == "a picture of c"


def test_the_mean_loss_weighs_batches_by_their_terms():
    class Model:
        def prepare(self, loss, terms):
            return (loss,), int(terms)

        def __call__(self, loss):
            return loss.squeeze()

    batches = [(torch.tensor([1.0]), 1), (torch.tensor([4.0]), 2)]
    assert mean_loss(Model(), batches, torch.device("cpu")) == pytest.approx(9 / 3)


def test_cider_is_of_the_tokens_of_the_python_tokenizer():
    references = {7: ["A red ring.", "one ring"], 8: ["two blue squares"], 9: ["a cat"]}
    results = [
        {"image_id": 7, "caption": "a red ring"},
        {"image_id": 8, "caption": "Two blue squares!"},
        {"image_id": 9, "caption": "the dog"},
    ]
    tokens = {7: ["a red ring", "one ring"], 8: ["two blue squares"], 9: ["a cat"]}
    captions = {7: ["a red ring"], 8: ["two blue squares"], 9: ["the dog"]}
    assert cider(results, references) == metrics.cider(tokens, captions)["scores"]["CIDEr"] > 0


def test_statements_are_scored_by_loss_and_accuracy(tiny, tmp_path):
    config = load_config(str(tiny / "tiny.yaml"))
    keys = SCHEMAS["nlvr"].keys() & config.keys()
    with open(tmp_path / "nlvr.yaml", "w") as file:
        YAML().dump({key: config[key] for key in keys}, file)
    setting = Setting(str(tmp_path / "nlvr.yaml"), str(tiny / "ids.json"), 4, ["--device=cpu"])
    one = Study({"nlvr": setting}, [])
    found = Runner(one, tmp_path).run_cell(Cell("nlvr", DENSE, 1.0, NONE, 0))
    assert found["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    # an untrained head's logits are near each other: ln 2 and little more
    assert 0.6 < found["loss"] < 0.8
    assert found["seconds"] > 0 and found["torch"] == torch.__version__
    assert found["processor"] == processor_name(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()


def test_a_processor_is_its_model_and_the_instructions_in_use(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    lines = "processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Other\n"
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    assert processor_name(torch.device("cpu")) == "Some CPU, AVX9"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor: 0\n")  # as ARM's
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert processor_name(torch.device("cpu")) == "arm64, AVX9"


def test_a_cell_that_another_machine_began_starts_anew(runner, monkeypatch):
    cell, found = Cell("caption", "PLATON", 0.5, NONE, 0), []

    def train_and_stop(run, *_):
        checkpoint = run.checkpoints / "step_00000002.pt"
        found.append(checkpoint.exists())
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        raise SystemExit(75)

    monkeypatch.setattr("studies.cells.train", train_and_stop)
    one = {"processor": "a CPU", "torch": "2", "threads": 1}
    two = one | {"threads": 2}
    for own in (one, one, two, two, one):
        monkeypatch.setattr("studies.cells.machine_of", lambda device, own=own: own)
        with pytest.raises(SystemExit):
            runner.run_cell(cell)
    assert found == [False, True, False, True, False]


def test_cells_of_other_content_do_not_run(tiny, tmp_path):
    config = YAML(typ="safe").load(tiny / "tiny.yaml")
    ids = json.loads((tiny / "ids.json").read_text())
    weights = build_captioner(load_config(str(tiny / "tiny.yaml"))).state_dict()
    paths = [tmp_path / name for name in ("tiny.yaml", "ids.json", "start.pth")]
    setting = Setting(*map(str, paths[:2]), 4, ["--max_steps=6", "--device=cpu"])
    one, cell = Study({"caption": setting}, []), Cell("caption", DENSE, 1.0, NONE, 0)

    def begin(config, ids, weights):
        YAML().dump(config | {"pretrained": str(paths[2])}, paths[0])
        paths[1].write_text(json.dumps(ids))
        torch.save(weights, paths[2])
        prepare(Runner(one, tmp_path), cell)

    begin(config, ids, weights)
    shutil.copytree(config["ann_root"], tmp_path / "annotation")
    elsewhere = {key: str(tmp_path / "annotation") for key in ("ann_root", "coco_gt_root")}
    begin(config | elsewhere | {"num_workers": 1}, ids, weights)  # nothing that results depend on
    first_id, first_weight = next(iter(ids)), next(iter(weights))
    for named, changed in {
        "the config": (config | {"num_beams": 2}, ids, weights),
        "the ID profile": (config, ids | {first_id: 9}, weights),
        "the starting weights": (config, ids, weights | {first_weight: weights[first_weight] + 1}),
    }.items():
        with pytest.raises(UserError, match=f"changed of {named}[^,]*: put it back"):
            begin(*changed)
    file = tmp_path / "annotation" / "coco_karpathy_val_gt.json"
    truth = json.loads(file.read_text())
    truth["annotations"][0]["caption"] = "nothing"
    file.write_text(json.dumps(truth))
    with pytest.raises(UserError, match="changed of the annotations: put it back"):
        begin(config | elsewhere, ids, weights)


def test_a_study_keeps_what_its_cells_ran_with_and_removes_what_they_left(tiny):
    """After a kill between a result and the removal of its cell's weights."""
    folder, file = tiny / "left", tiny / "left.json"
    argv = flags(tiny, "left")
    argv[argv.index("--seeds") + 1] = "1"
    argv.insert(argv.index("--seeds"), "--cells=1/3")  # the dense start
    study.main(study.parse_args(argv))
    kept = Study.read(file)
    (cell,) = kept.results
    assert list(kept.digests) == ["caption"]
    assert {name.split()[1] for name in kept.digests["caption"]} == {
        *("config", "ID", "annotations", "tokenizer")
    }
    (folder / cell.name / "checkpoints").mkdir()
    (folder / cell.name / "checkpoints" / "step_00000002.pt").touch()
    (folder / cell.name / PRUNED_FILE).touch()
    study.main(study.parse_args(argv))
    assert not (folder / cell.name / "checkpoints").exists()
    assert not (folder / cell.name / PRUNED_FILE).exists()
    with changing(file) as changed:
        changed.digests["caption"]["the config of before"] = "another"
    argv[argv.index("--cells=1/3")] = "--cells=2/3"
    with pytest.raises(UserError, match="changed of the config of before"):
        study.main(study.parse_args(argv))
    assert Study.read(file).results == kept.results
