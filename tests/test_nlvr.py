"""The NLVR2 model: golden outputs, losses, layers, and the checkpoints that it starts from."""

import pytest
import torch
from safetensors.torch import save_file

from models import build_captioner, build_nlvr, load_checkpoint
from tests.conftest import read_golden
from utils import UserError

TWINS = [("self", "self0", "self1"), ("output.dense", "output.dense0", "output.dense1")]


def is_own(name: str) -> bool:
    """Whether only an NLVR2 model has this parameter."""
    return name.startswith("cls_head.") or ".merge_layer." in name


@pytest.fixture
def model(nlvr_tiny_config):
    return build_nlvr(nlvr_tiny_config).eval()


@torch.no_grad()
def test_outputs_equal_the_original(model, tmp_path):
    save_file(read_golden("nlvr_tiny", "weights."), tmp_path / "nlvr.safetensors")
    report = load_checkpoint(model, tmp_path / "nlvr.safetensors")
    assert report.ignored == ["text_encoder.embeddings.position_ids"]
    assert report.initialised == []
    inputs, expected = read_golden("nlvr_tiny", "input."), read_golden("nlvr_tiny", "expected.")
    text = inputs["input_ids"], inputs["attention_mask"]
    images = inputs["image0"], inputs["image1"]
    states = model.encode_text(model.visual_encoder(torch.cat(images)).chunk(2), *text)
    logits = model.logits_from_ids(*images, *text)
    loss = model(*images, *text, inputs["targets"])
    torch.testing.assert_close(states, expected["last_hidden_state"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_loss_is_of_the_statements_and_padding_changes_nothing(model):
    images, targets = torch.randn(2, 2, 3, 32, 32), torch.tensor([1, 0])
    sentences = ["word9 word8", "word5"]
    tensors, terms = model.prepare(*images, sentences, targets)
    assert terms == 2
    assert tensors[2].tolist() == [[159, 9, 8, 102], [159, 5, 102, 0]]
    assert tensors[3].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    logits, loss = model.logits(*images, sentences), model(*images, sentences, targets)
    assert torch.equal(model(*tensors), loss)
    torch.testing.assert_close(loss, -(logits.log_softmax(-1)[[0, 1], [1, 0]]).mean())
    torch.testing.assert_close(logits[1:], model.logits(*images[:, 1:], ["word5"]))


@pytest.mark.parametrize(
    ("build", "vit", "rate"),
    [(build_nlvr, "base", 0.1), (build_captioner, "base", 0.0), (build_captioner, "large", 0.1)],
)
def test_paths_are_dropped_up_to_a_rate_linear_in_depth(golden_tokenizer, build, vit, rate):
    config = {"image_size": 384, "tokenizer": golden_tokenizer, "med_config": {}, "vit": vit}
    with torch.device("meta"):
        blocks = build(config).visual_encoder.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    expected = [rate * n / (len(blocks) - 1) for n in range(len(blocks))]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_max_tokens_cut_statements_and_must_fit(model, nlvr_tiny_config):
    for max_tokens in (2, 65):
        with pytest.raises(UserError, match=f"max_tokens: {max_tokens} must be from 3 .* to 64"):
            build_nlvr(nlvr_tiny_config | {"max_tokens": max_tokens})
    sentences = [" ".join(["word9"] * n) for n in (50, 1)]
    _, mask = model.tokenize(sentences)
    assert mask.sum(dim=1).tolist() == [52, 3] and model.count_cut(sentences) == 0
    assert build_nlvr(nlvr_tiny_config | {"max_tokens": 51}).count_cut(sentences) == 1


@pytest.mark.parametrize("captioning", [False, True])
def test_one_cross_attention_initialises_both_twins(model, nlvr_tiny_config, tmp_path, captioning):
    """That of a base checkpoint, whose text transformer has the same name, or of a captioner."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    single = build_captioner(nlvr_tiny_config).state_dict()
    if not captioning:
        single = {x.replace("text_decoder.bert", "text_encoder"): v for x, v in single.items()}
    torch.save({"model": single | {"temp": torch.ones(1)}}, tmp_path / "base.pth")
    report = load_checkpoint(model, tmp_path / "base.pth")
    assert all(".cls." in name or name == "temp" for name in report.ignored)
    assert sorted(report.initialised) == sorted(filter(is_own, before))
    assert sum("merge_layer" in name for name in report.initialised) == 2 * 2
    for name, value in model.state_dict().items():
        if is_own(name):
            assert torch.equal(value, before[name])
            continue
        for one, *twins in TWINS:
            for twin in twins:
                name = name.replace(f".crossattention.{twin}.", f".crossattention.{one}.")
        name = name.replace("text_encoder", "text_decoder.bert") if captioning else name
        assert torch.equal(value, single[name])


@pytest.mark.parametrize(
    ("build", "missing", "message"),
    [
        (build_nlvr, "cls_head.2.bias", "unset"),
        (build_nlvr, "merge_layer.weight", "unset"),
        (build_nlvr, "self0.query.bias", "unset"),
        (build_captioner, "layer.7.crossattention.self.value.bias", r"2 of .*self0\.value\.bias"),
    ],
)
def test_a_checkpoint_must_be_complete_but_for_a_captioners_head(
    model, nlvr_tiny_config, tmp_path, build, missing, message
):
    weights = build(nlvr_tiny_config).state_dict()
    torch.save({n: v for n, v in weights.items() if not n.endswith(missing)}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=message):
        load_checkpoint(model, tmp_path / "m.pth")
