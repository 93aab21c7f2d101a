import json
import re
from pathlib import Path

import pytest

from reports import tables
from reports.tables import main, parse_args
from utils import UserError


def write(folder, sparsity, results):
    (folder / "results").mkdir(parents=True)
    report = {"overall": sparsity, "by_modality": {"vision": sparsity / 2, "language": 1.0}}
    (folder / "sparsity.json").write_text(json.dumps(report))
    for name, content in results.items():
        (folder / "results" / name).write_text(json.dumps(content))


def test_caption_runs_are_tabulated(tmp_path, capsys):
    scores = {"scores": {"CIDEr": 5.1234, "Bleu_4": 0.5, "ROUGE_L": 0.1}}
    write(tmp_path / "dense", 0.0, {"test_scores.json": scores})
    write(tmp_path / "PLATON80", 0.8, {"test_scores.json": scores})
    (tmp_path / "PLATON80" / "sparsity.png").touch()
    main(parse_args([str(tmp_path), "dense", "PLATON80"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "| run | sparsity | vision | language | CIDEr | BLEU-4 |".split()
    assert lines[2].split() == "| dense | 0.0% | 0.0% | 100.0% | 5.123 | 0.500 |".split()
    assert lines[3].split() == "| PLATON80 | 80.0% | 40.0% | 100.0% | 5.123 | 0.500 |".split()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1].strip() == str(tmp_path / "PLATON80" / "sparsity.png")


def test_nlvr_runs_are_tabulated(tmp_path, capsys):
    write(tmp_path / "ID", 0.5, {"accuracy.json": {"dev": 0.875, "test": 0.9}})
    main(parse_args([str(tmp_path), "ID"]))
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == "| ID | 50.0% | 25.0% | 100.0% | 87.5% | 90.0% |".split()


def test_retrieval_runs_are_tabulated_with_mean_ids(tmp_path, capsys):
    test = {"txt_r1": 70.04, "txt_r5": 95.0, "txt_r10": 99.0, "txt_r_mean": 88.01}
    test |= {"img_r1": 65.0, "img_r5": 90.0, "img_r10": 97.0, "img_r_mean": 84.0, "r_mean": 86.0}
    write(tmp_path / "ID", 0.5, {"recalls.json": {"val": {"txt_r1": 1.0}, "test": test}})
    ids = {"visual.transformer.resblocks.0.mlp.c_fc": 16.0}
    ids |= {f"transformer.resblocks.{n}.mlp.c_fc": n + 8.0 for n in range(2)}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    main(parse_args([str(tmp_path), "ID", "--ids", str(tmp_path / "ids.json")]))
    lines = capsys.readouterr().out.splitlines()
    columns = "| run | sparsity | vision | language | TR@1 | TR@5 | IR@1 | IR@5 | mean |"
    assert lines[0].split() == columns.split()
    row = "| ID | 50.0% | 25.0% | 100.0% | 70.0% | 95.0% | 65.0% | 90.0% | 86.0% |"
    assert lines[2].split() == row.split()
    assert lines[3] == "mean ID: vision 16.0, language 8.5"


def test_a_run_that_was_not_evaluated_is_named(tmp_path):
    with pytest.raises(UserError, match="PLATON80.*--evaluate"):
        main(parse_args([str(tmp_path), "PLATON80"]))
    (tmp_path / "PLATON80").mkdir()
    (tmp_path / "PLATON80/sparsity.json").write_text("cut o")
    with pytest.raises(UserError, match="PLATON80.*--evaluate"):
        main(parse_args([str(tmp_path), "PLATON80"]))


def test_only_the_runs_own_figures_are_listed(tmp_path, capsys):
    for run in ("ID", "other"):
        write(tmp_path / run, 0.5, {"accuracy.json": {"dev": 0.875, "test": 0.9}})
        (tmp_path / run / "sparsity.png").touch()
    main(parse_args([str(tmp_path), "ID"]))
    said = capsys.readouterr().out
    assert "ID/sparsity.png" in said and "other" not in said


def test_the_command_in_the_help_reads_the_runs_of_the_demo():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    made = re.search(r"^RUNS *:= (.*)$", makefile, re.MULTILINE)[1].split()
    (command,) = re.findall(r"python -m evaluation\.tables (.*)", tables.__doc__)
    args = parse_args(command.split())
    assert [str(args.folder / run) for run in args.runs] == made
