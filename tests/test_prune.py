"""prune.py on the tiny folders of test_hub and on tiny models of ours."""
# ruff: noqa: F401, F811, for fixtures that are imported

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import prune
from configs import load_config
from dimension.profile import IDProfile, LayerID
from engine import pruning
from engine.checkpoints import save_weights
from engine.tasks import TASKS
from models import hub
from models.checkpoint import load_trained
from models.layers import modality, prunable_layers
from reports import report
from reports.runs import read_run
from tests import runs, test_oneshot
from tests.test_hub import INPUTS, data, folders
from utils import UserError, write_json

HALF = ("--sparsity", "0.5", "-n", "8")


def flags(data, given):
    paths = {"images": data / "pictures", "texts": data / "texts"}
    return [x for name in given.split() for x in (f"--{name}", paths[name])]


def run(*argv) -> dict:
    """Runs the script, and reads its record."""
    args = prune.parse_args(list(map(str, argv)))
    prune.main(args)
    return json.loads((args.out / "pruning.json").read_text())


def tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """File and value of each stored tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: (path.name, file.get_tensor(key)) for key in file.keys()}
    return found


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory):
    """A folder whose processor gives patches of any grid, and their tokens."""
    model, special = test_oneshot.qwen2_vl()[0], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["<|video_pad|>", "<|vision_start|>", "<|image_pad|>", *special]
    words += [f"word{i}" for i in range(30)]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.add_special_tokens({"additional_special_tokens": words[:3]})
    size = {"patch_size": 4, "min_pixels": 64, "max_pixels": 256}
    parts = transformers.Qwen2VLImageProcessor, transformers.Qwen2VLVideoProcessor
    images, videos = (part(**size) for part in parts)
    folder = tmp_path_factory.mktemp("qwen2_vl")
    model.save_pretrained(folder)
    transformers.Qwen2VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "llava", "qwen2_vl", "vit", "bert"])
def test_the_folder_holds_the_pruned_model_to_the_bit(
    kind, folders, qwen2_vl, data, tmp_path, monkeypatch, capsys
):
    pruned, open_ = [], pruning.open_hub_model
    monkeypatch.setattr(pruning, "open_hub_model", lambda *x: pruned.append(open_(*x)) or pruned[0])
    source, out = qwen2_vl if kind == "qwen2_vl" else folders / kind, tmp_path / "out"
    inputs = flags(data, INPUTS.get(kind, "images texts"))
    record = run("--hf", source, *inputs, *HALF, "--out", out)
    model, other = pruned[0].model, transformers.AutoModel.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert kind == "bert" and "pooler" in name or torch.equal(value, other.state_dict()[name])
    for name, layer in record["layers"].items():
        weight = model.get_submodule(name).weight
        assert layer["zeros"] == int((weight == 0).sum()) == weight.numel() // 2
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all() and 0 < layer["error"] < 1
    assert transformers.AutoProcessor.from_pretrained(out)
    assert record["calibration"] == {"samples": 8, "held_out": 1}
    assert (record["method"], record["allocation"], record["seed"]) == ("Wanda", "uniform", 0)
    printed = capsys.readouterr().out
    assert f"{len(record['layers'])} linear layers" in printed and "next: evaluate it" in printed
    parts = {"clip": {"vision", "language", "other"}, "vit": {"vision"}, "bert": {"language"}}
    parts["qwen2_vl"] = {"vision", "language"}
    kinds = {layer["kind"] for layer in record["layers"].values()}
    assert kinds == parts.get(kind, parts["clip"])
    left = {"bert": {"pooler.dense": "the checkpoint lacks its weights"}}.get(kind, {})
    assert record["left_out"] == left and all(why in printed for why in left.values())


def test_shards_types_and_what_the_model_does_not_read_stay(folders, data, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folders / "llava")
    shutil.copytree(folders / "llava", source, ignore=shutil.ignore_patterns("*.safetensors"))
    model.bfloat16().save_pretrained(source, max_shard_size="8KB")
    (source / "pytorch_model.bin").write_bytes(b"dense")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    record = run(
        "--hf", source, *flags(data, INPUTS["clip"]), *HALF, "--skip", "*.fc1", "--out", out
    )
    before, after = tensors(source), tensors(out)
    assert len({file for file, _ in before.values()}) > 2 and before.keys() == after.keys()
    changed = 0
    for key, (file, value) in before.items():
        assert after[key][0] == file and after[key][1].dtype == value.dtype == torch.bfloat16
        zeros = after[key][1] == 0
        assert torch.equal(after[key][1], value.masked_fill(zeros, 0))
        changed += bool(zeros.sum() > (value == 0).sum())
    assert changed == len(record["layers"]) > 10 and not any("fc1" in x for x in record["layers"])
    assert (out / "1_Pooling" / "config.json").exists() and not (out / "pytorch_model.bin").exists()


def test_groups_order_and_samples_of_the_command(folders, data, tmp_path, monkeypatch):
    given, prune_, out = {}, pruning.oneshot.prune_, tmp_path / "out"

    def see(model, batches, *arguments, **options):
        given.update(options, batches=batches)
        return prune_(model, batches, *arguments, **options)

    monkeypatch.setattr(pruning.oneshot, "prune_", see)
    chosen = ("--nm", "2:4", "--sequential", "-n", "20", "--batch_size", "1")
    record = run("--hf", folders / "bert", *flags(data, "texts"), *chosen, "--out", out)
    assert record["sequential"] is given["sequential"] is True
    assert record["nm"] == list(given["nm"]) == [2, 4]
    rows = lambda part: {tuple(x["input_ids"].tolist()[0]) for x in given[part]}  # noqa: E731
    assert record["calibration"] == {"samples": 20, "held_out": 1}
    assert len(rows("held_out")) == 1 and not rows("held_out") & rows("batches")


def test_allocations(tmp_path):
    """The kinds are those that the profile names."""
    made = (("a", 1.0, "vision"), ("b", 3.0, "vision"), ("c", 8.0, "language"))
    layers = {name: LayerID(x, None, [], 9, 0, 1, kind=kind) for name, x, kind in made}
    IDProfile({}, layers).write(tmp_path)
    path = f"{tmp_path}/profile.json"
    for mode, more, expected in (
        ("uniform", (), ("", None)),
        (path, (), (path, {"a": 1.0, "b": 3.0, "c": 8.0})),
        ("modality", ("--id_profile", path), (path, {"a": 2.0, "b": 2.0, "c": 8.0})),
        ("inverse", ("--id_profile", path), (path, {"a": 1.0, "b": 1 / 3, "c": 1 / 8})),
    ):
        given = ["--hf", "x", "--out", "x", *HALF, "--allocation", mode, *more]
        assert pruning.read_allocation(prune.parse_args(given), None) == expected


@pytest.mark.parametrize(
    "task, write",
    [("caption", runs.write_config), ("nlvr", runs.write_nlvr_config),
     ("retrieval", runs.write_clip_config)],
)  # fmt: skip
def test_a_model_of_ours_is_evaluated_and_drawn(task, write, tmp_path, capsys):
    scenes = runs.make_scenes(tmp_path / "scenes", train=10, statements=10)
    config = load_config(write(tmp_path / "c.yaml", scenes))
    model, out = TASKS[task].build_model(config), tmp_path / "out"
    save_weights(model, tmp_path / "w.safetensors")
    names = list(prunable_layers(model))
    write_json(tmp_path / "ids.json", {name: 5.0 + 5 * (".blocks." in name) for name in names})
    given = ("--config", tmp_path / "c.yaml", "--pretrained", tmp_path / "w.safetensors")
    allocation = ("--allocation", "modality", "--id_profile", tmp_path / "ids.json")
    record = run(*given, *HALF, *allocation, "--out", out)
    assert set(record["layers"]) == set(names)
    assert record["calibration"] == {"samples": 8, "held_out": 1}
    load_trained(model, str(out))
    for name, layer in record["layers"].items():
        assert layer["zeros"] == int((model.get_submodule(name).weight == 0).sum())
        assert layer["kind"] == modality(name) and 0 < layer["error"] < 1
        assert (layer["zeros"] < layer["weights"] / 2) == (".blocks." in name)  # of the higher IDs
    found = read_run(out)
    assert found.sparsity["overall"] == 0.5 and found.config["task"] == task
    assert found.id_profile == str(tmp_path / "ids.json")
    if task != "caption":
        return
    printed = capsys.readouterr().out
    assert f"--evaluate --pruned {out}" in printed and "--to compressed" in printed
    report.main(report.parse_args([str(out), "--out", str(tmp_path / "page.html")]))
    page = (tmp_path / "page.html").read_text()
    assert "relative error of each layer&#39;s output, out" in page and "prune.py --config" in page


MISTAKES = {
    "--sparsity 1": "share of zeros, above 0 and below 1; got 1",
    "--sparsity 0.5 --nm 2:4": "give --sparsity, or --nm in its place",
    "": "give --sparsity, or --nm in its place",
    "--sparsity 0.5 --pretrained x": "--pretrained does not go with --hf",
    "--sparsity 0.5 --allocation inverse": "made of a profile: give --id_profile",
    "--sparsity 0.5 --id_profile x": "goes with --allocation modality or inverse",
    "--sparsity 0.5 --allocation {other}": "does not fit the model .*unknown: a",
    "--sparsity 0.5 --allocation {gone}": "cannot read the ID profile",
    "--sparsity 0.5 --texts {gone}": "cannot read",
    "--sparsity 0.5 --texts {one}": "one sample is too few",
    "--sparsity 0.5 --images {gone}": "there is no folder",
    "--sparsity 0.5 --skip *": "no layer is named",
    "--sparsity 0.5 --hf {gone}": "there is no such folder",
    "--sparsity 0.5 --device cuda:99": "is asked for, but",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(argv, folders, data, tmp_path):
    write_json(tmp_path / "in" / "other", {"a": 1.0})
    (tmp_path / "in" / "one").write_text("word1 word2\n")
    made = {name: tmp_path / "in" / name for name in ("other", "one", "gone")}
    given = ["--hf", folders / "bert", *argv.format(**made).split()]
    texts = [] if "--texts" in given else flags(data, "texts")
    with pytest.raises(UserError, match=MISTAKES[argv]):
        run(*given, *texts, "--out", tmp_path / "out" / "new")
    assert not (tmp_path / "out").exists()


def test_texts_are_needed_and_no_layer_called_is_refused(folders, data, tmp_path, monkeypatch):
    given = ("--hf", folders / "bert", *HALF, "--out", tmp_path / "new")
    with pytest.raises(UserError, match="takes texts: give --texts FILE"):
        run(*given)
    run(*given[:-1], tmp_path / "old", "--method", "Magnitude")  # needs none
    with pytest.raises(UserError, match=f"{tmp_path / 'old'} exists"):
        run(*given[:-1], tmp_path / "old")
    with pytest.raises(UserError, match=f"cannot write to {folders / 'bert' / 'config.json'}"):
        run(*given[:-1], folders / "bert" / "config.json" / "new")
    with pytest.raises(UserError, match="lies in the folder of --hf"):
        run(*given[:-1], folders / "bert" / "x" / "new", *flags(data, "texts"))
    monkeypatch.setattr(transformers.BertModel, "forward", lambda self, input_ids, **_: None)
    with pytest.raises(UserError, match="no layer to prune is called"):
        run(*given, *flags(data, "texts"))
    assert not (tmp_path / "new").exists()


def test_memory_is_stated_and_too_little_is_refused(folders, data, tmp_path, monkeypatch, capsys):
    given = ("--hf", folders / "vit", *flags(data, "images"), *HALF)
    size = (folders / "vit" / "model.safetensors").stat().st_size
    monkeypatch.setattr(pruning, "free_memory", lambda device: size - 1)
    with pytest.raises(UserError, match="take 0.00 GB of memory, and 0.00 GB are free .cpu"):
        run(*given, "--out", tmp_path / "a")
    monkeypatch.setattr(pruning, "free_memory", lambda device: 10**10)
    run(*given, "--out", tmp_path / "b")
    assert (
        "GB at the peak, beside a batch's activations; 10.00 GB are free" in capsys.readouterr().out
    )
    assert not (tmp_path / "a").exists()


def test_a_name_of_the_hub_and_short_batches(folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_require_reachable", lambda name: None)
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **_: str(folders / name.split("/")[1])
    )
    shapes, forward = [], transformers.BertModel.forward

    def see(self, input_ids, **others):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **others)

    monkeypatch.setattr(transformers.BertModel, "forward", see)
    run("--hf", "some/bert", *flags(data, "texts"), "--sparsity", "0.5", "--out", tmp_path / "out",
        "--batch_size", "6")  # fmt: skip
    lengths = [length for _, length in shapes]
    assert len(set(lengths)) > 2 and max(lengths) == 10  # no text is padded to the longest of all
