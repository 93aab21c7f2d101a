"""A contact sheet: a few images with the captions that several models give them."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import Dataset

COLUMNS = 4
WIDTH = 34  # of a caption line, in characters


def contact_sheet(
    dataset: Dataset, captions: dict[str, list[dict]], path: str | Path, samples: int
) -> None:
    """Draws images spread evenly over a split, each above one caption a model.

    Args:
        dataset: evaluation split; `image_paths(index)[0]` is a picture, `[index][1]` its id.
        captions: results by the name to show, for instance `{"dense": ..., "pruned": ...}`.
        path: PNG file to write.
        samples: number of images; at most those of the split are drawn.
    """
    samples = min(samples, len(dataset))
    by_id = {
        name: {result["image_id"]: result["caption"] for result in results}
        for name, results in captions.items()
    }
    rows = -(-samples // COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, (2.6 + 0.5 * len(captions)) * rows), layout="tight")
    for place in range(samples):
        index = place * len(dataset) // samples
        image_id = dataset[index][1]
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        with Image.open(dataset.image_paths(index)[0]) as image:
            axes.imshow(image.convert("RGB"))
        axes.axis("off")
        lines = [
            textwrap.fill(f"{name}: {of_image[image_id]}", WIDTH)
            for name, of_image in by_id.items()
        ]
        axes.set_title("\n".join(lines), y=-0.04, va="top", ha="left", x=0.0, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
