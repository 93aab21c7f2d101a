r"""Does weighting by ID prune better than by other numbers? Runs and reports the cells of a study.

    python -m data.scenes                              # the embedded data
    python study.py --preset embedded                  # the cells of docs/study.json not yet run
    python study.py --preset embedded --report         # only tables and figures, in seconds
    python study.py --preset embedded --again 3        # runs finished cells again and compares
    python study.py --config configs/caption_coco.yaml --id_profile configs/id/blip_coco.json \
        --file output/coco/study.json --cells 3/16 --num_workers 8 -- --batch_size 32
    python study.py --file output/coco/study.json --report

A study is a JSON file with its cells (task, method, remaining fraction, weighting, seed), their
settings and the results so far. The command goes on where it was stopped, at whatever moment. With
--config it first writes the file, the flags after `--` being the training script's; then one job a
GPU runs its share, --cells I/N. Cells that are compared are in one share, for the machines of
others may round otherwise; of more shares than that allows, each has single cells, and only pairs
from equal machines are compared. --file alone goes on with a file that is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from configs import COUNT, FROM_ZERO
from engine.flags import FRACTION
from engine.stopping import exit_stopped, stop_signals_to
from reports.runs import CHECKPOINTS, PRUNED_FILE
from studies.grid import DENSE, Cell, Study, changing, open_study, share
from studies.presets import PRESETS, of_config
from studies.statistics import SCORES, machine
from studies.weightings import WEIGHTINGS
from utils import UserError, available_cpus, launch


def main(args: argparse.Namespace) -> None:
    """Writes the study's file if it is not there, runs its cells, and reports."""
    path = args.file or Path("docs/study.json" if args.preset else "output/study/study.json")
    if args.flags and not args.config:
        raise UserError("flags after -- are of a new study: they go with --config")
    open_study(path, wanted_study(args))
    if args.preset:  # before torch is imported: small models are slower on more threads
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.again:
        run_again(path, args)
        return
    if not args.report:
        # a share is one process's, whatever --processes says: it was started by that flag
        processes = 1 if args.cells else args.processes or default_processes(args)
        if processes > 1:
            run_side_by_side(processes)
        else:
            with stop_signals_to(exit_stopped):
                run_cells(path, args)
    if not args.cells:
        from studies.page import report  # imports matplotlib and scipy

        print(f"wrote {report(path)}")


def wanted_study(args: argparse.Namespace) -> Study | None:
    """The study that the flags describe; None where --file alone names one.

    Raises:
        UserError: the flags describe none.
    """
    if args.preset and (args.config or args.id_profile):
        raise UserError("--preset has a config of its own: leave it out, or --config and its flags")
    if args.preset:
        return PRESETS[args.preset]()
    if args.config and args.id_profile:
        return of_config(args)
    if args.file and not args.config:
        return None
    raise UserError("what to study? Give --preset, --config with --id_profile, or --file")


def default_processes(args: argparse.Namespace) -> int:
    """As many as there are CPUs, one thread each, for embedded models; one for others."""
    return available_cpus() if args.preset else 1


def run_side_by_side(processes: int) -> None:
    """Runs this command in several processes of one thread each, every one with its share.

    SIGTERM and SIGINT go on to them.

    Raises:
        SystemExit: one ended with an error, or was stopped; the others go on to their end.
    """
    command = [sys.executable, *sys.argv]
    flags = command.index("--") if "--" in command else len(command)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, signals = [], []

    def pass_on(number, frame):
        signals.append(number)
        for process in started:
            process.send_signal(number)

    with stop_signals_to(pass_on):
        for number in range(1, processes + 1):
            of_share = [*command[:flags], f"--cells={number}/{processes}", *command[flags:]]
            started.append(subprocess.Popen(of_share, env=environment))
        if signals:  # which came while not all had started
            pass_on(signals[0], None)
        codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def run_cells(path: Path, args: argparse.Namespace) -> None:
    """Runs the cells of a share that have no result, and keeps each result as it comes.

    A cell whose training diverges is kept as a failure, and not tried again.

    Args:
        path: of the study.
        args: flags.
    """
    study, part = Study.read(path), args.cells or "1/1"
    done = study.results.keys() | study.failures.keys()
    cells = share(study.cells, part)
    for cell in done.intersection(cells):  # a command may have been killed before it did
        remove_weights(args.output_dir / cell.name)
    own = [cell for cell in cells if cell not in done]
    if not own:
        return
    from studies.cells import Runner  # torch takes seconds to import

    runner = Runner(study, args.output_dir, machine_flags(args))
    seconds: list[float] = []
    for number, cell in enumerate(own, start=1):
        begun = time.monotonic()
        found = run_and_keep(runner, cell, path)
        remove_weights(args.output_dir / cell.name)
        if cell.method != DENSE:
            seconds.append(time.monotonic() - begun)
        left = time_left(seconds, own[number:])
        print(f"share {part}: {number} of {len(own)}  {cell.name}  {found}  ETA {left}", flush=True)


def run_and_keep(runner, cell: Cell, path: Path) -> str:
    """Runs a cell and keeps its result, or why it has none, in the study's file.

    Args:
        runner: a `studies.cells.Runner`.
        cell: to run.
        path: of the study.

    Returns:
        What was found, in words.
    """
    result, failure = None, ""
    try:
        result = runner.run_cell(cell)
    except FloatingPointError as error:
        failure = str(error)
    with changing(path) as changed:
        for task, digests in runner.study.digests.items():
            changed.keep_digests(task, digests)
        if result is None:
            changed.failures[cell] = failure
        else:
            changed.results[cell] = result
    if result is None:
        return f"diverged: {failure}"
    found = "  ".join(f"{name} {result[name]:.4f}" for name in SCORES[cell.task])
    return f"{found}  {result['seconds']:.0f} s"


def remove_weights(folder: Path) -> None:
    """Removes the weights and checkpoints of a cell whose result is kept: a study has many."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / PRUNED_FILE).unlink(missing_ok=True)


def time_left(seconds: list[float], cells: list[Cell]) -> str:
    """Hours that cells take if each that trains takes the mean of those that did; "?" of none.

    Args:
        seconds: of the cells that trained.
        cells: that are to come; those that only score take next to no time.
    """
    training = sum(cell.method != DENSE for cell in cells)
    return hours(training * sum(seconds) / len(seconds)) if seconds else "?"


def machine_flags(args: argparse.Namespace) -> list[str]:
    """Flags of the training scripts that are of this machine, and no part of the study."""
    own = {"device": args.device, "num_workers": args.num_workers}
    return [f"--{name}={value}" for name, value in own.items() if value is not None]


def run_again(path: Path, args: argparse.Namespace) -> None:
    """Runs finished cells once more, spread over all, and prints how far the scores are apart.

    Args:
        path: of the study, which stays as it is.
        args: flags; the runs go to the folder "again" of --output_dir.
    """
    from studies.cells import Runner

    study = Study.read(path)
    done = [cell for cell in study.cells if cell in study.results]
    cells = min(args.again, len(done))
    runner = Runner(study, args.output_dir / "again", machine_flags(args))
    for cell in [done[place * len(done) // cells] for place in range(cells)]:
        shutil.rmtree(runner.folder / cell.name, ignore_errors=True)
        old, new = study.results[cell], runner.run_cell(cell)
        differences = "  ".join(f"{s} {new[s] - old[s]:+.2e}" for s in SCORES[cell.task])
        machines = {machine(old), machine(new)}
        print(f"{cell.name}: {differences}  ({'; '.join(sorted(machines))})", flush=True)


def hours(seconds: float) -> str:
    """Hours and minutes, as 7:05."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a study that comes with the repository")
    parser.add_argument("--file", type=Path, help="the study's JSON; its page goes beside it")
    parser.add_argument("--output_dir", type=Path, default=Path("output/study"), help="of the runs")
    parser.add_argument("--cells", metavar="I/N", help="only the I-th of N shares, and no report")
    parser.add_argument("--processes", type=COUNT, help="side by side, of one thread each")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N, mps or xpu")
    parser.add_argument("--num_workers", type=FROM_ZERO, help="processes that read data")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures")
    parser.add_argument("--again", type=COUNT, metavar="CELLS", help="run so many again, compare")

    new = parser.add_argument_group("a new study, in place of --preset")
    new.add_argument("--config", help="YAML file of the experiment, captioning or NLVR2")
    new.add_argument("--id_profile", help="the layers' IDs")
    new.add_argument("--methods", nargs="+", default=["PLATON"], help="names of --pruner_name")
    new.add_argument(
        "--remaining", nargs="+", type=FRACTION, default=[0.2, 0.1], help="fractions, final ones"
    )
    new.add_argument("--weightings", nargs="+", default=list(WEIGHTINGS), help="also ID^A")
    new.add_argument("--seeds", type=COUNT, default=8, help="how many")
    new.add_argument("--validation", type=FROM_ZERO, default=0, help="samples; 0: the whole split")
    new.add_argument("flags", nargs="*", help="after --: flags of the task's training script")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
