r"""Does weighting by ID prune better than other weights? Runs the cells of a study, and reports.

    python -m data.scenes                              # the embedded data
    python study.py --preset embedded                  # the cells that docs/study.json lacks
    python study.py --preset embedded --report         # the page and its figures alone, in seconds
    python study.py --config configs/caption_coco.yaml --id_profile configs/id/blip_coco.json \
        --file output/coco/study.json --cells 3/16 -- --num_workers 8 --batch_size 32
    python study.py --file output/coco/study.json --report

configs/studies/ plans the cells. A cell is a training and an evaluation command, and its folder
below --output_dir is its record, so a study goes on where it was stopped. --file keeps settings,
cells and results; page and figures lie beside it.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from pycocoevalcap.cider.cider import Cider
from ruamel.yaml import YAML

from configs import COUNT, load_config
from data.records import read_json
from engine.flags import trainer_parser
from engine.stopping import EXIT_STOPPED, exit_stopped, stop_signals_to
from engine.tasks import TASKS, later
from evaluation.ptb import ptb_tokenize
from reports.report import markdown
from reports.runs import CHECKPOINTS, PRUNED_FILE
from utils import (
    UserError,
    atomic_write,
    available_cpus,
    launch,
    script_parser,
    user_path,
    write_json,
)

ROOT = Path(__file__).parent
SCORES = {task: ("loss", TASKS[task].best_by) for task in ("caption", "nlvr")}
# flags of a training script that each cell sets, or that do not go with a study
CELL_FLAGS = "config output_dir model_dir seed final_threshold eval_epochs pruner_name".split()
CELL_FLAGS += "id_profile useID check evaluate pruned split eval_samples".split()
DENSE = "dense"  # the method of a cell that scores the starting weights
NONE, ID, SHUFFLED = "none", "ID", "shuffled"
WITHIN, MEAN, INVERSE = "shuffled within modality", "modality mean", "1/ID"
ONE_LENGTH = "ID, one length"  # of the profile beside the IDs' whose name ends in _one_length
UNSEEN = "no difference seen at this n"
ARROWS = {"loss": "↓", "CIDEr": "↑", "accuracy": "↑"}  # which way is better
MARK = "<!-- below: written by study.py -->"
STYLES = [("k", "o", "-"), ("C0", "s", "-"), ("C1", "^", "--"), ("C2", "v", "--")]
STYLES += [("C4", "D", "-."), ("C3", "P", ":"), ("C9", "X", "-."), ("C6", "*", ":")]
Group = tuple[str, str, tuple[float, ...]]  # task, method, and fractions that remain

modality, load_profile = later("models.layers:modality"), later("dimension.profile:load_profile")
choose_device = later("engine.processes:choose_device")
machine_of = later("engine.processes:machine_of")
modality_means = later("pruners.oneshot:modality_means")
new_figure, settings = later("matplotlib.figure:Figure"), later("matplotlib:rc_context")


class Cell(NamedTuple):
    """One run of a study. Cells that differ in the weighting alone are compared."""

    task: str
    method: str  # a name of --pruner_name, or DENSE
    remaining: float  # fraction of the weights, in (0, 1]
    weighting: str
    seed: int  # of the data's order, of dropout and of a shuffle

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        weighting = self.weighting.replace("/", " over ").replace(" ", "_")
        return f"{self.task}-{self.method}-{self.remaining:g}-{weighting}-{self.seed}"


class Study(NamedTuple):
    """What runs, and its results: the content of --file."""

    notes: dict[str, str]  # sentences that were written before the cells ran
    pooled: list[float]  # remaining fractions over which each seed's mean is compared, too
    settings: dict[str, dict]  # by task: config, id_profile, validation (samples; 0: all), flags
    cells: dict[Cell, dict]  # in the order in which they run, with "result" when they have ended

    @property
    def results(self) -> dict[Cell, dict]:
        """Results of the cells that have ended."""
        return {cell: record["result"] for cell, record in self.cells.items() if "result" in record}

    @property
    def styles(self) -> dict[str, tuple[str, str, str]]:
        """Colour, marker and line of each weighting, in the order in which cells run."""
        weightings = dict.fromkeys(cell.weighting for cell in self.cells)
        return dict(zip(weightings, cycle(STYLES), strict=False))


def planned(args: argparse.Namespace) -> Study:
    """The study of --preset or --config, without results."""
    file = ROOT / "configs" / "studies" / f"{args.preset or 'default'}.yaml"
    content = YAML(typ="safe").load(file)
    if not args.preset:
        task = load_config(args.config)["task"]
        if task not in SCORES:
            raise UserError(f"--config {args.config}: a study knows the tasks {', '.join(SCORES)}")
        given = vars(trainer_flags(task, args.flags, **dict.fromkeys(CELL_FLAGS)))
        if own := [name for name in CELL_FLAGS if given[name] is not None]:
            raise UserError(f"--{own[0]} after --: each cell has its own; leave it out")
        setting = {"config": args.config, "id_profile": args.id_profile}
        content["settings"] = {task: setting | {"validation": 0, "flags": args.flags}}
        content["grids"] = [{"task": task} | grid for grid in content["grids"]]
    cells = {}
    for grid in content.pop("grids"):
        keys = range(grid["seeds"]), grid["methods"], grid["remaining"], grid["weightings"]
        cells |= {Cell(grid["task"], *rest, seed): {} for seed, *rest in product(*keys)}
    return Study(**content, cells=cells)


def trainer_flags(task: str, flags: list[str], **defaults) -> argparse.Namespace:
    """Flags as the training script of a task reads them."""
    return trainer_parser(task, "")[0].parse_args(flags, argparse.Namespace(**defaults))


def open_study(args: argparse.Namespace) -> Study:
    """The study of the flags, with the results in its file and in its cells' folders."""
    study = wanted = planned(args) if args.preset or args.config else None
    if wanted is None or args.file.exists():
        try:
            content = json.loads(args.file.read_text())
            cells = {Cell(*map(row.pop, Cell._fields)): row for row in content["cells"]}
            study = Study(**content | {"cells": (wanted.cells if wanted else {}) | cells})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{args.file} is no study that study.py wrote: {error!r}") from error
        if wanted and study.settings != wanted.settings:
            raise UserError(
                f"{args.file} is of another study: its settings are not those of the flags. Give "
                "another --file, or --file alone to go on with its study"
            )
    for cell, record in study.cells.items():
        if "result" not in record and (file := args.output_dir / cell.name / "cell.json").exists():
            found = read_json(file)
            if found["setting"] != study.settings[cell.task]:
                raise UserError(f"{file} is of another study: choose another --output_dir")
            record |= {key: found[key] for key in found.keys() & {"result"}}
    return study


def write_study(study: Study, path: Path) -> None:
    """Writes a study's file, one line a cell."""
    start = json.dumps(study._asdict() | {"cells": []}, indent=1).removesuffix("[]\n}")
    lines = [json.dumps(cell._asdict() | record) for cell, record in study.cells.items()]
    with atomic_write(path) as file:
        file.write(f"{start}[\n  " + ",\n  ".join(lines) + "\n ]\n}\n")


def share(cells: list[Cell], part: str) -> list[Cell]:
    """The I-th of N shares, for `part` "I/N"; cells that are compared stay together."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", part)) or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--cells {part}: give I/N, the I-th of N shares, from 1/N to N/N")
    blocks = {cell: cell._replace(weighting="") for cell in cells}
    own = list(dict.fromkeys(blocks.values()))[int(found[1]) - 1 :: int(found[2])]
    return [cell for cell in cells if blocks[cell] in own]


def weigh(weighting: str, ids: dict[str, float], seed: int) -> dict[str, float]:
    """The profile of a weighting: IDs, or controls that are IDs in all but one respect.

    Only the ratios of its numbers matter, because the threshold is global.
    """
    if weighting == MEAN:
        return modality_means(ids, {name: modality(name) for name in ids})
    if weighting in (SHUFFLED, WITHIN):
        parts, profile = defaultdict(list), {}
        for name in ids:
            parts[weighting == SHUFFLED or modality(name)].append(name)
        for names in parts.values():
            values = [ids[name] for name in names]
            random.Random(seed).shuffle(values)
            profile |= zip(names, values, strict=True)
        return profile
    try:
        powers = {ID: 1, ONE_LENGTH: 1, INVERSE: -1}
        power = float(powers.get(weighting) or weighting.removeprefix("ID^"))
    except ValueError:
        raise UserError(f"there is no weighting {weighting!r}") from None
    return {name: value**power for name, value in ids.items()}


def commands(cell: Cell, setting: dict, args: argparse.Namespace) -> list[list[str]]:
    """The training command, unless the cell is dense, and the evaluation command."""
    task, folder = TASKS[cell.task], args.output_dir / cell.name
    flags = {"config": setting["config"], "output_dir": args.output_dir, "model_dir": cell.name}
    own = [f"--{name}={value}" for name, value in (flags | {"seed": cell.seed}).items()]
    start = [sys.executable, str(ROOT / task.script), *setting["flags"], *own]
    evaluation = [flag for flag in start if flag not in ("--compile", "--eval_test")]
    evaluation += ["--evaluate", f"--split={task.held_out[0]}"]
    evaluation += [f"--eval_samples={setting['validation']}"]
    if cell.method == DENSE:
        return [evaluation]
    training = [*start, f"--pruner_name={cell.method}", f"--final_threshold={cell.remaining}"]
    if cell.weighting != NONE:
        profile = folder / "weighting.json"
        ids = Path(setting["id_profile"])
        ids = ids.with_stem(f"{ids.stem}_one_length") if cell.weighting == ONE_LENGTH else ids
        write_json(profile, weigh(cell.weighting, load_profile(ids), cell.seed))
        training.append(f"--id_profile={profile}")
    return [[*training, "--eval_epochs=0"], [*evaluation, f"--pruned={folder}"]]


def run_cell(cell: Cell, setting: dict, args: argparse.Namespace) -> dict:
    """The result of a cell's commands."""
    folder, begun = args.output_dir / cell.name, time.monotonic()
    machine = machine_of(choose_device(trainer_flags(cell.task, setting["flags"]).device, 1))
    file, record = folder / "cell.json", {"setting": setting, "machine": machine}
    if file.exists() and read_json(file) != record:  # a result is from one machine
        shutil.rmtree(folder)
    write_json(file, record)
    log = folder / "output.txt"
    for command in commands(cell, setting, args):
        with open(log, "a") as output:
            code = subprocess.run(command, stdout=output, stderr=output).returncode
        if code in (EXIT_STOPPED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
            raise SystemExit(EXIT_STOPPED)
        if code:
            last = log.read_text().strip().rpartition("\n")[2]
            raise UserError(f"{cell.name} failed: {last} (see {log})")
    result = scores(cell, folder) | {"seconds": round(time.monotonic() - begun, 3)} | machine
    write_json(file, record | {"result": result})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # a study has many
    (folder / PRUNED_FILE).unlink(missing_ok=True)
    return result


def scores(cell: Cell, folder: Path) -> dict:
    """Scores and sparsity of an evaluated cell.

    CIDEr is computed with the tokenizer in Python, so that machines with and without Java agree.
    """
    split = TASKS[cell.task].held_out[0]
    found = read_json(folder / "results" / "scores.json")[split]
    if cell.task == "caption":
        images = read_json(folder / "results" / f"{split}_images.json")
        captions = {row["image_id"]: [ptb_tokenize(row["caption"])] for row in images}
        truth = {row["image_id"]: list(map(ptb_tokenize, row["references"])) for row in images}
        found["CIDEr"] = float(Cider().compute_score(truth, captions)[0])
    zeros = read_json(folder / "sparsity.json")
    kept = {name: found[name] for name in SCORES[cell.task]}
    return kept | {"sparsity": {"overall": zeros["overall"], **zeros["by_modality"]}}


def run_cells(study: Study, cells: list[Cell], args: argparse.Namespace) -> None:
    """Runs cells, --processes at a time, and prints their scores; a signal stops all."""
    with stop_signals_to(exit_stopped), ThreadPoolExecutor(args.processes) as pool:
        jobs = {pool.submit(run_cell, c, study.settings[c.task], args): c for c in cells}
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                cell, result = jobs[job], job.result()
                study.cells[cell]["result"] = result
                found = "  ".join(f"{name} {result[name]:.4f}" for name in SCORES[cell.task])
                print(f"{number} of {len(cells)}  {cell.name}  {found}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):  # one may have only just started
                for command in psutil.Process().children():
                    command.terminate()
                time.sleep(0.2)
            raise


def machine(result: dict) -> str:
    """What computed a result; one without "threads" is from one thread, or from a GPU."""
    several = f", {result['threads']} threads" if result.get("threads", 1) > 1 else ""
    return f"{result['processor']}, torch {result['torch']}{several}"


def groups(study: Study) -> dict[str, Group]:
    """Groups of finished cells at one sparsity by title, PLATON first, least pruned first."""
    cells = [cell for cell in study.results if cell.method != DENSE]
    found = sorted({(c.task, c.method != "PLATON", c.method, -c.remaining) for c in cells})
    groups = [(task, method, (-left,)) for task, _, method, left in found]
    return {f"{group[0]}, {group[1]}, {pruned(group[2])} pruned": group for group in groups}


def pruned(fractions: tuple[float, ...]) -> str:
    """Sparsities for remaining fractions."""
    return " and ".join(f"{100 * (1 - fraction):.4g} %" for fraction in fractions)


def weightings(study: Study, group: Group) -> list[str]:
    """The weightings of a group's finished cells, in the order in which cells run."""
    found = [cell for cell in study.results if cell[:2] == group[:2] and cell.remaining in group[2]]
    return [name for name in study.styles if name in {cell.weighting for cell in found}]


def matched(study: Study, group: Group, score: str, names: Sequence[str] = ()) -> dict:
    """A score, or a share of zeros, by weighting (default: all): arrays (seeds, fractions).

    The seeds are those whose results of all weightings are there, and at each fraction from one
    machine. Without such a seed the dictionary is empty.
    """
    (task, method, fractions), results, rows = group, study.results, []
    names = names or weightings(study, group)
    for seed in sorted({cell.seed for cell in study.cells}):
        row = [[results.get(Cell(task, method, f, w, seed)) for f in fractions] for w in names]
        by_fraction = zip(*row, strict=True)
        if all(None not in found and len({*map(machine, found)}) == 1 for found in by_fraction):
            rows.append([[(one | one["sparsity"])[score] for one in found] for found in row])
    return dict(zip(names, np.array(rows).swapaxes(0, 1), strict=True)) if rows and names else {}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean, seeded; nan of a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    return tuple(np.percentile(values[chosen].mean(axis=1), (2.5, 97.5)))


def compare(differences: np.ndarray, score: str) -> tuple[float, float, float, str]:
    """The mean's interval, p of the two-sided sign test, and the verdict on paired differences."""
    low, high = interval(differences)
    # a smaller difference is rounding, and has no sign
    above, below = sum(differences > 1e-12), sum(differences < -1e-12)
    tail = sum(math.comb(above + below, k) for k in range(min(above, below) + 1))
    p = min(1.0, 2 * tail / 2 ** (above + below))
    higher, lower = low > 0 and above > below, high < 0 and below > above
    if p >= 0.05 or not (higher or lower):
        return low, high, p, UNSEEN
    return low, high, p, "better" if higher != (score == "loss") else "worse"


def comparisons(study: Study, group: Group) -> list[dict]:
    """Rows of a table: all weightings against none and shuffled, and ID against its controls."""
    names, rows = weightings(study, group), []
    pairs = [(w, base) for base in (NONE, SHUFFLED) for w in names if w not in (NONE, base)]
    pairs += [(ID, control) for control in (WITHIN, MEAN, ONE_LENGTH) if {ID, control} <= {*names}]
    cells = {cell for cell in study.cells if cell[:2] == group[:2] and cell.remaining in group[2]}
    for pair, score in product(pairs, SCORES[group[0]]):
        if found := matched(study, group, score, pair):
            values = (found[pair[0]] - found[pair[1]]).mean(axis=1)
            low, high, p, verdict = compare(values, score)
            seeds = [{cell.seed for cell in cells if cell.weighting == name} for name in pair]
            n, planned = len(values), len(set.intersection(*seeds))
            to_come = {c for c in cells if c.weighting in pair} - study.results.keys()
            row = {
                "weighting": pair[0],
                "against": pair[1],
                "score": f"{score} {ARROWS[score]}",
                "pairs": f"{n} of {planned}" if n < planned else f"{n}",
                "mean difference": f"{values.mean():+.4f}",
                "95 % interval": f"{low:+.4f} to {high:+.4f}" if n > 1 else "",
                "sign test": f"p {p:.3f}",
                "verdict": verdict + " so far" * (verdict != UNSEEN and bool(to_come)),
            }
            rows.append(row)
    return rows


def score_rows(study: Study, group: Group) -> list[dict]:
    """Rows of a table: each weighting's mean scores, deviations, and sparsity by modality."""
    rows = {}
    for score in (*SCORES[group[0]], "vision", "language"):
        for name, values in matched(study, group, score).items():
            row = rows.setdefault(name, {"weighting": name, "seeds": f"{len(values)}"})
            if score in ARROWS:
                spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
                row[f"{score} {ARROWS[score]}"] = f"{values.mean():.4f}{spread}"
            else:
                row[f"{score} pruned"] = f"{values.mean():.1%}"
    return list(rows.values())


def report(study: Study, path: Path) -> Path:
    """Writes the page and its figures beside the study's file; text above the mark stays."""
    page, found, results = path.with_suffix(".md"), groups(study), study.results
    text = page.read_text() if page.exists() else "# What weighting by ID does\n\n"
    hours = sum(result["seconds"] for result in results.values()) / 3600
    where = Counter(map(machine, results.values())).items()
    on = "; ".join(f"{name} ({n} cells)" for name, n in where) or "no machine"
    done = f"{len(results)} of {len(study.cells)} planned cells are done"
    verdicts, figures, scores, differences = [], [], [], []
    for task, method in dict.fromkeys(group[:2] for group in found.values()):
        known = {cell.remaining for cell in study.cells if cell[:2] == (task, method)}
        fractions = tuple(fraction for fraction in study.pooled if fraction in known)
        head = {"task": task, "method": method, "sparsity": pruned(fractions)}
        verdicts += [head | row for row in comparisons(study, (task, method, fractions))]
    for plot in (plot_scores, plot_differences) if found else ():
        sentence = " ".join(plot.__doc__.split())
        picture = page.with_name(f"{path.stem}_{plot.__name__.removeprefix('plot_')}.png")
        with settings({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
            plot(study).savefig(picture, format="png", dpi=150)
        figures.append(f"![{sentence}]({picture.name})\n\n{sentence}")
    for title, group in found.items():
        start = results.get(Cell(group[0], DENSE, 1.0, NONE, 0))
        dense = [f"{score} {start[score]:.4f}" for score in SCORES[group[0]] if start]
        scores.append(title + f" (the dense start: {', '.join(dense)})" * bool(start))
        scores.append(markdown(score_rows(study, group)))
        differences += [title, markdown(comparisons(study, group))]
    parts = [MARK, f"{done}, in {hours:.1f} hours of one process, on {on}."]
    parts += ["## Verdicts", *study.notes.values(), markdown(verdicts), "## Figures", *figures]
    parts += ["## Scores", *scores, "## Paired differences", *differences]
    filled = "\n\n".join(x for x in parts if x.strip("| \n"))  # without empty tables
    with atomic_write(page) as file:
        file.write(f"{text.partition(MARK)[0]}{filled}\n")
    return page


def plot_scores(study: Study):
    """Scores against sparsity: means over the seeds that all weightings have.

    Bars are 95 % bootstrap intervals of the means. They hold the spread of seeds, which pairs
    share: differences are in the next figure.
    """
    methods = list(dict.fromkeys(group[:2] for group in groups(study).values()))
    figure = new_figure(figsize=(4.5 * len(methods), 6.5), layout="constrained")
    axes = figure.subplots(2, len(methods), squeeze=False)
    for (row, column), panel in np.ndenumerate(axes):
        (task, method), lines = methods[column], defaultdict(list)
        score = SCORES[task][row]
        for group in groups(study).values():
            found = matched(study, group, score) if group[:2] == (task, method) else {}
            for name, values in found.items():
                bar = np.abs(np.subtract(interval(values[:, 0]), values.mean()))
                lines[name].append((100 * (1 - group[2][0]), values.mean(), bar))
        for name, points in lines.items():
            x, means, bars = zip(*points, strict=True)
            style = dict(zip(("color", "marker", "ls"), study.styles[name], strict=True))
            panel.errorbar(x, means, np.transpose(bars), elinewidth=1, ms=4, label=name, **style)
        if start := study.results.get(Cell(task, DENSE, 1.0, NONE, 0)):
            panel.axhline(start[score], color="gray", lw=1, label="dense start")
        panel.set(title=f"{task}, {method}", ylabel=f"validation {score}", xlabel="pruned, %")
        panel.legend(fontsize="small")
    return figure


def plot_differences(study: Study):
    """Paired differences of the validation loss; left of zero the weighting is better.

    A dot a seed, the mean, and its 95 % bootstrap interval.
    """
    found = groups(study)
    figure = new_figure(figsize=(9, 2.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, sharey="row", squeeze=False)
    for (row, column), panel in np.ndenumerate(axes):
        title, group = list(found.items())[row]
        baseline, names = (NONE, SHUFFLED)[column], weightings(study, group)
        for place, name in enumerate(names):
            pair = matched(study, group, "loss", [name, baseline])
            if name != baseline and pair:
                losses = (pair[name] - pair[baseline])[:, 0]
                colour, marker, _ = study.styles[name]
                panel.plot(losses, [place] * len(losses), marker, ms=3, alpha=0.4, color=colour)
                panel.plot(interval(losses), [place, place], lw=2, color=colour)
                panel.plot(losses.mean(), place, marker, ms=6, color=colour)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_yticks(range(len(names)), names)
        panel.set(title=f"{title}, against {baseline}", xlabel="difference in validation loss")
        panel.set_ylim(len(names) - 0.5, -0.5)
    return figure


def main(args: argparse.Namespace) -> None:
    """Runs the cells that have no result, and reports."""
    if args.preset:  # small models are slower on more threads; before torch is imported
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    study = open_study(args)
    own = share(list(study.cells), args.cells or "1/1")
    if not args.file.exists():
        write_study(study, args.file)
    if not args.report:
        run_cells(study, [cell for cell in own if cell not in study.results], args)
    if not args.cells:
        write_study(study, args.file)
        print(f"wrote {report(study, args.file)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=["embedded"], help="study of configs/studies")
    add("--config", type=user_path, help="YAML file of captions or NLVR2, for a new study")
    add("--id_profile", type=user_path, help="IDs by layer, for a new study")
    add("--file", type=user_path, help="JSON of the study (preset: docs/study.json)")
    add("--output_dir", type=user_path, default="output/study", help="folder of the cells")
    add("--cells", metavar="I/N", help="the I-th of N shares, without a report")
    add("--processes", type=COUNT, help="cells at a time (default: CPUs for the preset, else 1)")
    add("--report", action="store_true", help="page and figures of what has run")
    add("flags", nargs="*", help="after --: flags of the training script, for a new study")
    args = parser.parse_args(argv)
    if args.preset and (args.config or args.id_profile):
        parser.error("--preset has a config of its own: leave it out, or --config and its flags")
    if args.flags and not args.config:
        parser.error("flags after -- are a new study's: they go with --config")
    if bool(args.config) != bool(args.id_profile) or not (args.preset or args.config or args.file):
        parser.error("what to study? Give --preset, --config with --id_profile, or --file")
    args.file = Path(args.file or ("docs" if args.preset else "output/study") + "/study.json")
    args.output_dir = Path(args.output_dir)
    args.processes = args.processes or (available_cpus() if args.preset else 1)
    return args


if __name__ == "__main__":
    launch(main, parse_args())
