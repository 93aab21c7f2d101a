"""The embedded data: little scenes in the layouts of COCO (Karpathy split), NLVR2 and Flickr30k."""

import json
from pathlib import Path

from data.scenes.words import attributes_correct


def attribute_accuracy(results: list[dict], scenes_path: str | Path) -> float:
    """Share of captions that name size, colour and kind of every object they mention correctly.

    Results are dictionaries of `image_id` (the COCO id) and `caption`; `scenes_path` is the split's
    `scenes_*.json`. A caption that mentions no object is wrong.
    """
    scenes = {
        scene["image_id"]: [(o["size"], o["colour"], o["kind"]) for o in scene["objects"]]
        for scene in json.loads(Path(scenes_path).read_text())
    }
    correct = [attributes_correct(row["caption"], scenes[row["image_id"]]) for row in results]
    return sum(correct) / len(correct)
