import json
import re
from pathlib import Path

import compat  # noqa: F401

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor

import export
from data.transforms import CLIP_STD, build_transform
from dimension import measure
from models import build_captioner, build_clip, build_nlvr, load_checkpoint, prunable_layers
from models.checkpoint import hugging_face_name
from models.hub import open_hub_model
from models.text import load_tokenizer
from reports import costs
from tests.conftest import ROOT, read_golden
from tests.runs import TINY_CLIP, ids, same, write_model
from utils import UserError

PICTURE = Path(__file__).parent / "some.jpg"
BUILD = {"caption": build_captioner, "nlvr": build_nlvr, "clip": build_clip}


def golden_captioner(config):
    model = build_captioner(config)
    model.load_state_dict(read_golden("caption_tiny", "weights."), strict=False)
    return model


@pytest.fixture(scope="module")
def configs(caption_tiny_config, nlvr_tiny_config):
    clip = {"clip": TINY_CLIP, "image_size": 32, "queue_size": 8}
    clip["tokenizer"] = str(ROOT / "pretrained/tokenizer")
    return {
        "caption": {**caption_tiny_config, "coco_gt_root": "x"},
        "nlvr": nlvr_tiny_config,
        "clip": clip,
    }


@pytest.fixture
def captioner(configs, tmp_path):
    """A pruned captioner, and the flags that name it."""
    return write_model(golden_captioner, configs["caption"], tmp_path)


def run(flags, *more):
    export.main(export.parse_args([*flags, *map(str, more)]))


def save_again(model, flags):
    torch.save(model.state_dict(), flags[-1])


def same_bits(model, other) -> bool:
    states = ({n: x.view(torch.int32) for n, x in m.named_parameters()} for m in (model, other))
    return same(*states)


@pytest.mark.parametrize("task", BUILD)
def test_a_compressed_model_is_read_back_bit_by_bit(configs, tmp_path, capsys, task):
    model, flags = write_model(BUILD[task], configs[task], tmp_path)
    weight = next(iter(prunable_layers(model).values())).weight.data
    weight[:, 0], weight[0, 1] = -0.0, 1e-40
    save_again(model, flags)
    weight[:, 0] = 0.0  # what is written of negative zeros
    out = tmp_path / "new/small.safetensors"
    run(flags, "--to", "compressed", "--out", out)
    other = BUILD[task](configs[task])
    report = load_checkpoint(other, out)
    assert report.initialised == report.ignored == []
    assert same_bits(model, other)
    size = out.stat().st_size
    assert f"small.safetensors: {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert size < 0.5 * (tmp_path / "model.pth").stat().st_size


@pytest.fixture(scope="module")
def exported(tmp_path_factory, configs):
    """A captioner, the folder that Hugging Face's classes open, and what they read from it."""
    folder = tmp_path_factory.mktemp("exported")
    model, flags = write_model(golden_captioner, configs["caption"], folder)
    run(flags, "--to", "huggingface", "--out", folder / "blip")
    theirs = BlipForConditionalGeneration.from_pretrained(folder / "blip", local_files_only=True)
    processor = BlipProcessor.from_pretrained(folder / "blip", local_files_only=True)
    return model, folder / "blip", theirs.eval(), processor


def test_hugging_face_computes_the_same(exported):
    model, _, theirs, processor = exported
    assert theirs.vision_model.post_layernorm.eps == model.visual_encoder.norm.eps == 1e-6
    image = torch.randn(3, 3, 32, 32)
    captions = ["a picture of word9 word8", "a picture of word5", "a picture of word7 word7 word6"]
    (_, ids, mask, labels), _ = model.prepare(image, captions)
    with torch.no_grad():
        states = model.encode_image(image)
        ours = model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=states)
        output = theirs(image, ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.logits, ours.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, model(image, ids, mask, labels))
    text = processor(text=["a picture of"] * 3, return_tensors="pt")
    lengths = {"num_beams": 1, "max_length": 20, "min_length": 5}
    greedy = theirs.generate(image, text.input_ids, text.attention_mask, **lengths)
    read = processor.batch_decode(greedy, skip_special_tokens=True)
    expected = model.generate(image, **lengths)
    assert all(expected)
    assert [caption.removeprefix("a picture of").strip() for caption in read] == expected


def test_the_processor_gives_our_pixels_and_ids(exported):
    model, folder, _, processor = exported
    picture, tokenizer = Image.open(PICTURE), model.tokenizer
    theirs = processor(images=picture, text="a picture of word9 other", return_tensors="pt")
    ours = build_transform(32, augment=False)(picture)
    assert theirs.pixel_values.shape == (1, 3, 32, 32)
    # both resize to whole steps of 255, each with its own arithmetic: a step may differ
    step = 1.01 / 255 / torch.tensor(CLIP_STD)[:, None, None]
    assert ((theirs.pixel_values[0] - ours).abs() <= step).all()
    assert theirs.input_ids.tolist() == [tokenizer("a picture of word9 other").input_ids]
    assert "token_type_ids" not in theirs
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [158, 159]
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_measuring_the_folder_measures_our_layers(exported):
    """Outputs of float32 differ by 1e-6 of a distance: log ratios of some 0.1 by 1e-4 at most."""
    model, folder, _, _ = exported
    texts = [f"a word{i} picture " + "word9 " * (i % 4) + f"word{i + 20}" for i in range(20)]
    tokens, mask = model.tokenize(texts)
    given = {"pixel_values": torch.randn(20, 3, 32, 32), "input_ids": tokens}
    batches = [given | {"attention_mask": mask}]
    found = ids(measure(open_hub_model(str(folder)).model, batches))

    def forward(pixel_values, input_ids, attention_mask):
        states = model.encode_image(pixel_values)
        model.text_decoder(input_ids, attention_mask, encoder_hidden_states=states)

    model.forward = forward
    ours = ids(measure(model, batches))
    del model.forward
    ours = {hugging_face_name(f"{name}.").rstrip("."): value for name, value in ours.items()}
    assert ours == pytest.approx(found, rel=1e-3)


def test_the_folder_holds_how_we_caption_and_what_transformers_4_looks_for(exported):
    model, folder, theirs, _ = exported
    found = theirs.generation_config
    assert (found.num_beams, found.max_length, found.min_length) == (3, 20, 5)
    assert (found.eos_token_id, found.pad_token_id) == (102, 0)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert size == {"height": 32, "width": 32}
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor == {"processor_class": "BlipProcessor"}  # 4.46 takes no more
    weights, name = load_file(folder / "model.safetensors"), "text_decoder.cls.predictions.decoder"
    head = model.text_decoder.cls.predictions.decoder  # whose weight it does not tie
    assert torch.equal(weights[f"{name}.weight"], head.weight)
    assert torch.equal(weights[f"{name}.bias"], head.bias)


@pytest.mark.parametrize(("to", "dtype"), [("huggingface", "float16"), ("compressed", "bfloat16")])
def test_half_precision(captioner, configs, tmp_path, to, dtype):
    model, flags = captioner
    run(flags, "--to", to, "--out", tmp_path / "blip", "--dtype", dtype)
    other = build_captioner(configs["caption"])
    assert load_checkpoint(other, tmp_path / "blip").ignored == []
    assert same_bits(model.to(getattr(torch, dtype)).float(), other)
    if to == "huggingface":
        theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "blip")
        assert theirs.vision_model.post_layernorm.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("caption", "--to compressed", "go together"),
        ("caption", "--out small.safetensors --report", "go together"),
        ("nlvr", "--to huggingface --out blip", "no class for BLIP's NLVR2 .* --to compressed"),
        ("clip", "--to huggingface --out blip", "captioners alone; take --to compressed"),
        ("caption", "--to huggingface --out Makefile", "Makefile exists"),
        ("nlvr", "--report", "is a start for training.*cls_head"),
    ],
)
def test_flags_and_weights_that_do_not_fit(configs, tmp_path, task, more, message):
    _, flags = write_model(BUILD[task], configs[task], tmp_path)
    if "start" in message:
        save_again(build_captioner(configs[task]), flags)
    with pytest.raises(UserError, match=message):
        run(flags, *more.split())


@pytest.mark.parametrize("to", ["compressed", "huggingface"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(captioner, tmp_path, full_disk, to):
    folder = tmp_path / "full"
    with pytest.raises(UserError, match=r"cannot write .*/out.*File too large"):
        run(captioner[1], "--to", to, "--out", folder / "out")
    assert list(folder.iterdir()) == []


def test_values_beyond_half_precision_are_named(captioner, tmp_path):
    model, flags = captioner
    model.visual_encoder.norm.bias.data[3] = 1e5
    save_again(model, flags)
    out = tmp_path / "small.safetensors"
    with pytest.raises(UserError, match=r"visual_encoder\.norm\.bias has values .* bfloat16"):
        run(flags, "--to", "compressed", "--out", out, "--dtype", "float16")
    assert not out.exists()
    run(flags, "--to", "compressed", "--out", out, "--dtype", "bfloat16")


@pytest.mark.parametrize("task", BUILD)
def test_the_report(configs, tmp_path, monkeypatch, capsys, task):
    model, flags = write_model(BUILD[task], configs[task], tmp_path)
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters())
    monkeypatch.setattr(costs, "sparsify_", lambda model: "all are sparse")
    run(flags, "--report")
    *printed, last = capsys.readouterr().out.splitlines()
    lines = {line[:26].strip(): line[26:] for line in printed}
    assert lines["nonzeros"].startswith(f" {costs.with_prefix(nonzeros)} (vision ")
    names = "parameters,multiply-adds, effective,bytes, compressed float16,ms a sample, dense"
    assert set(re.split(r",(?=\w)", names)) < set(lines)
    assert lines["memory, sparse"].endswith("B") and last == "all are sparse"
