"""Prints the scores of evaluated runs as a Markdown table.

    python -m reports.tables output/demo dense PLATON90 PLATON90-ID

reads what `--evaluate` wrote: sparsity.json and results/ of each run. `--ids PROFILE` adds a line
with the mean ID of each modality.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

from reports.runs import RunFolder, read_run
from utils import UserError, launch, user_path


def row(run: RunFolder) -> dict[str, str]:
    """A row of the table: column to formatted value.

    Raises:
        UserError: the run was not evaluated.
    """
    if run.sparsity is None or not run.scores:
        raise UserError(f"{run.folder} holds no evaluated run: run --evaluate")
    return {"run": run.name, **shares(run.sparsity), **run.scores}


def shares(sparsity: dict | None) -> dict[str, str]:
    """The columns of the shares of zeros, from a `sparsity_report` if there is one."""
    found = {"sparsity": sparsity["overall"], **sparsity["by_modality"]} if sparsity else {}
    return {name: f"{share:.1%}" for name, share in found.items()}


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


def mean_ids(path: Path) -> str:
    """A line with the mean ID of each modality's layers.

    Raises:
        UserError: the file cannot be read or is no profile.
    """
    from dimension.profile import load_kinds, load_profile
    from models.layers import modality

    kinds, members = load_kinds(path), defaultdict(list)
    for name, dimension in load_profile(path).items():
        members[kinds.get(name) or modality(name)].append(dimension)
    return "mean ID: " + ", ".join(f"{kind} {mean(ids):.1f}" for kind, ids in members.items())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, help="folder of the runs, their --output_dir")
    parser.add_argument("runs", nargs="+", help="names of the runs, their --model_dir")
    parser.add_argument("--ids", type=user_path, help="profile that weighted the scores")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Prints the table, the mean IDs, and the paths of figures."""
    print(markdown([row(read_run(args.folder / run)) for run in args.runs]))
    if args.ids:
        print(mean_ids(args.ids))
    figures = [figure for run in args.runs for figure in sorted((args.folder / run).glob("*.png"))]
    if figures:
        print("figures:", *figures, sep="\n  ")


if __name__ == "__main__":
    launch(main, parse_args())
