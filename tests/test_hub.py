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
from dimension.profile import IDProfile
from models import hub
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


def flava():
    config = transformers.FlavaConfig(
        image_config=WIDTH | IMAGES,
        text_config=WIDTH | {"vocab_size": len(WORDS)},
        multimodal_config=WIDTH,
        hidden_size=16,
    )
    images = image_processor(transformers.FlavaImageProcessor)
    return transformers.FlavaModel(config), transformers.FlavaProcessor(images, tokenizer())


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


def vit():
    config = transformers.ViTConfig(**WIDTH, **IMAGES)
    return transformers.ViTModel(config), image_processor(transformers.ViTImageProcessor)


def bert():
    config = transformers.BertConfig(**WIDTH, vocab_size=len(WORDS))
    return transformers.BertForMaskedLM(config), tokenizer()


KINDS = {kind.__name__: kind for kind in (clip, flava, llava, vit, bert)}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A model's folder, whose name is its kind."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / request.param
    save(request.param, path)
    return path


def save(kind, path):
    model, processor = KINDS[kind]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    processor.save_pretrained(path)


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
INPUTS = {"clip": BOTH, "flava": BOTH, "llava": BOTH, "vit": ("images",), "bert": ("texts",)}
MEASURED = {  # of one block each: layers by kind
    "clip": {"vision": 6, "language": 6, "other": 2},
    "flava": {"vision": 7, "language": 7, "other": 9},
    "llava": {"vision": 6, "language": 7, "other": 2},
    "vit": {"vision": 7},
    "bert": {"language": 6},
}


def run(path, to, *more):
    ComputeID.main(
        ComputeID.parse_args(["--hf", str(path), "--Path", str(to), "--cpu", *map(str, more)])
    )
    return IDProfile.read(to)


def test_measures(folder, data, tmp_path, capsys):
    kind = folder.name
    profile = run(folder, tmp_path / "id", *flags(data, *INPUTS[kind]))
    counts = {}
    for name, layer in profile.layers.items():
        counts.setdefault(layer.kind, []).append(name)
        assert layer.id > 0
    assert {kind: len(names) for kind, names in counts.items()} == MEASURED[kind]
    for part, names in counts.items():
        if kind in ("vit", "bert"):
            continue
        inside = {
            "vision": r"^(vision_model|image_model|vision_tower)\.",
            "language": r"^(text_model|language_model)\.",
            "other": r"projection$|^multimodal_model|^multi_modal_projector|_to_mm_",
        }[part]
        assert all(re.search(inside, name) for name in names), names
    out = capsys.readouterr().out
    for part, count in MEASURED[kind].items():
        assert f"{part}: {count} layers, mean ID" in out
    assert profile.settings["hf"] == str(folder)
    assert profile.settings["nsamples"] == N
    assert "--id_profile" not in out
    assert {"ID.png", "scale.png", "ID.txt"} <= {path.name for path in (tmp_path / "id").iterdir()}
    if kind == "bert":  # whose checkpoint is of a masked language model
        assert "left out, for the checkpoint lacks them: pooler.dense" in profile.remarks


@pytest.mark.parametrize("kind", ["bert", "flava", "llava"])
def test_batch_size_changes_nothing(kind, data, tmp_path, monkeypatch):
    """Also not in FLAVA's layers that see image and text, and give outputs for the padding.

    In float64, where the batch does not move the roundings that are kept.
    """
    save(kind, tmp_path / kind)
    opened = hub.open_hub_model

    def doubled(module, args, inputs):
        return args, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}

    def in_float64(name):
        found = opened(name)
        found.model.register_forward_pre_hook(doubled, with_kwargs=True)
        return found._replace(model=found.model.double())

    monkeypatch.setattr(ComputeID, "open_hub_model", in_float64)
    found = [
        run(tmp_path / kind, tmp_path / size, *flags(data, *INPUTS[kind]), "--batch_size", size)
        for size in ("4", "30")  # of which the first has not the longest text
    ]
    features = [{n: x.features for n, x in profile.layers.items()} for profile in found]
    assert features[0] == features[1]
    ids = [{n: x.id for n, x in profile.layers.items()} for profile in found]
    assert ids[0] == pytest.approx(ids[1], rel=1e-6)  # as test_measure.PROMISED


def test_takes_random_samples_where_there_are_more(data, tmp_path):
    save("vit", tmp_path / "vit")
    found = [
        run(tmp_path / "vit", tmp_path / "id", *flags(data, "images"), "-n", 25, "--seed", seed)
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert found[0].settings["nsamples"] == 25
    first, _, other = ([layer.id for layer in profile.layers.values()] for profile in found)
    assert not set(first) & set(other)


def test_compares_with_others_by_kind(data, tmp_path):
    save("vit", tmp_path / "vit")
    run(tmp_path / "vit", tmp_path / "id", *flags(data, "images"))
    published = "configs/id/blip_coco.json"
    more = ["--compare", tmp_path / "id", published]
    run(tmp_path / "vit", tmp_path / "again", *flags(data, "images"), *more)
    assert (tmp_path / "again" / "compare.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = {
    "no such folder": (("vit", "/no/such/folder"), "images", "/no/such/folder: there is no such"),
    "nothing in it": (("vit", "empty"), "images", "empty: "),
    "needs pictures": (("vit", None), "", "takes images: give --images FOLDER"),
    "needs texts": (("clip", None), "images", "takes texts: give --texts FILE"),
    "takes no pictures": (("bert", None), "images texts", "takes no images: leave --images"),
    "takes no texts": (("vit", None), "images texts", "takes no texts: leave --texts"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, data, tmp_path):
    (kind, other), given, message = MISTAKES[case]
    save(kind, tmp_path / kind)
    (tmp_path / "empty").mkdir()
    path = tmp_path / (other or kind)
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "id", *flags(data, *given.split()))


def test_mistakes_in_pictures_and_texts(data, tmp_path):
    save("clip", tmp_path / "clip")
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
            run(tmp_path / "clip", to, "--images", images, "--texts", lines)
    (tmp_path / "none" / "broken.png").write_text("not a picture")
    (tmp_path / "one").write_text("word1")
    with pytest.raises(UserError, match="cannot read image .*broken.png: .* Mend or replace it$"):
        run(tmp_path / "clip", to, "--images", tmp_path / "none", "--texts", tmp_path / "one")


def test_mistakes_in_folders(data, tmp_path):
    save("vit", tmp_path / "vit")
    lacking = tmp_path / "lacking"
    shutil.copytree(tmp_path / "vit", lacking)
    model = transformers.ViTModel.from_pretrained(lacking)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm")}
    model.save_pretrained(lacking, state_dict=kept)
    with pytest.raises(UserError, match="2 weights are missing, for instance layernorm.bias"):
        run(lacking, tmp_path / "id", *flags(data, "images"))
    blind = tmp_path / "blind"
    shutil.copytree(tmp_path / "vit", blind)
    for file in blind.glob("*processor*"):
        file.unlink()
    with pytest.raises(UserError, match="blind"):
        run(blind, tmp_path / "id", *flags(data, "images"))
    sized = tmp_path / "sized"
    shutil.copytree(tmp_path / "vit", sized)
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
def test_damaged_folders(config, message, data, tmp_path):
    save("vit", tmp_path / "vit")
    if config is None:
        weights = tmp_path / "vit" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        changed(tmp_path / "vit", "config.json", **config)
    with pytest.raises(UserError, match=f"--hf .*vit: {message}"):
        run(tmp_path / "vit", tmp_path / "id", *flags(data, "images"))


def test_a_model_of_neither_images_nor_texts(data, tmp_path):
    sizes = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    config = transformers.Wav2Vec2Config(
        **WIDTH, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "wav")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wav")
    with pytest.raises(UserError, match="takes neither images nor texts, but input_values"):
        run(tmp_path / "wav", tmp_path / "id")


def test_a_tokenizer_that_cannot_pad(data, tmp_path):
    save("bert", tmp_path / "bert")
    kind = "PreTrainedTokenizerFast"
    settings = {"pad_token": None, "eos_token": None, "tokenizer_class": kind}
    changed(tmp_path / "bert", "tokenizer_config.json", **settings)
    with pytest.raises(UserError, match="makes of a sample.*: Asking to pad but"):
        run(tmp_path / "bert", tmp_path / "id", *flags(data, "texts"))


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


def test_a_tokenizer_without_its_files_is_refused(data, tmp_path):
    """transformers makes one of two tokens, to which all texts are alike."""
    save("clip", tmp_path / "clip")
    for file in (tmp_path / "clip").glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"of 2 tokens, knows no word .*files are .*vocab.json"):
        run(tmp_path / "clip", tmp_path / "id", *flags(data, *BOTH))


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


def test_flags_that_do_not_go_together(capsys):
    for argv, message in (
        (["--images", "x"], "--images goes with --hf"),
        (["--hf", "x", "-s"], "--skip does not go with --hf"),
        (["--hf", "x", "--pruned", "y"], "--pruned does not go with --hf"),
    ):
        with pytest.raises(SystemExit):
            ComputeID.parse_args(argv)
        assert message in capsys.readouterr().err


def test_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ComputeID, "init_distributed", lambda device: ComputeID.Process(0, 2, torch.device("cpu"))
    )
    with pytest.raises(UserError, match="--hf runs in one process"):
        run(tmp_path, tmp_path, *flags(data, "images"))
