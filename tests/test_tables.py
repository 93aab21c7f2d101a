import pytest

from reports.tables import main, parse_args
from utils import UserError, write_json

RECALLS = {"txt_r1": 70.04, "txt_r5": 95.0, "txt_r10": 99.0, "img_r1": 65.0, "img_r5": 90.0}
CAPTIONING = {"CIDEr": 5.1234, "Bleu_4": 0.5, "ROUGE_L": 0.1}


@pytest.mark.parametrize(
    ("file", "content", "columns", "cells"),
    [
        ("test_scores", {"scores": CAPTIONING}, "CIDEr | BLEU-4", "5.123 | 0.500"),
        (
            "accuracy",
            {"dev": 0.875, "test": 0.9},
            "dev accuracy | test accuracy",
            "87.5% | 90.0%",
        ),
        (
            "recalls",
            {"val": {"txt_r1": 1.0}, "test": {**RECALLS, "r_mean": 86.0}},
            "TR@1 | TR@5 | IR@1 | IR@5 | mean",
            "70.0% | 95.0% | 65.0% | 90.0% | 86.0%",
        ),
    ],
)
def test_runs_of_each_task_are_tabulated(tmp_path, capsys, file, content, columns, cells):
    for name, sparsity in (("dense", 0.0), ("PLATON80", 0.8), ("other", 0.8)):
        shares = {"vision": sparsity / 2, "language": 1.0}
        report = {"overall": sparsity, "by_modality": shares}
        write_json(tmp_path / name / "sparsity.json", report)
        write_json(tmp_path / name / f"results/{file}.json", content)
        (tmp_path / name / "sparsity.png").touch()
    ids = {"transformer.resblocks.0.x": 8.0, "transformer.resblocks.1.x": 9.0}
    write_json(tmp_path / "ids.json", {"visual.transformer.resblocks.0.mlp.c_fc": 16.0} | ids)
    main(parse_args([str(tmp_path), "dense", "PLATON80", "--ids", str(tmp_path / "ids.json")]))
    *table, ids, _, figure, other = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    rows = [" ".join(line.split()) for line in table]
    assert rows[0] == f"| run | sparsity | vision | language | {columns} |"
    assert rows[2] == f"| dense | 0.0% | 0.0% | 100.0% | {cells} |"
    assert rows[3] == f"| PLATON80 | 80.0% | 40.0% | 100.0% | {cells} |"
    assert ids == "mean ID: vision 16.0, language 8.5"
    assert figure.strip() == f"{tmp_path}/dense/sparsity.png"
    assert other.strip() == f"{tmp_path}/PLATON80/sparsity.png"


@pytest.mark.parametrize("content", [None, "cut o", '{"overall": 0.8, "by_modality": {}}'])
def test_a_run_that_was_not_evaluated_is_named(tmp_path, content):
    (tmp_path / "PLATON80").mkdir()
    if content:
        (tmp_path / "PLATON80/sparsity.json").write_text(content)
    with pytest.raises(UserError, match="PLATON80.*--evaluate"):
        main(parse_args([str(tmp_path), "PLATON80"]))
