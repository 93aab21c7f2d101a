"""The models that come with the repository, on held-out scenes: pruning needs something to lose."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from configs import load_config
from data.caption_dataset import build_caption_datasets
from data.flickr_dataset import build_flickr_datasets
from data.nlvr_dataset import build_nlvr_datasets
from data.scenes import attribute_accuracy
from engine.loading import EvalOptions
from evaluation.retrieval import evaluate_retrieval
from models import build_captioner, build_clip, build_nlvr, load_checkpoint
from tests.runs import make_scenes

SCENES = 100


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The first held-out scenes, and statements about them."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return make_scenes(folder, 40, SCENES, statements=8, heldout=200)


def shipped(root, task, build):
    """The demo config on these scenes, and its model with the weights it names."""
    folders = {"image_root": "images", "ann_root": "annotation", "tokenizer": "tokenizer"}
    folders |= {"coco_gt_root": "annotation"} if task == "caption" else {}
    changes = {key: str(root / folder) for key, folder in folders.items()}
    config = load_config(f"configs/{task}_demo.yaml", changes, task)
    assert Path(config["pretrained"]).stat().st_size <= 5_000_000
    model = build(config).eval()
    assert load_checkpoint(model, config["pretrained"]).initialised == []
    return config, model


def test_captioner_names_attributes(root):
    config, model = shipped(root, "caption", build_captioner)
    val = build_caption_datasets(config)[1]
    images = torch.stack([val[index][0] for index in range(SCENES)])
    lengths = {key: config[key] for key in ("num_beams", "max_length", "min_length")}
    captions = model.generate(images, **lengths)
    results = [
        {"image_id": val[index][1], "caption": caption} for index, caption in enumerate(captions)
    ]
    assert attribute_accuracy(results, root / "annotation/scenes_val.json") >= 0.85


@torch.no_grad()
def test_nlvr_model_judges_statements(root):
    config, model = shipped(root, "nlvr", build_nlvr)
    dev = build_nlvr_datasets(config)[1]
    left, right, _, labels = default_collate([dev[index] for index in range(len(dev))])
    statements = [dev.text(index) for index in range(len(dev))]
    correct = model.logits(left, right, statements).argmax(dim=1) == labels
    assert correct.float().mean() >= 0.85


def test_clip_finds_the_captions_of_pictures(root):
    config, model = shipped(root, "retrieval", build_clip)
    val = build_flickr_datasets(config)[1]
    options = EvalOptions(config | {"num_workers": 0})
    found = evaluate_retrieval(model, val, "val", options)["scores"]
    assert found["txt_r1"] >= 80 and found["img_r1"] >= 80
