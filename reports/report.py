"""Writes one HTML page that tells all about some runs, pictures included; it needs no network.

    python -m reports.report output/demo/dense output/demo/PLATON90 output/demo/PLATON90-ID

Of each run it shows what its folder has: where sparsity went, the IDs that weighted it, scores, and
captions of a few test pictures; its size and speed are measured here, on the CPU. The table of all
is also printed.
"""

import argparse
import shlex
from pathlib import Path

from reports.runs import read_run
from reports.tables import markdown, shares
from utils import atomic_write, launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, help="default: report.html beside the first run")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measures, prints the table and writes the page."""
    runs = [read_run(folder) for folder in args.runs]
    out = args.out or args.runs[0].resolve().parent / "report.html"
    # here, so that a folder that is no run is named before what takes seconds to import
    from reports.page import build_page, label, measure_costs, short_costs

    costs = measure_costs(runs)
    rows = [
        {"run": name}
        | (shares(run.sparsity) if run.sparsity else {})
        | run.scores
        | (short_costs(found) if found else {})
        for name, run, found in zip(label(runs), runs, costs, strict=True)
    ]
    print(markdown(rows))
    command = shlex.join(["python", "-m", "reports.report", *map(str, args.runs)])
    if args.out:
        command += f" --out {shlex.quote(str(args.out))}"
    with atomic_write(out, "wb") as file:
        file.write(build_page(runs, costs, command))
    print(f"wrote {out}")


if __name__ == "__main__":
    launch(main, parse_args())
