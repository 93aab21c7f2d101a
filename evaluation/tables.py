"""Prints what evaluated runs have come to, as a Markdown table.

    python -m evaluation.tables output/demo dense PLATON80 PLATON80-ID

reads what `--evaluate` wrote: sparsity.json and results/ of each run. `--ids PROFILE` adds a line
with the mean ID of each modality.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from utils import UserError, launch

CAPTION_SCORES = {"CIDEr": "CIDEr", "BLEU-4": "Bleu_4"}  # column: pycocoevalcap's name
RECALLS = {"TR@1": "txt_r1", "TR@5": "txt_r5", "IR@1": "img_r1", "IR@5": "img_r5", "mean": "r_mean"}


def read_run(folder: Path) -> dict[str, str]:
    """A row of the table: column to formatted value.

    Raises:
        UserError: the folder holds no run, or one that was not evaluated.
    """
    results = folder / "results"
    try:
        sparsity = json.loads((folder / "sparsity.json").read_text())
        if (results / "accuracy.json").exists():
            accuracy = json.loads((results / "accuracy.json").read_text())
            scores = {f"{split} accuracy": f"{share:.1%}" for split, share in accuracy.items()}
        elif (results / "recalls.json").exists():
            found = json.loads((results / "recalls.json").read_text())["test"]
            scores = {column: f"{found[name]:.1f}%" for column, name in RECALLS.items()}
        else:
            found = json.loads((results / "test_scores.json").read_text())["scores"]
            scores = {column: f"{found[name]:.3f}" for column, name in CAPTION_SCORES.items()}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{folder} holds no evaluated run ({error}): run --evaluate") from error
    return {
        "run": folder.name,
        "sparsity": f"{sparsity['overall']:.1%}",
        **{kind: f"{share:.1%}" for kind, share in sparsity["by_modality"].items()},
        **scores,
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows with the same columns as an aligned Markdown table."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def mean_ids(path: Path) -> str:
    """A line with the mean ID of each modality's layers.

    Raises:
        UserError: the file cannot be read or is no profile.
    """
    from dimension.profile import load_profile
    from models import modality

    members = defaultdict(list)
    for name, dimension in load_profile(path).items():
        members[modality(name)].append(dimension)
    means = (f"{kind} {sum(ids) / len(ids):.1f}" for kind, ids in members.items())
    return "mean ID: " + ", ".join(means)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the runs' --output_dir")
    parser.add_argument("runs", nargs="+", help="their --model_dir")
    parser.add_argument("--ids", type=Path, help="profile of the IDs that weighted the scores")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Prints the table of the runs named on the command line, IDs, and where figures are."""
    print(markdown([read_run(args.folder / run) for run in args.runs]))
    if args.ids:
        print(mean_ids(args.ids))
    figures = [figure for run in args.runs for figure in sorted((args.folder / run).glob("*.png"))]
    if figures:
        print("figures:", *figures, sep="\n  ")


if __name__ == "__main__":
    launch(main, parse_args())
