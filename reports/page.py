"""The parts of a report's page: tables, figures and pictures as HTML without any other file."""

import base64
import io
import shlex
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

import torch
from matplotlib.figure import Figure
from PIL import Image

from ComputeID import parse_args as parse_profile_flags
from data.image_dataset import BadImageError, open_image
from data.records import CAPTION_EVALUATION, read_records
from dimension.figures import plot_comparison, plot_depth
from dimension.profile import IDProfile, load_profile
from engine.flags import command_line
from engine.tasks import TASKS
from models.checkpoint import load_trained
from reports import costs
from reports.figures import plot_sparsity, spread
from reports.runs import RunFolder
from reports.tables import shares
from utils import UserError

PICTURES = 8
SIDE = 320  # pixels of a picture, at most
FIGURE, DPI = (5.6, 4.0), 160  # inches: letters stay readable on a phone
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1120px; padding: 0 16px 48px; }
h1 { font-size: 1.6rem; margin: 1.2em 0 0.4em; } h2 { font-size: 1.2rem; margin: 2em 0 0.5em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; } th:first-child { text-align: left; font-weight: normal; }
thead th { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 16px; } .figures img { width: 100%; max-width: 640px; height: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr));
  gap: 24px; } .pictures img { width: 100%; height: auto; image-rendering: pixelated; }
figure { margin: 0; } dl { margin: 0.4em 0 0; font-size: 0.9rem; line-height: 1.4; }
dt { color: #666; } dd { margin: 0 0 0.4em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: 10px 12px;
  font-size: 0.85rem; } .note { color: #666; font-size: 0.9rem; }
@media (max-width: 600px) { table { font-size: 0.8rem; } th, td { padding-right: 8px; }
  th { white-space: normal; } .pictures { grid-template-columns: 1fr 1fr; gap: 16px; } }
"""


def element(tag: str, *children: "Element | str", **attributes: str) -> Element:
    """An element with attributes, and text and elements in it, which are escaped when written."""
    made = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def build_page(runs: list[RunFolder], found: list[dict | None], command: str) -> bytes:
    """The page of some runs.

    Args:
        runs: at least one.
        found: of `measure_costs`.
        command: that makes the page.
    """
    labels = label(runs)
    sections = [
        scores(runs, labels),
        sparsity(runs, labels),
        profiles(runs),
        size_and_speed(found, labels),
        captions(runs, labels),
        commands(runs, command),
    ]
    title = f"Runs: {', '.join(labels)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    body = element("body", element("h1", title), *(part for part in sections if part is not None))
    page = tostring(element("html", head, body, lang="en"), encoding="unicode", method="html")
    return ("<!DOCTYPE html>\n" + page).encode("utf-8", "replace")


def label(runs: list[RunFolder]) -> list[str]:
    """The runs' names, or their paths where two have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def section(title: str, *parts: Element) -> Element | None:
    """A part of the page under its title; None if there is nothing to show."""
    return element("section", element("h2", title), *parts) if parts else None


def note(text: str) -> Element:
    """A remark in small grey letters."""
    return element("p", text, class_="note")


def table(columns: dict[str, dict[str, str]]) -> list[Element]:
    """A column of values for each run; values that no run has leave no line.

    Args:
        columns: run's label to what it has, by the name of the line.
    """
    lines = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not lines:
        return []
    head = element("tr", element("th"), *(element("th", name, scope="col") for name in columns))
    body = [
        element(
            "tr",
            element("th", line, scope="row"),
            *(element("td", column.get(line, "")) for column in columns.values()),
        )
        for line in lines
    ]
    made = element("table", element("thead", head), element("tbody", *body))
    return [element("div", made, class_="wide")]


def embedded(content: Figure | Image.Image, described: str) -> Element:
    """A figure or picture as an image whose bytes are in the page."""
    file = io.BytesIO()
    if isinstance(content, Figure):
        content.set_size_inches(*FIGURE)
        content.savefig(file, format="png", dpi=DPI)
    else:
        content.save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return element("img", src=f"data:image/png;base64,{data}", alt=described)


def scores(runs: list[RunFolder], labels: list[str]) -> Element | None:
    """Sparsity and scores of all runs."""
    columns = {
        name: (shares(run.sparsity) if run.sparsity else {}) | run.scores
        for name, run in zip(labels, runs, strict=True)
    }
    remark = "Captions' scores and recalls are of the test split; they vary with the processor."
    remarks = [remark] if any(columns.values()) else []
    for run in runs:
        remarks += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in run.remarks]
    return section("Scores", *table(columns), *map(note, remarks))


def sparsity(runs: list[RunFolder], labels: list[str]) -> Element | None:
    """Where sparsity went: a figure for each pruned run."""
    figures = [
        embedded(plot_sparsity({name: run.sparsity}), f"share of zeros by block, {name}")
        for name, run in zip(labels, runs, strict=True)
        if run.sparsity and run.sparsity["pruned"]
    ]
    title = "Where sparsity went, by modality and layer"
    return section(title, *([element("div", *figures, class_="figures")] if figures else []))


def profiles(runs: list[RunFolder]) -> Element | None:
    """The IDs that weighted scores, by layer; those whose files are there."""
    paths = dict.fromkeys(run.id_profile for run in runs if run.id_profile)
    figures = [
        embedded(plot_profile(path), f"intrinsic dimension by layer, {path}")
        for path in paths
        if Path(path).exists()
    ]
    title = "Intrinsic dimension by layer"
    return section(title, *([element("div", *figures, class_="figures")] if figures else []))


def plot_profile(path: str) -> Figure:
    """A profile with its error bars; a published one has none."""
    try:
        return plot_depth(IDProfile.read(path))
    except UserError:
        return plot_comparison({Path(path).stem: load_profile(path)})


def measure_costs(runs: list[RunFolder]) -> list[dict | None]:
    """What `costs.report` finds of each run's model, on the CPU; None where it is not there.

    A model whose tokenizer, say, is not to be had is passed over with a printed sentence.
    """
    found: list[dict | None] = []
    for run in runs:
        found.append(None)
        if run.config is None or run.weights is None:
            continue
        try:
            model = TASKS[run.config["task"]].build_model(run.config).eval()
            load_trained(model, str(run.weights))
            found[-1] = costs.report(model, run.config)
        except UserError as error:
            print(f"size and speed of {run.folder} are left out: {error}")
    return found


def short_costs(found: dict) -> dict[str, str]:
    """A few columns of costs for a table of runs."""
    adds, sizes = found["multiply_adds"]["effective"], found["bytes"]
    return {
        "nonzeros": with_prefix(sum(found["nonzeros"].values())),
        "bytes": with_prefix(sizes["dense float32"]),
        "compressed": with_prefix(sizes["compressed float32"]),
        "multiply-adds": with_prefix(sum(adds.values())),
        "ms": f"{found['dense']['milliseconds']:.1f}",
        "ms sparse": f"{found['sparse']['milliseconds']:.1f}",
    }


def all_costs(found: dict) -> dict[str, str]:
    """All that was measured, by the name of its line."""
    adds = {f"multiply-adds, {form}": counts for form, counts in found["multiply_adds"].items()}
    lines = {}
    for what, counts in ({k: found[k] for k in ("parameters", "nonzeros")} | adds).items():
        lines |= {f"{what}, {kind}": with_prefix(count) for kind, count in counts.items()}
    lines |= {f"bytes, {form}": with_prefix(count) for form, count in found["bytes"].items()}
    for form in ("dense", "sparse"):
        lines[f"ms an image, {form}"] = f"{found[form]['milliseconds']:.1f}"
    return lines


def with_prefix(count: float) -> str:
    """Three digits and a prefix, as 1.13 M."""
    count = float(f"{count:.3g}")  # rounded first, for 999,600 is 1 M and not 1e+03 k
    for unit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"


def size_and_speed(found: list[dict | None], labels: list[str]) -> Element | None:
    """What the models cost, and where that was measured."""
    columns = {
        name: all_costs(one) for name, one in zip(labels, found, strict=True) if one is not None
    }
    if not columns:
        return None
    threads = torch.get_num_threads()
    where = f"Milliseconds of one sample on {costs.processor()}, threads: {threads}."
    return section("Size and speed", *table(columns), note(where))


def captions(runs: list[RunFolder], labels: list[str]) -> Element | None:
    """A few test pictures with the captions of all runs that have some of the first one's data.

    Another data set may give its ids to other pictures.
    """
    captioned = {
        name: run for name, run in zip(labels, runs, strict=True) if run.captions and run.config
    }
    if not captioned:
        return None
    annotations, images = first = data_folders(next(iter(captioned.values())))
    annotation = annotations / "coco_karpathy_test.json"
    if not annotation.is_file():
        return None
    told = {name: run for name, run in captioned.items() if data_folders(run) == first}
    figures = pictures(told, read_records(annotation, CAPTION_EVALUATION), images)
    if not figures:
        return None
    parts = [element("div", *figures, class_="pictures")]
    if others := [name for name in captioned if name not in told]:
        parts.append(note(f"Without runs of another ann_root or image_root: {', '.join(others)}."))
    return section("Test pictures", *parts)


def data_folders(run: RunFolder) -> tuple[Path, Path]:
    """The folders of a run's annotations and of its images, the same however they are written."""
    return Path(run.config["ann_root"]).resolve(), Path(run.config["image_root"]).resolve()


def pictures(told: dict[str, RunFolder], records: list[dict], images: Path) -> list[Element]:
    """A few pictures that all runs have captioned, with the captions under them.

    Args:
        told: runs by label.
        records: of the test split.
        images: folder of their files.
    """
    files = {row["image_id"]: row["image"] for row in records}
    common = [image for image in files if all(image in run.captions for run in told.values())]
    figures = []
    for image in spread(common, PICTURES):
        try:
            picture = open_image(str(images / files[image]))
        except BadImageError:
            continue
        picture.thumbnail((SIDE, SIDE))
        of_runs = [
            part
            for name, run in told.items()
            for part in (element("dt", name), element("dd", run.captions[image]))
        ]
        drawn = embedded(picture, f"test picture {image}")
        figures.append(element("figure", drawn, element("dl", *of_runs)))
    return figures


def commands(runs: list[RunFolder], command: str) -> Element | None:
    """The commands that made the runs, as far as their folders tell, and the page."""
    lines = []
    for run in runs:
        lines += [profile_command(run)] if run.id_profile else []
        for made in (run.trained, run.evaluated):
            if made:
                task = made["config"]["task"]
                lines.append(command_line(TASKS[task].script, task, made["flags"]))
    lines = [line for line in dict.fromkeys([*lines, command]) if line]
    return section("Commands", *(element("pre", line) for line in lines))


def profile_command(run: RunFolder) -> str:
    """The command that measured a run's IDs, if one did, and with the run's own config; or ""."""
    path = Path(run.id_profile)
    try:
        settings = IDProfile.read(path).settings
        theirs, ours = settings["config"], run.trained["config"]
        same = settings["checkpoint"] == ours["pretrained"]
        if not same or any(ours.get(key) != value for key, value in theirs.items()):
            return ""
        if "block_seed" in settings:  # a second command, with -s, estimated them again
            return ""
        flags = {name: run.trained["flags"][name] for name in ("config", "pretrained")}
        known = "seed fraction keep_padding save_distances".split()
        flags |= {name: settings[name] for name in known}
        flags["skip_bad_images"] = settings["bad_images"] > 0
        # always: the default batch size is of the config's file, which may have changed
        always = ["-n", settings["nsamples"], "--batch_size", settings["batch_size"]]
    except (UserError, KeyError):
        return ""
    defaults = vars(parse_profile_flags([]))
    words = ["python", "ComputeID.py", *map(str, always)]
    for name, value in flags.items():
        if value != defaults[name]:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join([*words, "--Path", str(path if path.is_dir() else path.parent)])
