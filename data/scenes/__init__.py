"""The embedded data: little scenes in the layouts of COCO (Karpathy split), NLVR2 and Flickr30k."""

import json
from pathlib import Path

from data.scenes.words import attributes_correct


def attribute_accuracy(results: list[dict], scenes_path: str | Path) -> float:
    """Share of captions that name size, colour and kind of every object they mention correctly.

    Args:
        results: Dictionaries with `image_id` (the COCO id) and `caption`.
        scenes_path: The split's `scenes_*.json`.

    Returns:
        A fraction in [0, 1]; a caption that mentions no object counts as wrong.
    """
    scenes = {
        scene["image_id"]: [(o["size"], o["colour"], o["kind"]) for o in scene["objects"]]
        for scene in json.loads(Path(scenes_path).read_text())
    }
    correct = [attributes_correct(row["caption"], scenes[row["image_id"]]) for row in results]
    return sum(correct) / len(correct)
