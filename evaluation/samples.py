"""A contact sheet: a few images with the captions that several models give them."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from data.caption_dataset import CaptionEvalDataset, coco_id

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
