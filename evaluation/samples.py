"""A contact sheet: a few images with the captions that several models give them."""

from pathlib import Path

from torch.utils.data import Dataset


def contact_sheet(
    dataset: Dataset, captions: dict[str, list[dict]], path: str | Path, samples: int
) -> None:
    """Draws images spread evenly over a split, each with one line of caption a model.

    Args:
        dataset: evaluation split; `image_paths(index)[0]` is the picture, `[index][1]` its id.
        captions: results by the name shown, for instance `{"dense": [...], "pruned": [...]}`.
        path: PNG file to write.
        samples: number of images.
    """
    raise NotImplementedError
