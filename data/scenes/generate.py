"""Writes the embedded data: pictures, captions and statements in the published layouts."""

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

from data.scenes.pictures import Scene, random_scene, render
from data.scenes.statements import random_pairs
from data.scenes.words import describe, vocabulary
from utils import UserError, atomic_write, write_json

VERSION = 3  # raise when the same arguments give other data
FIRST_ID = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # no two images share a COCO id
REFERENCES = 5  # captions of a held-out image


def generate(settings: dict, root: Path) -> None:
    """Writes the data of the command's settings into an empty folder."""
    seed = settings["seed"]
    for split, first in FIRST_ID.items():
        scenes = []
        (root / "images" / split).mkdir(parents=True)
        for number in range(settings[split]):
            rng = random.Random(f"{seed} {split} {number}")
            scenes.append(random_scene(rng))
            path = root / "images" / image_name(split, first + number)
            render(scenes[-1], rng).save(path, compress_level=1)
        write_captions(split, scenes, random.Random(f"{seed} {split} captions"), root)
        write_statements(split, scenes, settings, root)
    with atomic_write(root / "tokenizer" / "vocab.txt") as file:
        file.writelines(f"{word}\n" for word in vocabulary())
    write_json(root / "settings.json", settings)


def image_name(split: str, coco_id: int) -> str:
    """The file of an image below the image root."""
    return f"{split}/scene_{coco_id:07d}.png"


def write_captions(split: str, scenes: list[Scene], rng: random.Random, root: Path) -> None:
    """Writes a split's captions in COCO's and Flickr30k's layout, and what the scenes show."""
    images, annotations, truth, train = [], [], [], []
    for number, scene in enumerate(scenes):
        coco_id = FIRST_ID[split] + number
        name = image_name(split, coco_id)
        attributes = [item.attributes for item in scene.objects]
        wanted = 1 if split == "train" else REFERENCES
        captions = describe(attributes, scene.side, scene.background, wanted, rng)
        truth.append({"image_id": coco_id, "image": name, **asdict(scene)})
        images.append({"image": name, "caption": captions})
        for caption in captions:
            train.append({"image_id": f"scene_{coco_id}", "image": name, "caption": caption})
            annotations.append({"image_id": coco_id, "id": len(annotations), "caption": caption})
    annotation = root / "annotation"
    write_json(annotation / f"scenes_{split}.json", truth)
    for layout in ("coco_karpathy", "flickr30k"):  # they differ in nothing but their names
        rows = train if split == "train" else images
        write_json(annotation / f"{layout}_{split}.json", rows)
    if split != "train":
        ids = [{"id": row["image_id"]} for row in truth]
        references = {"annotations": annotations, "images": ids}
        write_json(annotation / f"coco_karpathy_{split}_gt.json", references)


def write_statements(split: str, scenes: list[Scene], settings: dict, root: Path) -> None:
    """Writes a split's statements in the NLVR2 layout."""
    count = settings["statements" if split == "train" else "heldout_statements"]
    rng = random.Random(f"{settings['seed']} {split} statements")
    rows = [
        {
            "sentence": statement.text(),
            "label": str(truth),
            "images": [image_name(split, FIRST_ID[split] + index) for index in pair],
        }
        for statement, pair, truth in random_pairs(scenes, count, rng)
    ]
    name = "dev" if split == "val" else split
    write_json(root / "annotation" / f"nlvr_{name}.json", rows)


def make(out: str | Path, settings: dict) -> bool:
    """Generates the data unless the folder has it; the folder appears complete or not at all.

    Data of other settings are replaced. Returns whether anything had to be done.
    """
    out, settings = Path(out), {"version": VERSION, **settings}
    if out.exists():
        known = out / "settings.json"
        if not known.is_file():
            raise UserError(f"{out} exists and was not made by data.scenes: choose another --out")
        if json.loads(known.read_text()) == settings:
            return False
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        generate(settings, unfinished)
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return True
