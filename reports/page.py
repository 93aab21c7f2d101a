"""The page of runs: what page.html shows of them, figures and pictures included."""

import base64
import io
import re
import shlex
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import torch
from jinja2 import Template
from matplotlib.figure import Figure
from PIL import Image

from data.images import BadImageError, open_image
from data.records import CAPTION_EVALUATION, read_records
from dimension.figures import plot_comparison, plot_depth
from dimension.profile import IDProfile, load_profile
from engine.processes import machine_of
from engine.tasks import TASKS
from models.checkpoint import load_trained
from reports import costs
from reports.costs import times, with_prefix
from reports.figures import plot_sparsity
from reports.runs import RunFolder
from utils import UserError

PICTURES = 8
SIDE = 320  # pixels of a picture, at most
FIGURE, DPI = (5.6, 4.0), 160  # inches: letters stay readable on a phone
MAIN_SCORES = {"CIDEr": "CIDEr", "accuracy": "test accuracy", "r_mean": "mean recall"}
Runs = dict[str, RunFolder]  # by label
Costs = dict[str, dict | str]  # by label: results of `costs.report`, or why there is none


def build_page(runs: Runs, found: Costs, command: str) -> bytes:
    """The page of at least one run, with the results of `measure_costs` and its own command."""
    sections = {
        "Scores": {
            "rows": rows([run.scores for run in runs.values()]),
            "notes": [remark for run in runs.values() for remark in run.remarks],
        },
        "Where sparsity went, by modality and layer": {
            "rows": rows([run.shares for run in runs.values()]),
            "figures": _sparsity(runs),
        },
        "Error of each layer's output": {"figures": _errors(runs)},
        "Intrinsic dimension by layer": _profiles(runs),
        "Size and speed": _costs(found),
        "Test pictures": _captions(runs),
        "Commands": _commands(runs, command),
    }
    source = Path(__file__).with_name("page.html").read_text("utf-8")
    template = Template(source, autoescape=True, trim_blocks=True)
    page = template.render(runs=list(runs), finding=finding(runs), sections=sections)
    return page.encode("utf-8", "replace")


def rows(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    """A table's cells by line; a cell is empty where a run has no such line."""
    lines = dict.fromkeys(line for column in columns for line in column)
    return {line: [column.get(line, "") for column in columns] for line in lines}


def finding(runs: Runs) -> str:
    """A sentence on the main score at each sparsity and without pruning; "" without a score."""
    tests = {name: run.results.get("test", {}) for name, run in runs.items() if run.sparsity}
    score = next((x for x in MAIN_SCORES if any(x in test for test in tests.values())), None)
    if score is None:
        return ""
    word, by_sparsity = MAIN_SCORES[score], defaultdict(dict)
    for name, test in tests.items():
        if score in test:
            share = f"{100 * runs[name].sparsity['overall']:.3g}"
            by_sparsity["0" if float(share) < 1 else share][name] = test[score]
    clauses, dense = [], next(iter(by_sparsity.pop("0", {}).values()), None)
    for share, values in by_sparsity.items():
        verb = "is"
        if dense is not None:
            low, high = min(values.values()), max(values.values())
            verb = "falls" if high < dense else "rises" if low > dense else "goes"
            verb += f" from {dense:#.3g} to"
        shown = " and ".join(f"{value:#.3g} ({name})" for name, value in values.items())
        clauses.append(f"at {share} % sparsity {word} {verb} {shown}")
    sentence = "; ".join(clauses) or f"without pruning {word} is {dense:#.3g}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def image(content: Figure | Image.Image) -> str:
    """A figure or a picture, made small, as an address that holds its bytes."""
    file = io.BytesIO()
    if isinstance(content, Figure):
        content.set_size_inches(*FIGURE)
        content.savefig(file, format="png", dpi=DPI)
    else:
        content.thumbnail((SIDE, SIDE))
        content.save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _sparsity(runs: Runs) -> list[tuple[str, str]]:
    reports = {n: x.sparsity for n, x in runs.items() if x.sparsity and x.sparsity["pruned"]}
    shown = [share for report in reports.values() for share in report["by_layer"].values()]
    lowest = int(10 * min(shown, default=0)) / 10
    return [
        (image(plot_sparsity(name, report, lowest)), f"share of zeros by block, {name}")
        for name, report in reports.items()
    ]


def _errors(runs: Runs) -> list[tuple[str, str]]:
    """A figure for each model pruned at once."""
    figures = []
    for name, run in runs.items():
        shown = {layer: x for layer, x in run.at_once.items() if x["error"]}
        kinds, errors = ({n: x[key] for n, x in shown.items()} for key in ("kind", "error"))
        means = {k: fmean(errors[n] for n in errors if kinds[n] == k) for k in kinds.values()}
        if shown:
            report = {"by_layer": errors, "by_modality": means, "kinds": kinds}
            report["overall"] = fmean(errors.values())
            figure = plot_sparsity(name, report, 0, "relative error")
            figures.append((image(figure), f"relative error of each layer's output, {name}"))
    return figures


def _profiles(runs: Runs) -> dict[str, list]:
    """Figures of the IDs that weighted scores, and what is wrong with other profiles."""
    figures, notes = [], []
    for path in dict.fromkeys(run.id_profile for run in runs.values() if run.id_profile):
        try:
            figure = plot_comparison({Path(path).stem: load_profile(path)})
            with suppress(UserError):  # a published profile has no error bars
                figure = plot_depth(IDProfile.read(path))
            figures.append((image(figure), f"intrinsic dimension by layer, {path}"))
        except UserError as error:
            notes.append(f"{error}.")
    return {"figures": figures, "notes": notes}


def measure_costs(runs: Runs) -> Costs:
    """Measures each run's model on the CPU."""
    found: Costs = {}
    for name, run in runs.items():
        try:
            if run.config is None:
                raise UserError("its folder names no config of this project")
            model = TASKS[run.config["task"]].build_model(run.config).eval()
            load_trained(model, str(run.weights))
            found[name] = costs.report(model, run.config)
        except UserError as error:
            found[name] = str(error)
    return found


def short_costs(found: dict) -> dict[str, str]:
    """Costs for the printed table, by column."""
    return {
        "nonzeros": with_prefix(sum(found["nonzeros"].values())),
        "bytes": with_prefix(found["bytes"]["dense float32"]),
        "compressed": with_prefix(found["bytes"]["compressed float32"]),
        "multiply-adds": with_prefix(sum(found["multiply_adds"]["effective"].values())),
        "ms": times(found["dense"]),
        "ms sparse": times(found["sparse"]),
    }


def _costs(found: Costs) -> dict:
    notes = [f"Without {name}: {why}." for name, why in found.items() if isinstance(why, str)]
    if len(notes) < len(found):
        cpu = machine_of(torch.device("cpu"))
        here = f"{cpu['processor']}, threads: {cpu['threads']}"
        repeats = f"median (least–most) of {costs.REPEATS} repeats"
        notes.insert(0, f"Milliseconds of one sample on {here}; {repeats}.")
    columns = [{} if isinstance(x, str) else costs.lines(x) for x in found.values()]
    return {"rows": rows(columns), "notes": notes}


def _captions(runs: Runs) -> dict[str, list]:
    """A few test pictures, with captions of the runs on the first run's data."""
    captioned = {name: run for name, run in runs.items() if run.captions and run.config}
    if not captioned:
        return {}
    first = next(iter(captioned.values()))
    shown = {name: run for name, run in captioned.items() if _same_data(run, first)}
    references = next((run.references for run in shown.values() if run.references), {})
    common = [x for x in first.captions if all(x in run.captions for run in shown.values())]
    count = min(PICTURES, len(common))
    chosen = [common[place * len(common) // count] for place in range(count)]
    annotation = Path(first.config["ann_root"], "coco_karpathy_test.json")
    found = read_records(annotation, CAPTION_EVALUATION) if annotation.is_file() else []
    files = {x["image_id"]: Path(first.config["image_root"], x["image"]) for x in found}
    pictures, lost = [], []
    for key in chosen:
        known = references.get(key, [])
        captions = {name: marked(run.captions[key], known) for name, run in shown.items()}
        picture = {"name": key, "references": known, "captions": captions}
        try:
            picture["source"] = image(open_image(str(files.get(key))))
        except BadImageError:
            lost.append(str(files.get(key, annotation)))
        pictures.append(picture)
    notes = ["Marked words stand in none of a picture's references."] * bool(references)
    notes += [f"Not found or not readable: {', '.join(dict.fromkeys(lost))}."] * bool(lost)
    if others := ", ".join(name for name in captioned if name not in shown):
        notes.append(f"Without runs of another ann_root or image_root: {others}.")
    return {"pictures": pictures, "notes": notes}


def _same_data(run: RunFolder, other: RunFolder) -> bool:
    """Whether two runs captioned the same data as far as is known; other data may reuse ids."""
    if run.references and other.references and run.references != other.references:
        return False
    roots = [[Path(x.config[key]) for x in (run, other)] for key in ("ann_root", "image_root")]
    return all(not (a.exists() and b.exists()) or a.samefile(b) for a, b in roots)


def marked(caption: str, references: list[str]) -> list[tuple[str, bool]]:
    """The caption's pieces in order, and whether each is a word that no reference has."""
    known = set(re.findall(r"\w+", " ".join(references).lower()))
    pieces = re.split(r"(\w+)", caption)
    return [(x, bool(known) and x.isalnum() and x.lower() not in known) for x in pieces]


def _commands(runs: Runs, command: str) -> dict[str, list]:
    records = [(name, record) for name, run in runs.items() for record in run.records]
    typed = [shlex.join(["python", *x["argv"]]) for _, x in records if x.get("argv")]
    notes = [
        f"Not every command of {name} was recorded: its folder is of an earlier version."
        for name in dict.fromkeys(name for name, record in records if not record.get("argv"))
    ]
    return {"commands": [*dict.fromkeys(typed), command], "notes": notes}
