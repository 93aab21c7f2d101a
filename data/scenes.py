"""Generates the embedded data: scenes with COCO captions and NLVR2 statements.

    python -m data.scenes --out datasets/scenes

writes, in a few seconds and always the same for the same settings:

    images/{train,val,test}/scene_0000000.png     64 x 64 pixels, named by COCO id
    annotation/coco_karpathy_{train,val,test}.json and coco_karpathy_{val,test}_gt.json
    annotation/nlvr_{train,dev,test}.json         statements about pairs of the images
    annotation/scenes_{train,val,test}.json       what the pictures show, for attribute_accuracy
    tokenizer/vocab.txt                           WordPiece vocabulary
    settings.json                                 a run that finds its own settings does nothing
"""

import argparse
import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

from data.scene_pictures import Scene, random_scene, render
from data.scene_statements import random_pairs
from data.scene_words import attributes_correct, describe, vocabulary
from utils import write_json

VERSION = 2  # raise when the same arguments give other data
FIRST_ID = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # no two images share a COCO id
TRAIN_CAPTIONS, REFERENCES = 1, 5  # captions an image


def generate(settings: dict, root: Path) -> None:
    """Writes the data into a folder.

    Args:
        settings: `train`, `val`, `test` (scenes), `statements`, `heldout_statements`, `seed`.
        root: An empty folder.
    """
    seed = settings["seed"]
    for split, first in FIRST_ID.items():
        scenes = []
        (root / "images" / split).mkdir(parents=True)
        for number in range(settings[split]):
            rng = random.Random(f"{seed} {split} {number}")
            scene = random_scene(rng)
            path = root / "images" / image_name(split, first + number)
            render(scene, rng).save(path, compress_level=1)
            scenes.append(scene)
        write_captions(split, scenes, random.Random(f"{seed} {split} captions"), root)
        write_statements(split, scenes, settings, root)
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    write_json(root / "settings.json", settings)


def image_name(split: str, coco_id: int) -> str:
    """The file of an image below the image root."""
    return f"{split}/scene_{coco_id:07d}.png"


def write_captions(split: str, scenes: list[Scene], rng: random.Random, root: Path) -> None:
    """Writes a split's captions in the COCO-Karpathy layout, and what the scenes show."""
    images, annotations, truth, train = [], [], [], []
    for number, scene in enumerate(scenes):
        coco_id = FIRST_ID[split] + number
        name = image_name(split, coco_id)
        attributes = [item.attributes for item in scene.objects]
        captions = describe(
            attributes,
            scene.side,
            scene.background,
            TRAIN_CAPTIONS if split == "train" else REFERENCES,
            rng,
        )
        truth.append({"image_id": coco_id, "image": name, **asdict(scene)})
        images.append({"image": name, "caption": captions})
        for caption in captions:
            train.append({"image_id": f"scene_{coco_id}", "image": name, "caption": caption})
            annotations.append({"image_id": coco_id, "id": len(annotations), "caption": caption})
    annotation = root / "annotation"
    write_json(annotation / f"scenes_{split}.json", truth)
    if split == "train":
        write_json(annotation / "coco_karpathy_train.json", train)
        return
    write_json(annotation / f"coco_karpathy_{split}.json", images)
    write_json(
        annotation / f"coco_karpathy_{split}_gt.json",
        {"annotations": annotations, "images": [{"id": row["image_id"]} for row in truth]},
    )


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

    Args:
        out: Folder to write; data of other settings in it is replaced.
        settings: See `generate`.

    Returns:
        Whether anything had to be done.

    Raises:
        ValueError: If the folder holds something else.
    """
    out, settings = Path(out), {"version": VERSION, **settings}
    if out.exists():
        known = out / "settings.json"
        if not known.is_file():
            raise ValueError(f"{out} exists and was not made by data.scenes: choose another --out")
        if json.loads(known.read_text()) == settings:
            return False
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        generate(settings, unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return True


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Generates the embedded data.")
    parser.add_argument("--out", default="datasets/scenes", help="folder to write")
    parser.add_argument("--train", type=int, default=20000, help="scenes with a caption")
    parser.add_argument("--val", type=int, default=500, help="scenes with 5 references")
    parser.add_argument("--test", type=int, default=500, help="scenes with 5 references")
    parser.add_argument("--statements", type=int, default=40000, help="about training pairs")
    parser.add_argument("--heldout_statements", type=int, default=1000, help="in dev, and in test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Generates the data and says where it is."""
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    done = make(args.out, settings)
    print(f"{args.out}: {'written' if done else 'up to date'}")


if __name__ == "__main__":
    main(parse_args())
