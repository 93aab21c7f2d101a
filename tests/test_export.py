import json
import resource
from pathlib import Path

import compat  # noqa: F401

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor

import ComputeID
import export
from configs import load_config
from data.transforms import CLIP_STD, build_transform
from engine.exports import shares
from models import build_captioner, build_clip, build_nlvr, load_checkpoint, prunable_layers
from models.text import load_tokenizer
from reports import costs
from tests.conftest import read_golden
from utils import UserError

RUN_KEYS = {"image_root": "x", "ann_root": "x", "init_lr": 0.1, "max_epoch": 1}
PICTURE = Path(__file__).parent / "some.jpg"


def pruned(model):
    """Zeros in 80 % of every weight matrix; [PAD] keeps the embedding of zeros that it has."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < 0.8] = 0
    return model.eval()


def write_captioner(config, folder):
    """A pruned captioner, and the flags that name it."""
    config = config | RUN_KEYS | {"coco_gt_root": "x", "batch_size": 1}
    (folder / "tiny.yaml").write_text(json.dumps(config))
    model = build_captioner(config)
    model.load_state_dict(read_golden("caption_tiny", "weights."), strict=False)
    torch.save(pruned(model).state_dict(), folder / "tiny.pth")
    return model, ["--config", str(folder / "tiny.yaml"), "--pruned", str(folder / "tiny.pth")]


@pytest.fixture
def captioner(caption_tiny_config, tmp_path):
    return write_captioner(caption_tiny_config, tmp_path)


@pytest.fixture
def nlvr(nlvr_tiny_config, tmp_path):
    """A pruned NLVR2 model, and the flags that name it."""
    config = nlvr_tiny_config | RUN_KEYS | {"batch_size_train": 1, "batch_size_test": 1}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    model = pruned(build_nlvr(config))
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--pruned", str(tmp_path / "tiny.pth")]
    return model, flags


def run(flags, *more):
    export.main(export.parse_args([*flags, *map(str, more)]))


def same_bits(model, other) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def test_a_compressed_captioner_is_read_back_bit_by_bit(
    captioner, caption_tiny_config, tmp_path, capsys
):
    model, flags = captioner
    model.visual_encoder.blocks[0].mlp.fc1.weight.data[0, :2] = torch.tensor([0.0, 1e-40])
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    run(flags, "--to", "compressed", "--out", tmp_path / "new" / "small.safetensors")
    other = build_captioner(caption_tiny_config)
    report = load_checkpoint(other, tmp_path / "new" / "small.safetensors")
    assert report.initialised == report.ignored == []
    assert same_bits(model, other)
    size = (tmp_path / "new" / "small.safetensors").stat().st_size
    assert (
        f"small.safetensors: {size / 1e6:.1f} MB; read it with --pruned" in capsys.readouterr().out
    )
    assert size < 0.5 * (tmp_path / "tiny.pth").stat().st_size


def test_an_nlvr_model_is_read_back_bit_by_bit(nlvr, nlvr_tiny_config, tmp_path):
    model, flags = nlvr
    with pytest.raises(UserError, match="no class for BLIP's NLVR2 model; take --to compressed"):
        run(flags, "--to", "huggingface", "--out", tmp_path / "blip")
    run(flags, "--to", "compressed", "--out", tmp_path / "small.safetensors")
    other = build_nlvr(nlvr_tiny_config)
    load_checkpoint(other, tmp_path / "small.safetensors")
    assert same_bits(model, other)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, caption_tiny_config):
    """A captioner, and the folder that Hugging Face's classes open."""
    folder = tmp_path_factory.mktemp("exported")
    model, flags = write_captioner(caption_tiny_config, folder)
    run(flags, "--to", "huggingface", "--out", folder / "blip")
    return model, folder / "blip"


def open_folder(folder):
    return (
        BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval(),
        BlipProcessor.from_pretrained(folder, local_files_only=True),
    )


def test_hugging_face_opens_the_folder(exported):
    model, folder = exported
    theirs, processor = open_folder(folder)
    assert theirs.vision_model.post_layernorm.eps == model.visual_encoder.norm.eps == 1e-6
    image = torch.randn(3, 3, 32, 32)
    captions = ["a picture of word9 word8", "a picture of word5", "a picture of word7 word7 word6"]
    (_, ids, mask, labels), _ = model.prepare(image, captions)
    with torch.no_grad():
        ours = model.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=model.encode_image(image)
        ).logits
        output = theirs(image, ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.logits, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, model(image, ids, mask, labels))

    text = processor(text=["a picture of"] * 3, return_tensors="pt")
    greedy = theirs.generate(
        image, text.input_ids, text.attention_mask, num_beams=1, max_length=20, min_length=5
    )
    read = processor.batch_decode(greedy, skip_special_tokens=True)
    expected = model.generate(image, num_beams=1, max_length=20, min_length=5)
    assert all(expected)
    assert [caption.removeprefix("a picture of").strip() for caption in read] == expected


def test_the_processor_gives_our_pixels_and_ids(exported):
    model, folder = exported
    _, processor = open_folder(folder)
    picture = Image.open(PICTURE)
    theirs = processor(images=picture, text="a picture of word9 other", return_tensors="pt")
    ours = build_transform(32, augment=False)(picture)
    assert theirs.pixel_values.shape == (1, 3, 32, 32)
    # both resize to whole steps of 255, each with its own arithmetic: a step may differ
    step = 1.01 / 255 / torch.tensor(CLIP_STD)[:, None, None]
    assert ((theirs.pixel_values[0] - ours).abs() <= step).all()
    tokenizer = model.tokenizer
    assert theirs.input_ids.tolist() == [tokenizer("a picture of word9 other").input_ids]
    assert "token_type_ids" not in theirs
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [158, 159]
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_the_folder_holds_how_we_caption(exported):
    _, folder = exported
    theirs, _ = open_folder(folder)
    generation = theirs.generation_config
    lengths = generation.num_beams, generation.max_length, generation.min_length
    assert lengths == (3, 20, 5)
    assert (generation.eos_token_id, generation.pad_token_id) == (102, 0)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_transformers_4_finds_what_it_does_not_tie(exported):
    model, folder = exported
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert size == {"height": 32, "width": 32}
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor == {"processor_class": "BlipProcessor"}  # 4.46 takes no more
    weights = load_file(folder / "model.safetensors")
    head = model.text_decoder.cls.predictions.decoder
    for name, expected in (("weight", head.weight), ("bias", head.bias)):
        assert torch.equal(weights[f"text_decoder.cls.predictions.decoder.{name}"], expected)


@pytest.mark.parametrize(("to", "dtype"), [("huggingface", "float16"), ("compressed", "bfloat16")])
def test_half_precision(captioner, caption_tiny_config, tmp_path, to, dtype):
    model, flags = captioner
    run(flags, "--to", to, "--out", tmp_path / "blip", "--dtype", dtype)
    other = build_captioner(caption_tiny_config)
    assert load_checkpoint(other, tmp_path / "blip").ignored == []
    assert same_bits(model.to(getattr(torch, dtype)).float(), other)
    if to == "huggingface":
        theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "blip")
        assert theirs.vision_model.post_layernorm.weight.dtype == torch.float16


def test_clip_is_compressed_and_reported_but_not_for_hugging_face(tmp_path, capsys):
    config = Path("configs/retrieval_demo.yaml").read_text()
    tokenizer = "datasets/scenes/tokenizer", "pretrained/tokenizer"
    (tmp_path / "clip.yaml").write_text(config.replace(*tokenizer))
    model = build_clip(load_config(str(tmp_path / "clip.yaml")))
    torch.save(pruned(model).state_dict(), tmp_path / "clip.pth")
    flags = ["--config", str(tmp_path / "clip.yaml"), "--pruned", str(tmp_path / "clip.pth")]
    with pytest.raises(UserError, match="writes captioners alone; take --to compressed"):
        run(flags, "--to", "huggingface", "--out", tmp_path / "clip")
    out = tmp_path / "clip.safetensors"
    run(flags, "--to", "compressed", "--out", out, "--report")
    other = build_clip(load_config(flags[1]))
    load_checkpoint(other, out)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    lines = capsys.readouterr().out.splitlines()
    nonzeros = {"vision": 0, "language": 0}
    for name, parameter in model.named_parameters():
        kind = "vision" if name.startswith("visual.") else "language"
        nonzeros[kind] += int(parameter.count_nonzero())
    (shown,) = (line for line in lines if line.startswith("nonzeros"))
    assert shown.split(maxsplit=1)[1] == shares(nonzeros)
    assert sum(line.startswith(("dense, here", "sparse, here")) for line in lines) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to do"),
        (["--to", "compressed"], "go together"),
        (["--out", "small.safetensors", "--report"], "go together"),
    ],
)
def test_flags_that_do_not_fit(captioner, more, message):
    with pytest.raises(UserError, match=message):
        run(captioner[1], *more)


def test_a_tilde_is_the_home_folder(monkeypatch):
    """Shells leave that of --flag=~/x as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--config=~/c.yaml", "--pruned=https://x.org/~me/w", "--out=~/x"]
    args = export.parse_args(argv)
    assert args.config == "/home/me/c.yaml" and args.out == Path("/home/me/x")
    assert args.pruned == "https://x.org/~me/w"
    args = ComputeID.parse_args(["--Path=~/id", "--config=~/c.yaml", "--compare", "~/other"])
    assert (args.Path, args.config) == ("/home/me/id", "/home/me/c.yaml")
    assert args.compare == ["/home/me/other"]


@pytest.mark.parametrize("to", ["compressed", "huggingface"])
def test_what_is_there_is_left_alone(captioner, tmp_path, to):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match="there exists; remove it or choose another"):
        run(captioner[1], "--to", to, "--out", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("to", ["compressed", "huggingface"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(captioner, tmp_path, to):
    folder = tmp_path / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(UserError, match=r"cannot write .*/out.*File too large"):
            run(captioner[1], "--to", to, "--out", folder / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(folder.iterdir()) == []


def test_zeros_of_both_signs_are_left_out(captioner, tmp_path):
    model, flags = captioner
    sizes = []
    for zero in (0.0, -0.0):
        for layer in prunable_layers(model).values():
            layer.weight.data.fill_(zero)
        torch.save(model.state_dict(), tmp_path / "tiny.pth")
        run(flags, "--to", "compressed", "--out", tmp_path / f"{zero}.safetensors")
        sizes.append((tmp_path / f"{zero}.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_values_beyond_half_precision_are_named(captioner, tmp_path):
    model, flags = captioner
    model.visual_encoder.norm.bias.data[3] = 1e5
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    out = tmp_path / "small.safetensors"
    with pytest.raises(UserError, match=r"visual_encoder\.norm\.bias has values .* bfloat16"):
        run(flags, "--to", "compressed", "--out", out, "--dtype", "float16")
    assert not out.exists()
    run(flags, "--to", "compressed", "--out", out, "--dtype", "bfloat16")


def test_a_start_for_training_is_not_exported(
    nlvr, caption_tiny_config, nlvr_tiny_config, tmp_path
):
    _, flags = nlvr
    config = nlvr_tiny_config | {"tokenizer": caption_tiny_config["tokenizer"]}
    torch.save(build_captioner(config).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(UserError, match="is a start for training.*cls_head"):
        run(flags, "--to", "compressed", "--out", tmp_path / "small.safetensors")


@pytest.mark.parametrize("task", ["captioner", "nlvr"])
def test_the_report(request, monkeypatch, capsys, task):
    model, flags = request.getfixturevalue(task)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters()) / 1e6
    made = []
    monkeypatch.setattr(costs, "sparsify_", lambda m: made.append(m) or "all are sparse")
    run(flags, "--report")
    lines = {line[:24].strip(): line[24:] for line in capsys.readouterr().out.splitlines()}
    assert lines["parameters"].startswith(f" {parameters:.1f} M (vision ")
    assert lines["nonzeros"].startswith(f" {nonzeros:.1f} M (vision ")
    assert lines["dense float32"] == f" {4 * parameters:.1f} MB"
    assert {"multiply-adds, dense", "multiply-adds, effective", "compressed float16"} <= set(lines)
    assert "ms a sample" in lines["dense, here"] and "ms a sample" in lines["sparse, here"]
    assert len(made) == 1
