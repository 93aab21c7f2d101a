"""ComputeID.py --hf on tiny folders, as AutoModel and AutoProcessor read them, offline."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import profile as profiling
from models import hub
from tests.runs import compute_id, ids
from tests.test_model_classes import far_apart
from utils import UserError

N = 30
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
WIDTH |= {"num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>"]
WORDS += [f"word{i}" for i in range(30)]
TEXT = WIDTH | {"vocab_size": len(WORDS), "pad_token_id": 0}
IMAGE_TOKEN = {"image_token_index": WORDS.index("<image>")}
SQUARE = {"height": 16, "width": 16}


def tokenizer(longest=12):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = transformers.BertTokenizer(vocab=vocabulary, padding_side="left")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.model_max_length = longest
    return made


def image_processor(kind=transformers.CLIPImageProcessor):
    return kind(size=SQUARE, crop_size=SQUARE, do_center_crop=False)


def clip():
    text = TEXT | {"max_position_embeddings": 12, "eos_token_id": 3}
    config = transformers.CLIPConfig(text_config=text, vision_config=WIDTH | IMAGES)
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    return transformers.CLIPModel(config), processor


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**WIDTH, **IMAGES),
        text_config=transformers.LlamaConfig(**TEXT),
        vision_feature_layer=-1,
        **IMAGE_TOKEN,
    )
    how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    how |= {"patch_size": 8, "image_token": "<image>"}
    processor = transformers.LlavaProcessor(image_processor(), tokenizer(), **how)
    return transformers.LlavaForConditionalGeneration(config), processor


def blip2():
    """Its processor puts the pictures' tokens into the texts, its layers see a learned query."""
    text = TEXT | {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 32}
    config = transformers.Blip2Config(
        vision_config=WIDTH | IMAGES,
        qformer_config=TEXT | {"encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config=text | {"model_type": "opt"},
        num_query_tokens=2,
        **IMAGE_TOKEN,
    )
    images = transformers.BlipImageProcessor(size=SQUARE)
    processor = transformers.Blip2Processor(images, tokenizer(), num_query_tokens=2)
    return transformers.Blip2ForConditionalGeneration(config), processor


def vit():
    model = transformers.ViTModel(transformers.ViTConfig(**WIDTH, **IMAGES))
    return model, image_processor(transformers.ViTImageProcessor)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)), tokenizer()


def roberta():
    """Counts positions from 1 + padding id: of 14, 13 remain for tokens."""
    config = transformers.RobertaConfig(**TEXT, max_position_embeddings=14)
    return transformers.RobertaModel(config), tokenizer(int(1e30))


def wav2vec():
    sizes = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**WIDTH, **sizes)
    return transformers.Wav2Vec2Model(config), transformers.Wav2Vec2FeatureExtractor()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder by its kind."""
    path = tmp_path_factory.mktemp("hub")
    for make in (clip, llava, blip2, vit, bert, roberta, wav2vec):
        torch.manual_seed(0)
        model, processor = make()
        far_apart(model).save_pretrained(path / make.__name__)
        processor.save_pretrained(path / make.__name__)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of N pictures, and a file with a text of 3 to 8 words for each."""
    path = tmp_path_factory.mktemp("data")
    (path / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(N):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / "pictures" / f"{i:02}.png")
        words = torch.randint(0, 30, (3 + i % 6,), generator=generator).tolist()
        lines.append(" ".join(f"word{word}" for word in words))
    (path / "texts").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def measure(folders, data, tmp_path):
    """Measures a kind, or another folder, with "images", "texts" or both and more flags."""

    def run(kind, given, *more, to="id"):
        flags = {"images": ("--images", data / "pictures"), "texts": ("--texts", data / "texts")}
        inputs = [x for name in given.split() for x in flags[name]]
        return compute_id(tmp_path / to, "--hf", folders / kind, *inputs, *more)

    return run


INPUTS = {"clip": "images texts", "llava": "images texts", "blip2": "images texts"}
INPUTS |= {"vit": "images", "bert": "texts"}
MEASURED = {  # of one block each: layers by kind
    "clip": {"vision": 6, "language": 6, "other": 2},
    "llava": {"vision": 6, "language": 7, "other": 2},
    "blip2": {"vision": 4, "language": 7, "other": 11},
    "vit": {"vision": 7},
    "bert": {"language": 6},
}


@pytest.mark.parametrize("kind", INPUTS)
def test_measures(kind, measure, folders, capsys):
    profile = measure(kind, INPUTS[kind])
    out = capsys.readouterr().out
    for part, count in MEASURED[kind].items():
        assert sum(layer.kind == part for layer in profile.layers.values()) == count
        assert f"{part}: {count} layers, mean ID" in out
    assert len(profile.layers) == sum(MEASURED[kind].values())
    assert profile.settings["hf"] == str(folders / kind)
    assert profile.settings["nsamples"] == N
    assert "--id_profile" not in out
    left_out = "left out: pooler.dense: the checkpoint lacks its weights"
    assert (left_out in profile.remarks) == (kind == "bert")  # of a masked language model


@pytest.mark.parametrize("kind", ["bert", "llava"])
def test_all_texts_are_padded_at_their_end_to_one_length(kind, folders, data):
    """So that nothing depends on the size of a batch; the first four have not the longest text."""
    opened, made = hub.open_hub_model(str(folders / kind)), []
    pictures = sorted((data / "pictures").iterdir()) if kind == "llava" else None
    for size in (4, N):
        inputs = hub.HubInputs(opened, pictures, hub.read_texts(data / "texts"), size)
        inputs.take([*range(N)])
        batches = list(inputs)
        made.append({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
    torch.testing.assert_close(*made, rtol=0, atol=0)
    assert (made[0]["attention_mask"].diff() <= 0).all()


def test_a_picture_has_its_mark_where_a_processor_takes_texts_without(folders, data, monkeypatch):
    def lenient(self, images, text, **options):
        return self.tokenizer(text, **options)

    opened = hub.open_hub_model(str(folders / "llava"))
    monkeypatch.setattr(type(opened.processor), "__call__", lenient)
    pictures, lines = sorted((data / "pictures").iterdir()), hub.read_texts(data / "texts")
    found = hub.HubInputs(opened, pictures, lines, N).texts
    assert found == [f"<image>\n{line}" for line in lines]


def test_a_run_is_known_by_its_texts_and_by_weights_that_the_checkpoint_lacks(
    measure, data, folders, tmp_path
):
    """So that it goes on with the same content only, see test_compute_id."""
    (tmp_path / "texts").write_text((data / "texts").read_text().replace("word1", "word2"))
    settings = [
        measure("bert", given, *more).settings
        for given, more in (("texts", ()), ("", ("--texts", tmp_path / "texts")))
    ]
    assert settings[0]["contents"] != settings[1]["contents"]
    assert settings[0]["checkpoint_sha256"] == settings[1]["checkpoint_sha256"]


def test_takes_random_samples_where_there_are_more_and_estimates_them_again(measure, tmp_path):
    first, other = (
        measure("vit", "images", "-n", 25, "--save_distances", "--seed", seed) for seed in (0, 1)
    )
    assert first.settings["nsamples"] == 25
    assert not set(ids(first).values()) & set(ids(other).values())
    assert compute_id(tmp_path / "id", "-s", "--seed", 1).layers == other.layers


def test_a_layer_that_begins_to_drift_is_left_out(measure, monkeypatch):
    def opened(name, really=hub.open_hub_model):
        made, calls = really(name), []
        made.model.pooler.register_forward_pre_hook(
            lambda module, args: calls.append(1) or (args[0] + max(0, len(calls) - 5),)
        )
        return made

    monkeypatch.setattr(profiling, "open_hub_model", opened)
    profile = measure("vit", "images")
    assert "pooler.dense" not in profile.layers and len(profile.layers) == 6
    assert any("pooler.dense: the model keeps a state" in remark for remark in profile.remarks)


def without(pattern):
    return lambda path: [file.unlink() for file in path.glob(pattern)]


def changed(pattern, **content):
    def change(path):
        (file,) = path.glob(pattern)
        file.write_text(json.dumps(json.loads(file.read_text()) | content))

    return change


def lacking(path):
    weights = load_file(path / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("layernorm")}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def cut(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


SIZE = {"size": {"height": 24, "width": 24}}
NO_PADDING = {"pad_token": None, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
MISTAKES = [
    ("vit", None, "", "takes images: give --images FOLDER"),
    ("clip", None, "images", "takes texts: give --texts FILE"),
    ("bert", None, "images texts", "takes no images: leave --images"),
    ("vit", None, "images texts", "takes no texts: leave --texts"),
    ("wav2vec", None, "", "takes neither images nor texts, but input_values"),
    ("vit", without("*"), "images", "vit: transformers cannot load it"),
    ("vit", without("*processor*"), "images", "vit: transformers cannot load it"),
    ("vit", lacking, "images", "2 weights are missing, for instance layernorm.bias"),
    ("vit", cut, "images", "cannot load it: SafetensorError"),
    ("vit", changed("config.json", hidden_size=32), "images", "cannot load it: RuntimeError"),
    ("vit", changed("config.json", hidden_size="16"), "images", "load it: Strict.*hidden_size"),
    ("vit", changed("*processor*", **SIZE), "images", "does not take what .*makes.*pixel_values"),
    ("bert", changed("tokenizer_config.json", **NO_PADDING), "texts", "makes of a sample.*to pad"),
    # of which transformers makes one of two tokens, to which all texts are alike
    ("clip", without("token*"), "images texts", "of 2 tokens, knows no word .*files.*vocab.json"),
]


@pytest.mark.parametrize("kind, spoil, given, message", MISTAKES, ids=[x[-1] for x in MISTAKES])
def test_mistakes(kind, spoil, given, message, folders, measure, tmp_path):
    path = shutil.copytree(folders / kind, tmp_path / kind)
    if spoil:
        spoil(path)
    with pytest.raises(UserError, match=f"--hf .*{message}"):
        measure(path, given)


@pytest.mark.parametrize(
    "images, texts, message",
    [
        ("gone", "texts", "--images: there is no folder .*gone"),
        ("none", "texts", "no pictures in the folder .*none"),
        ("pictures", "gone", "--texts: cannot read .*gone"),
        ("pictures", "bytes", "--texts: cannot read .*bytes"),
        ("pictures", "gap", "line 2 of .*gap is empty"),
        ("pictures", "few", "--texts has 1 lines, --images 30 pictures"),
        ("broken", "few", "cannot read image .*a.png: .* Mend or replace it$"),
    ],
)
def test_mistakes_in_pictures_and_texts(images, texts, message, measure, data, tmp_path):
    for name in ("none", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_text("not a picture")
    for name, content in {"bytes": b"\xff\xfe\xff", "gap": b"word1\n \n", "few": b"word1"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("pictures", "texts"):
        (tmp_path / name).symlink_to(data / name)
    with pytest.raises(UserError, match=message):
        measure("clip", "", "--images", tmp_path / images, "--texts", tmp_path / texts)


def test_the_longest_text_is_tried_first(measure, data, tmp_path):
    lines = (data / "texts").read_text().splitlines()
    lines[12] = " ".join(["word1", "word2"] * 8)
    (tmp_path / "long").write_text("\n".join(lines))
    with pytest.raises(UserError, match="whose text of 14 tokens is the longest .*: index out of"):
        measure("roberta", "", "--texts", tmp_path / "long")


@pytest.fixture
def uneven(tmp_path):
    """Texts: 30 of 3 words, 25 of 4, 5 of 7; and two tokens around each."""
    words = torch.randint(0, 30, (60, 7), generator=torch.Generator().manual_seed(0)).tolist()
    counts = [3] * 30 + [4] * 25 + [7] * 5
    lines = [" ".join(f"word{x}" for x in line[:n]) for line, n in zip(words, counts, strict=True)]
    (tmp_path / "uneven").write_text("\n".join(lines))
    return "--texts", tmp_path / "uneven"


def test_contents_are_the_config_and_what_the_tokenizer_makes(measure, folders, tmp_path):
    """A stopped run goes on only where these are the same; the paths and weights are."""
    own, found = shutil.copytree(folders / "bert", tmp_path / "own"), []
    changes = ("config.json", "1e-12", "1e-05"), ("tokenizer.json", "word2", "word_")
    for file, part, other in (("config.json", "", ""), *changes):
        assert part in (content := (own / file).read_text())
        (own / file).write_text(content.replace(part, other))
        found.append(measure(own, "texts").settings["contents"])
    differing = [{key for key in a if a[key] != b[key]} for a, b in pairwise(found)]
    assert differing == [{"config"}, {"first batch"}]


def test_texts_of_one_length(measure, uneven, capsys):
    for flags, length, n in ((["--one_length"], 5, 30), (["--one_length", "6"], 6, 25)):
        profile = measure("bert", "", *uneven, *flags)
        assert (profile.settings["one_length"], profile.settings["nsamples"]) == (length, n)
        assert profile.layers["encoder.layer.0.output.dense"].features == length * 16
        assert "padding takes" not in capsys.readouterr().out
    for flags in (["-n", "31", "--one_length"], ["--one_length", "10"]):
        with pytest.raises(UserError, match="give a smaller -n, or another length .30 have 5, 25"):
            measure("bert", "", *uneven, *flags)


def test_longer_texts_are_left_out_and_padding_is_told_before(measure, uneven, capsys):
    measure("bert", "", *uneven)
    out, share = capsys.readouterr().out, 1 - (30 * 5 + 25 * 6 + 5 * 9) / (60 * 9)
    assert f"padding takes {share:.0%} of the work" in out
    assert out.index("padding takes") < out.index("forward work")
    profile = measure("bert", "", *uneven, "--max_tokens", "6")
    assert profile.settings["nsamples"] == 55
    assert "5 samples have longer texts than --max_tokens 6" in profile.remarks
    assert f"padding takes {1 - 300 / 330:.0%} of the work" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max_tokens 4 leaves 0 samples"):
        measure("bert", "", *uneven, "--max_tokens", "4")


def test_a_name_of_the_hub_gets_one_quick_attempt(monkeypatch):
    asked = []

    def unreachable(address, timeout):
        asked.append((address, timeout))
        raise OSError("no route to host")

    monkeypatch.setattr(hub.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="hub's models cannot be reached .no route to host"):
        hub.open_hub_model("some-one/not-here")
    assert asked == [(f"{hub.constants.ENDPOINT}/some-one/not-here/resolve/main/config.json", 10)]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.open_hub_model("some-one/not-here")
    with pytest.raises(UserError, match="/no/such/folder: there is no such"):
        hub.open_hub_model("/no/such/folder")
    assert len(asked) == 1
