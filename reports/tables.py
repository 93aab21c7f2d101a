"""Prints the scores of evaluated runs as a Markdown table.

    python -m reports.tables output/demo dense PLATON90 PLATON90-ID

`--ids PROFILE` adds a line with the mean ID of each modality.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

from reports.runs import read_run
from utils import UserError, launch, script_parser, user_path


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as an aligned Markdown table; a cell that a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=user_path, help="folder of the runs, their --output_dir")
    parser.add_argument("runs", nargs="+", help="names of the runs, their --model_dir")
    parser.add_argument("--ids", type=user_path, help="profile that weighted the scores")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Prints the table, the mean IDs, and the paths of figures."""
    runs = [read_run(Path(args.folder, run)) for run in args.runs]
    for run in runs:
        if run.sparsity is None or not run.scores:
            raise UserError(f"{run.folder} holds no evaluated run: run --evaluate")
    print(markdown([{"run": run.name, **run.shares, **run.scores} for run in runs]))
    if args.ids:
        from dimension.profile import load_kinds, load_profile
        from models.layers import modality

        kinds, members = load_kinds(args.ids), defaultdict(list)
        for name, dimension in load_profile(args.ids).items():
            members[kinds.get(name) or modality(name)].append(dimension)
        means = (f"{kind} {mean(ids):.1f}" for kind, ids in members.items())
        print("mean ID:", ", ".join(means))
    figures = [figure for run in runs for figure in sorted(run.folder.glob("*.png"))]
    if figures:
        print("figures:", *figures, sep="\n  ")


if __name__ == "__main__":
    launch(main, parse_args())
