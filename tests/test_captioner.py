import re

import pytest
import torch

from models import build_captioner, modality, prunable_layers, text, weight_files
from models.text import load_tokenizer, truncated
from tests.conftest import read_golden
from utils import UserError


@pytest.fixture(scope="module")
def golden_captioner(caption_tiny_config):
    model = build_captioner(caption_tiny_config).eval()
    weights = read_golden("caption_tiny", "weights.")
    weights.pop("text_decoder.bert.embeddings.position_ids")
    model.load_state_dict(weights)
    return model


def test_outputs_equal_the_original(golden_captioner):
    inputs = read_golden("caption_tiny", "input.")
    expected = read_golden("caption_tiny", "expected.")
    with torch.no_grad():
        embeds = golden_captioner.encode_image(inputs["image"])
        decoded = golden_captioner.text_decoder(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=embeds,
        )
        loss = golden_captioner.loss(
            *(inputs[name] for name in ("image", "input_ids", "attention_mask", "labels"))
        )
    torch.testing.assert_close(embeds, expected["image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded.logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("expected", "num_beams"), [("greedy", 1), ("beam3", 3)])
def test_generated_ids_equal_the_original(golden_captioner, expected, num_beams):
    inputs = read_golden("caption_tiny", "input.")
    ids = golden_captioner.generate_ids(inputs["image"], inputs["prompt_ids"], num_beams, 20, 5)
    assert ids.tolist() == read_golden("caption_tiny", f"expected.{expected}")[""].tolist()


def test_loss_ignores_prompt_and_padding(caption_tiny_config):
    model = build_captioner(caption_tiny_config).eval()
    image = torch.randn(2, 3, 32, 32)
    long, short = "a picture of word9 word8 word7 word6", "a picture of word5"
    with torch.no_grad():
        both = model(image, [long, short])
        alone = [model(image[i : i + 1], [text]) for i, text in enumerate((long, short))]
    # tokens predicted: the words after the prompt and [SEP]
    torch.testing.assert_close(both, (5 * alone[0] + 2 * alone[1]) / 7)


def test_prepared_tensors_give_the_loss_of_captions(caption_tiny_config):
    model = build_captioner(caption_tiny_config).eval()
    image = torch.randn(2, 3, 32, 32)
    captions = ["a picture of word9 word8 word7 word6", "a picture of word5"]
    tensors, terms = model.prepare(image, captions)
    assert terms == 5 + 2  # the words after the prompt, and [SEP]
    assert tensors[0] is image
    assert all(tensor.shape == (2, 9) for tensor in tensors[1:])
    assert tensors[1][:, 0].tolist() == [158, 158]  # [DEC]
    assert (tensors[3] == -100).sum(dim=1).tolist() == [4, 4 + 3]
    with torch.no_grad():
        expected = model(image, captions)
        assert torch.equal(model(*tensors), expected)
        assert torch.equal(model.loss(*tensors), expected)


def test_captions_are_cut_at_max_tokens(caption_tiny_config):
    captions = [" ".join(["a picture of"] + ["word9"] * n) for n in (3, 4, 60)]
    model = build_captioner(caption_tiny_config | {"max_tokens": 8})
    (_, ids, mask, _), terms = model.prepare(torch.zeros(3, 3, 32, 32), captions)
    assert ids.shape == (3, 8)
    assert mask.sum(dim=1).tolist() == [8, 8, 8]
    assert terms == 3 * 4
    assert truncated(model.tokenizer, captions, 8) == 2
    assert truncated(model.tokenizer, captions, 9) == 1
    assert truncated(model.tokenizer, captions * 700, 9) == 700
    default = build_captioner(caption_tiny_config)
    assert default.prepare(None, captions)[0][1].shape == (3, 40)


def test_generate_gives_text_without_prompt(caption_tiny_config):
    model = build_captioner(caption_tiny_config).eval()
    captions = model.generate(torch.randn(2, 3, 32, 32), num_beams=2, max_length=9)
    assert len(captions) == 2
    assert all(0 < len(c.split()) <= 5 and "[" not in c for c in captions)


def test_official_layers_are_prunable(caption_tiny_config, golden_dir):
    names = list(prunable_layers(build_captioner(caption_tiny_config)))
    assert len(names) == 2 * 4 + 3 * 10
    assert names[:4] == [
        f"visual_encoder.blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert names[8:11] == [
        f"text_decoder.bert.encoder.layer.0.attention.self.{n}" for n in ("query", "key", "value")
    ]
    assert [modality(name) for name in (names[0], names[8])] == ["vision", "language"]


def test_checkpointed_blocks_keep_gradients(caption_tiny_config):
    config = caption_tiny_config | {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}
    model = build_captioner(config).visual_encoder.train()
    assert model.checkpointed_blocks == 1
    gradients = []
    for model.checkpointed_blocks in (0, 1, 2):
        model.zero_grad()
        model(torch.ones(1, 3, 32, 32)).square().sum().backward()
        gradients.append(model.blocks[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a picture of cat".split()


def write_vocabulary(folder, words=WORDS, encoding="utf-8"):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding=encoding)
    return str(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ids_are_the_lines_of_the_vocabulary(tmp_path, encoding):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, encoding=encoding))
    assert tokenizer("a picture of cat dog").input_ids == [2, 5, 6, 7, 8, 1, 3]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [9, 10]
    assert tokenizer.bos_token == "[DEC]"
    assert len(tokenizer) == 11


def test_line_ends_of_windows_change_no_token(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(WORDS).encode())
    assert load_tokenizer(str(tmp_path))("a picture of cat").input_ids == [2, 5, 6, 7, 8, 3]


@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
def test_special_tokens_must_stand_in_the_vocabulary(tmp_path, missing):
    write_vocabulary(tmp_path, [word.replace(missing, "other") for word in WORDS])
    with pytest.raises(UserError, match=rf"vocab\.txt is no .* lacks {re.escape(missing)}$"):
        load_tokenizer(str(tmp_path))


def test_a_token_that_stands_twice_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"vocab\.txt is no .* names 'cat' twice"):
        load_tokenizer(write_vocabulary(tmp_path, [*WORDS, "dog", "cat"]))


def test_tokenizer_without_the_prompt_words_is_an_error(tmp_path):
    write_vocabulary(tmp_path, WORDS[:5] + ["hello"])
    with pytest.raises(UserError, match="a picture of"):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe[\x00P\x00")
    with pytest.raises(UserError, match=r"tokenizer: cannot read .*vocab\.txt"):
        load_tokenizer(str(tmp_path))


def test_folder_without_vocabulary_says_what_to_put_there(tmp_path):
    with pytest.raises(UserError, match=r"no vocab\.txt in the folder .*bert-base-uncased"):
        load_tokenizer(str(tmp_path))


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*data\.scenes"):
        load_tokenizer(str(tmp_path / "none"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """No network; notes the addresses that are asked for."""
    asked = []

    def download(url, path):
        asked.append(url)
        raise OSError("no route to host")

    def not_cached(name, file, local_files_only):
        assert local_files_only  # anything else would try for minutes
        raise FileNotFoundError

    monkeypatch.setattr(weight_files, "download", download)
    monkeypatch.setattr(text, "hf_hub_download", not_cached)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(text.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_without_network_there_is_one_attempt(hub):
    with pytest.raises(UserError, match=r"'bert-base-uncased' \(no route to host\).*data\.scenes"):
        load_tokenizer("bert-base-uncased")
    assert hub == ["https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"]


def test_offline_there_is_no_attempt(hub, monkeypatch):
    monkeypatch.setattr(text.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'bert-base-uncased' \(HF_HUB_OFFLINE is set\)"):
        load_tokenizer("bert-base-uncased")
    assert hub == []


def test_a_vocabulary_in_the_cache_of_the_hub_is_taken(hub, monkeypatch, tmp_path):
    write_vocabulary(tmp_path)
    monkeypatch.setattr(text, "hf_hub_download", lambda name, file, **_: tmp_path / file)
    assert load_tokenizer("some/model")("cat").input_ids == [2, 8, 3]
    assert hub == []


def test_a_vocabulary_is_downloaded_once(hub, monkeypatch):
    def download(url, path):
        hub.append(url)
        path.parent.mkdir(parents=True)
        write_vocabulary(path.parent)

    monkeypatch.setattr(weight_files, "download", download)
    for _ in range(2):
        assert load_tokenizer("some/model")("cat").input_ids == [2, 8, 3]
    assert len(hub) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit": "huge"}, "huge"),
        ({"vit": {"depth": 2}}, "embed_dim"),
        ({"image_size": 33}, "patch_size"),
        ({"med_config": {"hidden": 3}}, "hidden"),
        ({"med_config": {"vocab_size": 5}}, "vocab_size"),
        ({"med_config": "no/such.json"}, "no/such.json"),
        ({"vit": {"patch_size": 8, "embed_dim": 48, "depth": 0, "num_heads": 4}}, "depth is 0"),
        ({"vit": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 5}}, "num_heads 5"),
        ({"vit": {"patch_size": 8, "embed_dim": "w", "depth": 2, "num_heads": 4}}, "is 'w'"),
        ({"image_size": 0}, "image_size: 0"),
        ({"med_config": {"vocab_size": 160, "num_hidden_layers": True}}, "layers is True"),
        ({"med_config": {"vocab_size": 160, "hidden_size": 31}}, "hidden_size 31 is no multiple"),
        ({"med_config": {"vocab_size": 160, "hidden_dropout_prob": 1}}, "dropout_prob is 1, but"),
        ({"med_config": {"vocab_size": 160, "hidden_act": "gulp"}}, "hidden_act 'gulp' is none of"),
        ({"length_normalization": "Total"}, "'Total' is none of total, generated"),
        ({"max_tokens": 5}, "max_tokens: 5 must be from 6"),
        ({"max_tokens": 65}, "to 64"),
    ],
)
def test_bad_model_configs_are_named(caption_tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        build_captioner(caption_tiny_config | change)
