"""Figures of results: where sparsity went, and pictures with their captions."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from data.caption_dataset import CaptionEvalDataset
from data.image_dataset import open_image
from dimension.figures import KINDS, layer_kind
from models.layers import modality

COLUMNS = 4
SIDE, MARGIN = 3.0, 0.1  # inches of a picture, and between pictures
FONT = FontProperties(size=8)
LINE = 1.2 * 8 / 72  # inches
DPI = 120


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
    indices = [
        index
        for index, record in enumerate(dataset.records)
        if all(record["image_id"] in of_image for of_image in by_id.values())
    ]
    shown = spread(indices, samples)
    pictures = [dataset.image_paths(index)[0] for index in shown]
    ids = [dataset.records[index]["image_id"] for index in shown]
    texts = [{name: of_image[i] for name, of_image in by_id.items()} for i in ids]
    figure = draw_sheet(list(map(open_image, pictures)), texts)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def spread(items: list, count: int) -> list:
    """As many as `count` of the items, evenly spread over them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def draw_sheet(pictures: list[Image.Image], texts: list[dict[str, str]]) -> Figure:
    """Draws pictures in columns, with texts below each that stay within its column.

    Args:
        pictures: RGB.
        texts: of each picture, by name.
    """
    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, FONT, ismath=False)[0] <= SIDE * DPI

    blocks = [
        [line for name, text in of.items() for line in wrap(f"{name}: {text}", fits)]
        for of in texts
    ]
    height = SIDE + MARGIN + LINE * max(map(len, blocks), default=0) + MARGIN  # of a row
    rows = -(-len(pictures) // COLUMNS)
    width, total = COLUMNS * (SIDE + MARGIN) + MARGIN, max(rows * height, SIDE)
    figure.set_size_inches(width, total)
    for place, (picture, lines) in enumerate(zip(pictures, blocks, strict=True)):
        row, column = divmod(place, COLUMNS)
        left, top = MARGIN + column * (SIDE + MARGIN), total - row * height
        bottom = top - MARGIN - SIDE
        axes = figure.add_axes(
            (left / width, bottom / total, SIDE / width, SIDE / total), anchor="SW"
        )
        axes.imshow(picture)
        axes.axis("off")
        figure.text(
            left / width,
            (bottom - MARGIN / 2) / total,
            "\n".join(lines),
            va="top",
            linespacing=1.2,
            parse_math=False,  # "$5" is money
            fontproperties=FONT,
        )
    return figure


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Breaks a text between words, and a word that does not fit on a line within it."""
    lines, line = [], ""
    for word in text.split():
        if fits(joined := f"{line} {word}".strip()):
            line = joined
            continue
        lines.append(line)
        while not fits(word) and len(word) > 1:
            end = next((end for end in range(len(word) - 1, 1, -1) if fits(word[:end])), 1)
            lines.append(word[:end])
            word = word[end:]
        line = word
    return [line for line in [*lines, line] if line]


def plot_sparsity(reports: dict[str, dict]) -> Figure:
    """Draws sparsity against depth, vision and language told apart, one panel a report.

    Args:
        reports: panel title to result of `sparsity_report`.
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
    return figure


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
