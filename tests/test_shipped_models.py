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
from evaluation import retrieval
from evaluation.retrieval import evaluate_retrieval, recalls
from models import build_captioner, build_clip, build_nlvr, load_checkpoint
from tests.runs import make_scenes

SCENES = 110


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


@torch.no_grad()
def test_clip_finds_the_captions_of_pictures(root, monkeypatch):
    """By cosines of all pictures and texts, of which there are more than the original's 512."""
    config, model = shipped(root, "retrieval", build_clip)
    val = build_flickr_datasets(config)[1]
    monkeypatch.setattr(retrieval, "recalls", lambda *arguments: arguments)
    options = EvalOptions(config | {"num_workers": 0, "eval_batch_size": 33})
    cosines, image_of_text = evaluate_retrieval(model, val, "val", options)["scores"]
    images = model.encode_image(torch.stack([val[index][0] for index in range(SCENES)]))
    texts = model.encode_text(model.tokenize([val.texts[n][0] for n in range(len(val.texts))])[0])
    expected = torch.cosine_similarity(images[:, None], texts[None], dim=-1)
    assert expected.shape == (SCENES, 5 * SCENES)
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)  # float32 sums of hundreds
    found = recalls(cosines, image_of_text)
    assert found["txt_r1"] >= 80 and found["img_r1"] >= 80
