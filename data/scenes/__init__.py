"""The embedded data: little scenes in the layouts of COCO (Karpathy split), NLVR2 and Flickr30k."""

import json
from collections import Counter
from pathlib import Path

from data.scenes.words import MENTION


def attribute_accuracy(results: list[dict], scenes_path: str | Path) -> float:
    """Share of captions that name size, colour and kind of every object they mention correctly.

    Results are dictionaries of `image_id` (the COCO id) and `caption`; `scenes_path` is the split's
    `scenes_*.json`. A caption that mentions no object is wrong.
    """
    scenes = {
        scene["image_id"]: [(o["size"], o["colour"], o["kind"]) for o in scene["objects"]]
        for scene in json.loads(Path(scenes_path).read_text())
    }
    correct = 0
    for row in results:
        mentions = Counter(MENTION.findall(row["caption"]))
        correct += bool(mentions) and not mentions - Counter(scenes[row["image_id"]])
    return correct / len(results)
