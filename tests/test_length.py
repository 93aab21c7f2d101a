"""What IDs are of: text lengths of neighbours, single channels, samples of one length."""

import pytest
import torch
from torch import nn

from configs import load_config
from data.caption_dataset import build_caption_datasets
from dimension import measure
from models import build_captioner
from tests.runs import compute_id, make_scenes, write_config
from utils import UserError

N = 60
LENGTHS = 3 + torch.arange(N) % 6
MASK = (torch.arange(8) < LENGTHS[:, None]).long()


class Texts(nn.Module):
    """Tokens that differ; tokens of which one channel is huge; the mean token of a text."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.plain, self.massive, self.pooled = (nn.Linear(16, 8) for _ in range(3))
        nn.init.constant_(self.massive.bias[3:4].data, 50.0)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        self.massive(x)
        mask = attention_mask[..., None]
        self.pooled((x * mask).sum(1) / mask.sum(1))
        return self.plain(x)


def batches(mask, size=7):
    ids = torch.randint(0, 40, mask.shape)
    parts = zip(ids.split(size), mask.split(size), strict=True)
    return ids, [{"input_ids": ids, "attention_mask": mask} for ids, mask in parts]


def test_each_layer_has_the_lengths_of_neighbours_and_its_largest_channel():
    """Of all samples and in any number of batches, against plain formulas on whole outputs."""
    model = Texts()
    ids, given = batches(MASK)
    profile = measure(model, given, memory_gb=1)
    assert measure(model, [tuple(batch.values()) for batch in given]).layers == profile.layers
    with torch.no_grad():
        x = model.table(ids)
        outputs = {name: getattr(model, name)(x) * MASK[..., None] for name in ("plain", "massive")}
        outputs["pooled"] = model.pooled((x * MASK[..., None]).sum(1) / LENGTHS[:, None])[:, None]
    chance = sum(int((LENGTHS == x).sum()) - 1 for x in LENGTHS) / (N * (N - 1))
    for name, output in outputs.items():
        layer, points = profile.layers[name], output.double()
        apart = torch.cdist(points.flatten(1), points.flatten(1)).fill_diagonal_(torch.inf)
        same = (LENGTHS[apart.argmin(1)] == LENGTHS).double().mean().item()
        assert layer.same_length == pytest.approx(same)
        assert layer.by_chance == pytest.approx(chance)
        variance = points.var(0).sum(0)
        largest = (variance.max() / variance.sum()).item()
        assert layer.largest_channel == pytest.approx(largest, rel=1e-5)
    assert profile.layers["massive"].same_length == 1
    for sign in ("neighbours have texts of the same length", "a single channel has most"):
        (remark,) = [x for x in profile.remarks if x.startswith(f"in 1 of 3 layers {sign}")]
        assert remark.endswith(": massive") and "--one_length" in remark


def test_texts_of_one_length_are_not_remarked_on_and_pictures_have_none():
    (layer,) = measure(nn.Linear(16, 8), torch.randn(N, 4, 16).split(7)).layers.values()
    assert layer.same_length is layer.by_chance is None
    profile = measure(Texts(), batches(torch.ones(N, 8, dtype=torch.long))[1])
    assert not any("length far" in remark for remark in profile.remarks)


def test_a_task_with_texts_of_one_length(tmp_path):
    file = write_config(tmp_path / "c.yaml", make_scenes(tmp_path / "scenes", train=400))
    config = load_config(file)
    model, dataset = build_captioner(config), build_caption_datasets(config)[0]
    torch.save({"model": model.state_dict()}, tmp_path / "w.pt")
    flags = ["--config", file, "--pretrained", tmp_path / "w.pt", "--one_length"]
    lengths = model.tokenize([dataset.text(i) for i in range(len(dataset))])[1].sum(1)
    for given, wanted in (([], int(lengths.mode().values)), (["15"], 15)):
        profile = compute_id(tmp_path, *flags, *given, "-n", 25)
        assert profile.settings["one_length"] == wanted
        name = "text_decoder.bert.encoder.layer.0.intermediate.dense"
        assert profile.layers[name].features == wanted * 64  # no padding
        assert {x.by_chance for x in profile.layers.values()} == {1.0}
        n = int((lengths == wanted).sum())
        with pytest.raises(UserError, match=f"{n} texts have {wanted} tokens, and {n + 1} samp"):
            compute_id(tmp_path, *flags, *given, "-n", n + 1)
