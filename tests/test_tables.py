import json

import pytest

from evaluation.tables import main, parse_args
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
