"""Prints a table of runs and writes one HTML page about them, which needs no other file.

    python -m reports.report output/demo/dense output/demo/PLATON90 output/demo/PLATON90-ID

The page shows what the runs' folders hold (scores, sparsity and IDs by layer, captions of a few
test pictures), and each model's size and speed on this machine's CPU.
"""

import argparse
import shlex
from pathlib import Path

from reports.runs import read_run
from utils import atomic_write, launch, script_parser, user_path


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
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="folders of runs")
    add("--out", type=user_path, help="page (default: report.html beside the first run)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measures the models, prints the table and the finding, and writes the page."""
    runs = [read_run(Path(folder)) for folder in args.runs]
    names = [run.name for run in runs]
    runs = dict(zip(names if len(set(names)) == len(names) else args.runs, runs, strict=True))
    # imported here, because a mistaken folder is reported before what takes seconds to import
    from reports.page import build_page, finding, measure_costs, short_costs

    found = measure_costs(runs)
    rows = [
        {"run": name, **run.shares, **run.scores}
        | (short_costs(found[name]) if isinstance(found[name], dict) else {})
        for name, run in runs.items()
    ]
    print(markdown(rows), finding(runs), sep="\n")
    command = ["python", "-m", "reports.report", *args.runs]
    command += ["--out", args.out] if args.out else []
    out = args.out or Path(args.runs[0]).resolve().parent / "report.html"
    with atomic_write(out, "wb") as file:
        file.write(build_page(runs, found, shlex.join(command)))
    print(f"wrote {out}")


if __name__ == "__main__":
    launch(main, parse_args())
