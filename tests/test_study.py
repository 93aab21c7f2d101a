"""The study: weightings, cells and their file, statistics on hand-made numbers, a tiny grid."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from torch.utils.data import Subset

import study
from configs import SCHEMAS, load_config
from evaluation import metrics
from models import build_captioner, prunable_layers
from studies.cells import Runner, cache_images, cider, mean_loss, with_references
from studies.figures import plot_differences, plot_scores, plot_sparsity_shares
from studies.grid import DENSE, Cell, Setting, Study, changing, grid, open_study, share
from studies.page import MARK, report
from studies.presets import embedded
from studies.statistics import (
    BETTER,
    RULE,
    UNSEEN,
    WORSE,
    compare,
    comparisons,
    interval,
    paired_differences,
    pooled_differences,
)
from studies.weightings import ID, MEAN, NONE, SHUFFLED, WEIGHTINGS, WITHIN, weigh, write_weighting
from tests.runs import finish, make_scenes, same, start, write_config
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


def test_shares_are_disjoint_and_whole():
    cells = embedded().cells
    shares = [share(cells, f"{i}/5") for i in range(1, 6)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, cells))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="give I/N"):
            share(cells, wrong)


def test_a_study_comes_back_from_its_file_with_its_results(tmp_path):
    path = tmp_path / "study.json"
    cells = grid("caption", ["PLATON"], [0.1], WEIGHTINGS, [3])
    one = Study(
        {"caption": Setting("c.yaml", "p.json", 5, ["--lr", "1"])}, cells, {}, {"rule": RULE}
    )
    one.write(path)
    with changing(path) as changed:
        changed.results[cells[1]] = {"loss": 1.25}
    again = Study.read(path)
    assert again == Study(one.settings, cells, {cells[1]: {"loss": 1.25}}, one.notes)
    records = json.loads(path.read_text())["cells"]
    assert records[1] == asdict(cells[1]) | {"result": {"loss": 1.25}}
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


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "what to study"),
        (["--config", "configs/caption_demo.yaml"], "what to study"),
        (["--config=configs/retrieval_demo.yaml", "--id_profile=p"], "tasks caption, nlvr"),
        (["--config=configs/nlvr_demo.yaml", "--id_profile=p", "--weightings", "ID^x"], "ID\\^x"),
    ],
)
def test_flags_that_describe_no_study_are_refused(tmp_path, argv, sentence):
    file = [] if not argv else ["--file", str(tmp_path / "study.json")]
    with pytest.raises(UserError, match=sentence):
        study.main(study.parse_args([*file, *argv]))
    assert not (tmp_path / "study.json").exists()


def test_a_command_starts_its_shares_and_a_share_runs_itself(monkeypatch, tmp_path):
    file = tmp_path / "study.json"
    Study({}, grid("nlvr", ["Taylor"], [0.1], [NONE, ID], [0]), notes={"rule": RULE}).write(file)
    started, ran = [], []

    class Started:
        def __init__(self, command, env):
            started.append((command, env["OMP_NUM_THREADS"]))

        def wait(self):
            return 0

    argv = ["study.py", "--processes", "2", "--file", str(file), "--", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(study.subprocess, "Popen", Started)
    monkeypatch.setattr(study, "run_cells", lambda path, folder, part: ran.append((path, part)))
    study.main(study.parse_args(argv[1:]))
    flags = [*argv[:-2], "--cells={}/2", *argv[-2:]]
    assert started == [
        ([sys.executable, *(flag.format(number) for flag in flags)], "1") for number in (1, 2)
    ]
    assert ran == []
    for command, _ in list(started):
        study.main(study.parse_args(command[2:]))
    assert ran == [(file, "1/2"), (file, "2/2")] and len(started) == 2


def test_names_of_cells_differ_and_are_fit_for_folders():
    names = [cell.name for cell in embedded().cells]
    assert len(set(names)) == len(names)
    assert not any("/" in name or " " in name for name in names)


def test_the_embedded_preset_is_the_study_that_was_run():
    kept, preset = Study.read(Path("docs/study.json")), embedded()
    assert (kept.cells, kept.settings) == (preset.cells, preset.settings)
    assert (kept.notes, kept.pooled) == (preset.notes, preset.pooled)


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


def test_the_interval_of_two_values_lies_between_them_and_of_one_is_unknown():
    # resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert interval([0.0, 1.0]) == (0, 1)
    assert all(map(math.isnan, interval([1.0])))


def results_of(table: dict[tuple, float]) -> dict[Cell, dict]:
    return {
        Cell("caption", "PLATON", *key): {"loss": loss, "CIDEr": -loss}
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


def test_pooled_differences_are_of_seeds_with_all_fractions():
    results = results_of(
        {(f, w, s): f * s * (w == ID) for f in (0.25, 0.5) for w in (NONE, ID) for s in range(4)}
    )
    del results[Cell("caption", "PLATON", 0.5, NONE, 2)]
    found = pooled_differences(results, "caption", "PLATON", [0.25, 0.5], ID, NONE)
    assert found["loss"] == {0: 0, 1: 0.375, 3: 1.125}
    assert pooled_differences(results, "caption", "PLATON", [0.25, 0.1], ID, NONE) == {}


def test_comparisons_are_with_the_baselines_and_of_ids_with_their_controls():
    assert comparisons([NONE, ID, SHUFFLED]) == [(ID, NONE), (SHUFFLED, NONE), (ID, SHUFFLED)]
    both = comparisons(list(WEIGHTINGS))
    assert both[-2:] == [(ID, WITHIN), (ID, MEAN)]
    assert (NONE, SHUFFLED) not in both and (SHUFFLED, SHUFFLED) not in both


# --- page and figures


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
            "processor": "a CPU",
            "torch": "2",
        }
        for cell in cells
        if cell.weighting != "1/ID"
    }
    path = tmp_path / "study.json"
    Study({}, cells, results, {"rule": RULE}, [0.2, 0.1]).write(path)
    return path


def test_the_page_says_what_the_file_holds_and_keeps_what_people_wrote(reported):
    page = reported.with_suffix(".md")
    page.write_text(f"# Ours\n\nWords.\n{MARK}\nstale\n")
    assert report(reported) == page
    text = page.read_text()
    assert text.startswith(f"# Ours\n\nWords.\n{MARK}\n") and "stale" not in text
    assert "24 of 36 planned cells are done, in 6.0 hours of one process" in text
    assert "on a CPU, torch 2 (24 cells)" in text and RULE in text
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    pooled = ["caption", "PLATON", "80 % and 90 %", ID, NONE]
    assert [*pooled, "loss", "6", "-0.2500", "-0.2500 to -0.2500", "p 0.031", BETTER] in rows
    assert [
        *pooled,
        "CIDEr",
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
    Study({}, embedded().cells, {}, {"rule": RULE}).write(tmp_path / "study.json")
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
    shares = plot_sparsity_shares(study_)[0].axes[0]
    assert [line.get_ydata()[0] for line in shares.lines[:2]] == pytest.approx([90, 70])


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
    """Of a study of two cells and the dense start; one file of results a name."""
    return [
        *("--config", str(folder / "tiny.yaml"), "--id_profile", str(folder / "ids.json")),
        *("--file", str(folder / f"{name}.json"), "--output_dir", str(folder / name)),
        *("--weightings", NONE, SHUFFLED, "--seeds", "1", "--remaining", "0.5"),
        *("--validation", "4"),
        *("--", "--max_steps=6", "--warmup_steps=1", "--deltaT=2", "--device=cpu"),
    ]


def scores(path: Path) -> dict[str, tuple]:
    results = Study.read(path).results
    return {cell.name: (r["loss"], r["CIDEr"], r["sparsity"]) for cell, r in results.items()}


def test_a_killed_study_goes_on_to_the_results_of_one_that_was_not(tiny):
    assert finish(start(flags(tiny, "whole"), script="study")) == [0]
    whole, file = scores(tiny / "whole.json"), tiny / "killed.json"
    plan = Study.read(tiny / "whole.json")
    assert list(whole) == [cell.name for cell in plan.cells] and len(whole) == 3

    (process,) = start(flags(tiny, "killed"), script="study")
    while process.is_alive() and not (file.exists() and len(Study.read(file).results) >= 1):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = scores(file)
    kept = {cell: result for cell, result in Study.read(file).results.items()}
    assert 1 <= len(before) < 3
    assert finish(start(flags(tiny, "killed"), script="study")) == [0]
    assert scores(file) == whole
    after = Study.read(file).results
    assert {cell: after[cell] for cell in kept} == kept  # with their seconds: not run again


def test_cells_are_pruned_as_asked_and_by_their_weighting(tiny):
    found = scores(tiny / "whole.json")
    losses = [loss for loss, _, _ in found.values()]
    assert len(set(losses)) == 3
    for name, (loss, _, sparsity) in found.items():
        # the k-th score, which stays, is one of more than 10,000
        assert DENSE in name or sparsity["overall"] == pytest.approx(0.5, abs=1e-4)
        assert math.isfinite(loss)


# --- what a cell is made of


@pytest.fixture
def runner(tiny, tmp_path):
    setting = Setting(
        str(tiny / "tiny.yaml"), str(tiny / "ids.json"), 4, ["--max_steps=6", "--device=cpu"]
    )
    return Runner({"caption": setting}, tmp_path)


def test_the_second_cell_starts_from_the_same_weights_with_its_own_seed_and_weighting(runner, tiny):
    ids = json.loads((tiny / "ids.json").read_text())
    run, bench = runner.prepare(Cell("caption", "PLATON", 0.5, NONE, 3))
    start = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    assert run.layer_id is None and bench.train_set.seed == 3
    assert (run.args.seed, run.args.final_threshold, run.args.pruner_name) == (3, 0.5, "PLATON")
    for parameter in bench.model.parameters():
        parameter.data.zero_()
    run, again = runner.prepare(Cell("caption", "Magnitude", 0.25, SHUFFLED, 7))
    assert again is bench and same(bench.model.state_dict(), start)
    assert run.layer_id == weigh(SHUFFLED, ids, 7) and bench.train_set.seed == 7
    assert (run.args.seed, run.args.final_threshold, run.args.pruner_name) == (7, 0.25, "Magnitude")
    assert run.args.max_steps == 6 and len(bench.validation) == 4


def test_images_are_decoded_once_unless_each_look_at_one_is_another(runner):
    run, bench = runner.prepare(Cell("caption", "PLATON", 0.5, NONE, 0))
    path = bench.train_set.image_paths(0)[0]
    assert bench.train_set.open(path) is bench.train_set.open(path)
    dataset = bench.splits["test"]
    del dataset.open
    cache_images(replace(run, config={"augment": True}), dataset)
    assert dataset.open(path) is not dataset.open(path)


def test_every_reference_of_a_validation_image_counts_in_the_loss(runner):
    run, bench = runner.prepare(Cell("caption", "PLATON", 0.5, NONE, 0))
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
    found = Runner({"nlvr": setting}, tmp_path).run_cell(Cell("nlvr", DENSE, 1.0, NONE, 0))
    assert found["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    # an untrained head's logits are near each other: ln 2 and little more
    assert 0.6 < found["loss"] < 0.8
    assert found["seconds"] > 0 and found["torch"] == torch.__version__
