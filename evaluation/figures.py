"""Figures of results: where sparsity went, and pictures with their captions."""

import re
import textwrap
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from data.caption_dataset import CaptionEvalDataset, coco_id
from dimension.figures import KINDS, layer_kind
from models import modality

COLUMNS = 4
SIDE, TEXT = 3.0, 0.5  # inches of a picture, and of the room below it for each caption
LINE = 48  # characters


def contact_sheet(
    dataset: CaptionEvalDataset, captions: dict[str, list[dict]], path: str | Path, samples: int
) -> None:
    """Draws images spread evenly over those that have all captions, each above its captions.

    Args:
        dataset: evaluation split.
        captions: results by the name to show, for instance `{"dense": ..., "pruned": ...}`.
        path: PNG file to write.
        samples: number of images, at most.
    """
    by_id = {
        name: {result["image_id"]: result["caption"] for result in results}
        for name, results in captions.items()
    }
    files = [dataset.image_paths(index)[0] for index in range(len(dataset))]
    files = [
        file for file in files if all(coco_id(file) in of_image for of_image in by_id.values())
    ]
    samples = min(samples, len(files))
    rows = -(-samples // COLUMNS)
    text = TEXT * len(captions)
    figure = Figure(figsize=(SIDE * COLUMNS, (SIDE + text) * rows))
    figure.subplots_adjust(0.01, text / (SIDE + text) / rows, 0.99, 0.99, 0.05, text / SIDE)
    for place in range(samples):
        file = files[place * len(files) // samples]
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        with Image.open(file) as image:
            axes.imshow(image.convert("RGB"))
        axes.axis("off")
        lines = [
            textwrap.fill(f"{name}: {of_image[coco_id(file)]}", LINE)
            for name, of_image in by_id.items()
        ]
        axes.set_title("\n".join(lines), x=0, y=-0.03, va="top", ha="left", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_sparsity(reports: dict[str, dict], path: str | Path) -> None:
    """Draws sparsity against depth, vision and language told apart, one panel a report.

    Args:
        reports: panel title to result of `sparsity_report`.
        path: of the figure; its suffix tells the format.
    """
    figure = Figure(figsize=(1.5 + 5 * len(reports), 4.2), layout="constrained")
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for panel, (title, report) in zip(panels, reports.items(), strict=True):
        for kind, share in report["by_modality"].items():
            layers = {n: s for n, s in report["by_layer"].items() if modality(n) == kind}
            _plot_modality(panel, layers, f"{kind} ({share:.1%})", KINDS[kind][0])
        label = f"overall ({report['overall']:.1%})"
        panel.axhline(report["overall"], color="gray", linestyle="--", linewidth=1, label=label)
        panel.set(title=title, xlabel="transformer block", ylim=(-0.03, 1.03))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(title="line: mean of a block's layers", fontsize="small", title_fontsize=8)
    panels[0].set_ylabel("share of zeros")
    figure.savefig(path, dpi=150)


def _plot_modality(panel, layers: dict[str, float], label: str, color: str) -> None:
    """A dot for each layer, marked by its kind, and a line through the blocks' means."""
    blocks = defaultdict(list)
    for name, share in layers.items():
        block = int(re.search(r"\.(\d+)\.", name).group(1))
        blocks[block].append(share)
        _, marker, fill = KINDS[layer_kind(name)]
        panel.plot(block, share, marker, ms=4, fillstyle=fill, color=color, alpha=0.4)
    means = [sum(shares) / len(shares) for shares in blocks.values()]
    panel.plot(list(blocks), means, color=color, linewidth=2, label=label)
