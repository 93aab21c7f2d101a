import pytest
import torch

from models import build_captioner, modality, prunable_layers
from models.text import load_tokenizer, truncated
from tests.conftest import read_golden


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


def test_tokenizer_without_the_prompt_words_is_an_error(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    with pytest.raises(ValueError, match="a picture of"):
        load_tokenizer(str(tmp_path))


def test_missing_tokenizer_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"data\.scenes"):
        load_tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit": "huge"}, "huge"),
        ({"vit": {"depth": 2}}, "embed_dim"),
        ({"image_size": 33}, "patch_size"),
        ({"med_config": {"hidden": 3}}, "hidden"),
        ({"med_config": {"vocab_size": 5}}, "vocab_size"),
        ({"med_config": "no/such.json"}, "no/such.json"),
        ({"length_normalization": "Total"}, "'Total' is none of total, generated"),
        ({"max_tokens": 5}, "max_tokens: 5 must be from 6"),
        ({"max_tokens": 65}, "to 64"),
    ],
)
def test_bad_model_configs_are_named(caption_tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        build_captioner(caption_tiny_config | change)
