"""ComputeID.py --hf on tiny folders, as AutoModel and AutoProcessor read them, offline."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import ComputeID
from dimension.profile import IDProfile, PartialProfile
from engine import profile as profiling
from models import hub
from tests.runs import finish, start
from utils import UserError

N = 30
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
WIDTH |= {"num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>"]
WORDS += [f"word{i}" for i in range(30)]
SQUARE = {"height": 16, "width": 16}


def tokenizer():
    made = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.model_max_length = 12
    return made


def image_processor(kind):
    return kind(size=SQUARE, crop_size=SQUARE, do_center_crop=False)


def clip():
    text = WIDTH | {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3}
    config = transformers.CLIPConfig(text_config=text, vision_config=WIDTH | IMAGES)
    images = image_processor(transformers.CLIPImageProcessor)
    return transformers.CLIPModel(config), transformers.CLIPProcessor(images, tokenizer())


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**WIDTH, **IMAGES),
        text_config=transformers.LlamaConfig(**WIDTH, vocab_size=len(WORDS), pad_token_id=0),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    images = image_processor(transformers.CLIPImageProcessor)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def blip2():
    """Its processor puts the pictures' tokens into the texts, its layers see a learned query."""
    parts = WIDTH | {"hidden_size": 16}
    text = transformers.OPTConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    config = transformers.Blip2Config(
        vision_config=parts | IMAGES,
        qformer_config=parts
        | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=WORDS.index("<image>"),
    )
    images = transformers.BlipImageProcessor(size=SQUARE)
    processor = transformers.Blip2Processor(images, tokenizer(), num_query_tokens=2)
    return transformers.Blip2ForConditionalGeneration(config), processor


def vit():
    config = transformers.ViTConfig(**WIDTH, **IMAGES)
    return transformers.ViTModel(config), image_processor(transformers.ViTImageProcessor)


def bert():
    config = transformers.BertConfig(**WIDTH, vocab_size=len(WORDS))
    return transformers.BertForMaskedLM(config), tokenizer()


KINDS = {kind.__name__: kind for kind in (clip, llava, blip2, vit, bert)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder by its kind; for changes of it, copy it."""
    path = tmp_path_factory.mktemp("hub")
    for kind, make in KINDS.items():
        torch.manual_seed(0)
        model, processor = make()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path / kind)
        processor.save_pretrained(path / kind)
    return path


@pytest.fixture
def copied(folders, tmp_path):
    """Copies a kind's folder, for changes."""
    return lambda kind: Path(shutil.copytree(folders / kind, tmp_path / kind))


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
    (path / "texts.txt").write_text("\n".join(lines) + "\n")
    return path


def flags(data, *what):
    given = {"images": str(data / "pictures"), "texts": str(data / "texts.txt")}
    return [x for name in what for x in (f"--{name}", given[name])]


BOTH = ("images", "texts")
INPUTS = {"clip": BOTH, "llava": BOTH, "blip2": BOTH, "vit": ("images",), "bert": ("texts",)}
MEASURED = {  # of one block each: layers by kind
    "clip": {"vision": 6, "language": 6, "other": 2},
    "llava": {"vision": 6, "language": 7, "other": 2},
    "blip2": {"vision": 4, "language": 7, "other": 11},
    "vit": {"vision": 7},
    "bert": {"language": 6},
}


def run(path, to, *more):
    ComputeID.main(
        ComputeID.parse_args(["--hf", str(path), "--Path", str(to), "--cpu", *map(str, more)])
    )
    return IDProfile.read(to)


@pytest.mark.parametrize("kind", KINDS)
def test_measures(kind, folders, data, tmp_path, capsys):
    profile = run(folders / kind, tmp_path / "id", *flags(data, *INPUTS[kind]))
    counts = {}
    for name, layer in profile.layers.items():
        counts.setdefault(layer.kind, []).append(name)
    assert {kind: len(names) for kind, names in counts.items()} == MEASURED[kind]
    for part, names in counts.items():
        inside = {
            "vision": r"^(vision_model|vision_tower)\.",
            "language": r"^(text_model|language_model)\.",
            "other": r"projection$|^multi_modal_projector|^qformer",
        }[part]
        assert kind in ("vit", "bert") or all(re.search(inside, name) for name in names), names
    out = capsys.readouterr().out
    for part, count in MEASURED[kind].items():
        assert f"{part}: {count} layers, mean ID" in out
    assert profile.settings["hf"] == str(folders / kind)
    assert profile.settings["nsamples"] == N
    assert "--id_profile" not in out
    assert {"ID.png", "scale.png", "ID.txt"} <= {path.name for path in (tmp_path / "id").iterdir()}
    left_out = "left out: pooler.dense: the checkpoint lacks its weights"
    assert (left_out in profile.remarks) == (kind == "bert")  # of a masked language model


@pytest.mark.parametrize("kind", ["bert", "llava"])
def test_batch_size_changes_nothing(kind, folders, data, tmp_path, monkeypatch):
    """In float64, where the batch does not move the roundings that are kept."""
    opened = profiling.open_hub_model

    def doubled(module, args, inputs):
        return args, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}

    def in_float64(name):
        found = opened(name)
        found.model.register_forward_pre_hook(doubled, with_kwargs=True)
        return found._replace(model=found.model.double())

    monkeypatch.setattr(profiling, "open_hub_model", in_float64)
    found = [
        run(folders / kind, tmp_path / size, *flags(data, *INPUTS[kind]), "--batch_size", size)
        for size in ("4", "30")  # of which the first has not the longest text
    ]
    features = [{n: x.features for n, x in profile.layers.items()} for profile in found]
    assert features[0] == features[1]
    ids = [{n: x.id for n, x in profile.layers.items()} for profile in found]
    assert ids[0] == pytest.approx(ids[1], rel=1e-6)  # as test_measure.PROMISED


def test_goes_on_where_it_was_stopped(folders, data, tmp_path, monkeypatch):
    """With the same texts only."""
    texts = tmp_path / "texts"
    shutil.copy(data / "texts.txt", texts)
    add, seen = PartialProfile.add, []

    def stopped(self, name, layer):
        add(self, name, layer)
        raise KeyboardInterrupt

    for change in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(PartialProfile, "add", stopped)
            with pytest.raises(KeyboardInterrupt):
                run(folders / "bert", tmp_path / "id", "--texts", texts)
        torch.manual_seed(1)  # layers that the checkpoint lacks do not depend on it
        if change:
            texts.write_text("\n".join(texts.read_text().splitlines()[::-1]))
        with monkeypatch.context() as patch:
            patch.setattr(PartialProfile, "add", lambda self, *x: seen.append(1) or add(self, *x))
            profile = run(folders / "bert", tmp_path / "id", "--texts", texts)
        assert len(seen) == len(profile.layers) - (not change)
        seen.clear()
    assert run(folders / "bert", tmp_path / "whole", "--texts", texts).layers == profile.layers


def test_two_processes_give_the_same_bits(folders, data, tmp_path):
    argv = ["--hf", str(folders / "bert"), *flags(data, "texts"), "--cpu", "--save_distances"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ComputeID.main(ComputeID.parse_args([*argv, "--Path", str(tmp_path / "one")]))
    torch.set_num_threads(threads)
    assert finish(start([*argv, "--Path", str(tmp_path / "two")], 2, "ComputeID")) == [0, 0]
    one, two = (IDProfile.read(tmp_path / name) for name in ("one", "two"))
    assert one == two
    ComputeID.main(ComputeID.parse_args(["-s", "--Path", str(tmp_path / "two")]))
    assert IDProfile.read(tmp_path / "two").layers == one.layers


def test_takes_random_samples_where_there_are_more(folders, data, tmp_path):
    found = [
        run(folders / "vit", tmp_path / "id", *flags(data, "images"), "-n", 25, "--seed", seed)
        for seed in (0, 1)
    ]
    assert found[0].settings["nsamples"] == 25
    first, other = ([layer.id for layer in profile.layers.values()] for profile in found)
    assert not set(first) & set(other)


MISTAKES = {
    "no such folder": (("vit", "/no/such/folder"), "images", "/no/such/folder: there is no such"),
    "nothing in it": (("vit", "empty"), "images", "empty: "),
    "needs pictures": (("vit", None), "", "takes images: give --images FOLDER"),
    "needs texts": (("clip", None), "images", "takes texts: give --texts FILE"),
    "takes no pictures": (("bert", None), "images texts", "takes no images: leave --images"),
    "takes no texts": (("vit", None), "images texts", "takes no texts: leave --texts"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, folders, data, tmp_path):
    (kind, other), given, message = MISTAKES[case]
    (tmp_path / "empty").mkdir()
    path = folders / kind if other is None else tmp_path / other
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "id", *flags(data, *given.split()))


def test_mistakes_in_pictures_and_texts(folders, data, tmp_path):
    to, (_, pictures, _, texts) = tmp_path / "id", flags(data, *BOTH)
    (tmp_path / "none").mkdir()
    lines = Path(texts).read_text().splitlines()
    files = {"few": lines[:-1], "gap": [*lines[:4], " ", *lines[5:]]}
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(content))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    cases = [
        (tmp_path / "gone", texts, "--images: there is no folder .*gone"),
        (tmp_path / "none", texts, "no pictures in the folder .*none"),
        (pictures, tmp_path / "gone", "--texts: cannot read .*gone"),
        (pictures, tmp_path / "bytes", "--texts: cannot read .*bytes"),
        (pictures, tmp_path / "gap", "line 5 of .*gap is empty"),
        (pictures, tmp_path / "few", "--texts has 29 lines, --images 30 pictures"),
    ]
    for images, lines, message in cases:
        with pytest.raises(UserError, match=message):
            run(folders / "clip", to, "--images", images, "--texts", lines)
    (tmp_path / "none" / "broken.png").write_text("not a picture")
    (tmp_path / "one").write_text("word1")
    with pytest.raises(UserError, match="cannot read image .*broken.png: .* Mend or replace it$"):
        run(folders / "clip", to, "--images", tmp_path / "none", "--texts", tmp_path / "one")


def test_mistakes_in_folders(folders, data, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(folders / "vit", lacking)
    model = transformers.ViTModel.from_pretrained(lacking)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm")}
    model.save_pretrained(lacking, state_dict=kept)
    with pytest.raises(UserError, match="2 weights are missing, for instance layernorm.bias"):
        run(lacking, tmp_path / "id", *flags(data, "images"))
    blind = tmp_path / "blind"
    shutil.copytree(folders / "vit", blind)
    for file in blind.glob("*processor*"):
        file.unlink()
    with pytest.raises(UserError, match="blind"):
        run(blind, tmp_path / "id", *flags(data, "images"))
    sized = tmp_path / "sized"
    shutil.copytree(folders / "vit", sized)
    (settings,) = sized.glob("*processor*")
    content = json.loads(settings.read_text())
    content["size"] = {"height": 24, "width": 24}
    settings.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not take what its processor makes .*pixel_values"):
        run(sized, tmp_path / "id", *flags(data, "images"))


def changed(path, file, **content):
    file = path / file
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "transformers cannot load it: SafetensorError"),
        ({"hidden_size": 32}, "transformers cannot load it: RuntimeError"),
        ({"hidden_size": "16"}, "transformers cannot load it: Strict.*hidden_size"),
    ],
)
def test_damaged_folders(config, message, copied, data, tmp_path):
    path = copied("vit")
    if config is None:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        changed(path, "config.json", **config)
    with pytest.raises(UserError, match=f"--hf .*vit: {message}"):
        run(path, tmp_path / "id", *flags(data, "images"))


def test_a_model_of_neither_images_nor_texts(data, tmp_path):
    sizes = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    config = transformers.Wav2Vec2Config(
        **WIDTH, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "wav")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wav")
    with pytest.raises(UserError, match="takes neither images nor texts, but input_values"):
        run(tmp_path / "wav", tmp_path / "id")


def test_a_tokenizer_that_cannot_pad(copied, data, tmp_path):
    path = copied("bert")
    kind = "PreTrainedTokenizerFast"
    settings = {"pad_token": None, "eos_token": None, "tokenizer_class": kind}
    changed(path, "tokenizer_config.json", **settings)
    with pytest.raises(UserError, match="makes of a sample.*: Asking to pad but"):
        run(path, tmp_path / "id", *flags(data, "texts"))


def test_the_longest_text_is_tried_first(data, tmp_path):
    """RoBERTa counts positions from 1 + padding id: of 14, 13 remain for tokens."""
    config = transformers.RobertaConfig(
        **WIDTH, vocab_size=len(WORDS), max_position_embeddings=14, pad_token_id=0
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    made = tokenizer()
    made.model_max_length = int(1e30)
    made.save_pretrained(tmp_path / "roberta")
    lines = Path(data / "texts.txt").read_text().splitlines()
    lines[12] = " ".join(["word1", "word2"] * 8)
    (tmp_path / "long").write_text("\n".join(lines))
    with pytest.raises(UserError, match="whose text of 14 tokens is the longest .*: index out of"):
        run(tmp_path / "roberta", tmp_path / "id", "--texts", tmp_path / "long")


def test_a_tokenizer_without_its_files_is_refused(copied, data, tmp_path):
    """transformers makes one of two tokens, to which all texts are alike."""
    path = copied("clip")
    for file in path.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"of 2 tokens, knows no word .*files are .*vocab.json"):
        run(path, tmp_path / "id", *flags(data, *BOTH))


def test_a_name_of_the_hub_gets_one_quick_attempt(data, tmp_path, monkeypatch):
    asked = []

    def unreachable(address, timeout):
        asked.append((address, timeout))
        raise OSError("no route to host")

    monkeypatch.setattr(hub.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="hub's models cannot be reached .no route to host"):
        run("some-one/not-here", tmp_path, *flags(data, "images"))
    assert asked == [(f"{hub.constants.ENDPOINT}/some-one/not-here/resolve/main/config.json", 10)]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        run("some-one/not-here", tmp_path, *flags(data, "images"))
    assert len(asked) == 1
