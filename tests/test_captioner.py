"""The captioner: golden outputs, losses, tokenizers, and mistakes in its config."""

import pytest
import torch

from models import build_captioner, text, weight_files
from models.text import load_tokenizer
from tests.conftest import read_golden
from utils import UserError

LONG, SHORT = "a picture of word9 word8 word7 word6", "a picture of word5"


@pytest.fixture(scope="module")
def model(caption_tiny_config):
    """The golden weights."""
    model = build_captioner(caption_tiny_config).eval()
    model.load_state_dict(read_golden("caption_tiny", "weights."), strict=False)
    return model


@torch.no_grad()
def test_outputs_equal_the_original(model):
    inputs, expected = (read_golden("caption_tiny", f"{part}.") for part in ("input", "expected"))
    text = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.encode_image(inputs["image"])
    logits = model.text_decoder(
        text[0], attention_mask=text[1], encoder_hidden_states=embeds
    ).logits
    loss = model(inputs["image"], *text, inputs["labels"])
    torch.testing.assert_close(embeds, expected["image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)
    for name, num_beams in (("greedy", 1), ("beam3", 3)):
        ids = model.generate_ids(inputs["image"], inputs["prompt_ids"], num_beams, 20, 5)
        assert ids.tolist() == expected[name].tolist()


@torch.no_grad()
def test_loss_is_a_mean_over_the_words_after_the_prompt_and_the_end(model):
    image = torch.randn(2, 3, 32, 32)
    tensors, terms = model.prepare(image, [LONG, SHORT])
    assert terms == 5 + 2
    assert tensors[0] is image and all(tensor.shape == (2, 9) for tensor in tensors[1:])
    assert tensors[1][:, 0].tolist() == [158, 158]  # [DEC]
    assert (tensors[3] == -100).sum(dim=1).tolist() == [4, 4 + 3]
    both = model(image, [LONG, SHORT])
    assert torch.equal(model(*tensors), both)
    alone = [model(image[i : i + 1], [text]) for i, text in enumerate((LONG, SHORT))]
    torch.testing.assert_close(both, (5 * alone[0] + 2 * alone[1]) / 7)


def test_captions_are_cut_at_max_tokens(caption_tiny_config, model):
    captions = [" ".join(["a picture of"] + ["word9"] * n) for n in (3, 4, 60)]
    short = build_captioner(caption_tiny_config | {"max_tokens": 8})
    (_, ids, mask, _), terms = short.prepare(None, captions)
    assert ids.shape == (3, 8) and mask.all() and terms == 3 * 4
    assert short.count_cut(captions * 700) == 2 * 700
    assert model.count_cut(captions) == 1
    assert model.prepare(None, captions)[0][1].shape == (3, 40)


def test_checkpointed_blocks_keep_gradients(caption_tiny_config):
    config = caption_tiny_config | {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}
    model, gradients = build_captioner(config).visual_encoder.train(), []
    assert model.checkpointed_blocks == 1
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.std() > 0.05  # Xavier: sqrt(2 / (48 + 192)) is 0.09
    for model.checkpointed_blocks in (0, 1, 2):
        model.zero_grad()
        model(torch.ones(1, 3, 32, 32)).square().sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close([gradients[0]] * 2, gradients[1:])


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a picture of cat".split()


def write_vocabulary(folder, words=WORDS, encoding="utf-8", newline="\n"):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding, newline=newline)
    return str(folder)


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_ids_are_the_lines_of_the_vocabulary(tmp_path, encoding, newline):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, encoding=encoding, newline=newline))
    assert tokenizer("a picture of cat dog").input_ids == [2, 5, 6, 7, 8, 1, 3]
    assert tokenizer.pad_token_id == 0 and tokenizer.bos_token == "[DEC]"
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [9, 10]
    assert len(tokenizer) == 11


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS[:3] + WORDS[5:], r"vocab\.txt is no .* lacks \[SEP\] \[MASK\]$"),
        ([*WORDS, "dog", "cat"], r"vocab\.txt is no .* names 'cat' twice"),
        (WORDS[:5] + ["hello"], "reads 'a picture of' as"),
        (["\xff\xfe"], r"tokenizer: cannot read .*vocab\.txt"),
        ([], r"no vocab\.txt in the folder .*bert-base-uncased"),
        (None, r"no such folder.*data\.scenes"),
    ],
)
def test_folders_that_hold_no_vocabulary_of_bert(tmp_path, words, message):
    if words:
        write_vocabulary(tmp_path, words, "utf-8" if words[0] in WORDS else "latin-1")
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / "none" if words is None else tmp_path))


@pytest.mark.parametrize("offline", [False, True])
def test_a_vocabulary_of_the_hub(monkeypatch, tmp_path, offline):
    """One quick attempt, none offline; it is downloaded once."""
    asked = []

    def download(url, path):
        asked.append(url)
        if len(asked) == 1:
            raise OSError("no route to host")
        path.parent.mkdir(parents=True)
        write_vocabulary(path.parent)

    monkeypatch.setattr(weight_files, "download", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(text.constants, "HF_HUB_OFFLINE", offline)
    why = "HF_HUB_OFFLINE is set" if offline else "no route to host"
    with pytest.raises(UserError, match=rf"'some/model' \({why}\).*data\.scenes"):
        load_tokenizer("some/model")
    for _ in range(0 if offline else 2):
        assert load_tokenizer("some/model")("cat").input_ids == [2, 8, 3]
    address = f"{text.constants.ENDPOINT}/some/model/resolve/main/vocab.txt"
    assert asked == ([] if offline else [address] * 2)


def test_a_vocabulary_in_the_hubs_cache_needs_no_network(monkeypatch, tmp_path):
    write_vocabulary(tmp_path)
    monkeypatch.setattr(
        text, "hf_hub_download", lambda *_, local_files_only: tmp_path / "vocab.txt"
    )
    assert load_tokenizer("cached")("cat").input_ids == [2, 8, 3]


VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 33}, "33 is no multiple of patch_size 8"),
        ({"med_config": {"hidden": 3}}, "hidden"),
        ({"med_config": {"vocab_size": 5}}, "vocab_size 5 is below"),
        ({"med_config": "no/such.json"}, "no/such.json"),
        ({"vit": VIT | {"depth": 0}}, "depth is 0"),
        ({"vit": VIT | {"num_heads": 5}}, "num_heads 5"),
        ({"med_config": {"vocab_size": 160, "num_hidden_layers": True}}, "layers is True"),
        ({"med_config": {"vocab_size": 160, "hidden_size": 31}}, "hidden_size 31 is no multiple"),
        ({"med_config": {"vocab_size": 160, "hidden_dropout_prob": 1}}, "dropout_prob is 1, but"),
        ({"med_config": {"vocab_size": 160, "hidden_act": "gulp"}}, "hidden_act 'gulp' is none of"),
        ({"max_tokens": 5}, "max_tokens: 5 must be from 6"),
        ({"min_length": 4}, "min_length 4 must be above the length of the prompt"),
        ({"max_length": 4}, "max_length 4 must be above the length of the prompt"),
    ],
)
def test_bad_model_configs_are_named(caption_tiny_config, change, message):
    with pytest.raises(UserError, match=message):
        build_captioner(caption_tiny_config | change)
