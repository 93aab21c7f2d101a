"""ComputeID.py as it is run: one process and two, stopped and resumed, and with mistakes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import ComputeID
from configs import load_config
from data.caption_dataset import build_caption_datasets
from data.image_dataset import BadImageError
from data.nlvr_dataset import NlvrDataset
from data.scenes import __main__ as scenes
from dimension.capture import Accumulator
from dimension.profile import IDProfile, PartialProfile, load_distances
from engine import profile as profiling
from models import build_captioner, build_nlvr, prunable_layers
from tests.runs import finish, start, write_config
from utils import UserError, launch

N = 45
LITTLE_MEMORY = ["--memory_gb", "0.1353"]
ROUNDING32 = 2.0**-24  # at most, relative to the result of an operation
SIZES = "--train 48 --val 8 --test 8 --statements 48 --heldout_statements 8".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As torchrun's processes have: the bits of a product depend on the number of threads.

    With it, the same flags give the same bits on any processor, whatever the budget and however
    many processes share the layers: see `dimension.capture`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Flags for a captioner of a few thousand weights and 48 scenes."""
    folder = tmp_path_factory.mktemp("caption")
    scenes.main(scenes.parse_args(["--out", str(folder / "scenes"), *SIZES]))
    config = write_config(folder / "config.yaml", folder / "scenes", batch_size=16)
    torch.manual_seed(0)
    model = build_captioner(load_config(config))
    torch.save({"model": model.state_dict()}, folder / "weights.pt")
    return ["--config", config, "--pretrained", str(folder / "weights.pt"), "--cpu", "-n", str(N)]


def measure(flags, folder, *more):
    ComputeID.main(ComputeID.parse_args([*flags, "--Path", str(folder), *more]))
    return IDProfile.read(folder)


def ids(profile):
    return {name: layer.id for name, layer in profile.layers.items()}


@pytest.fixture(scope="module")
def whole(captioner, tmp_path_factory):
    """An undisturbed run: its folder and profile."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, measure(captioner, folder, "--save_distances")


def test_captioner(captioner, whole):
    folder, profile = whole
    config = load_config(captioner[1])
    layers = list(prunable_layers(build_captioner(config)))
    assert list(profile.layers) == layers
    assert (folder / "ID.txt").read_text().split() == layers
    values = [float(line) for line in (folder / "result_id.txt").read_text().split()]
    assert values == list(ids(profile).values())
    dataset = build_caption_datasets(config)[0]
    texts = [dataset.text(index) for index in random_order(dataset)[:N]]
    longest = build_captioner(config).tokenize(texts)[0].shape[1]
    vision_tokens = (32 // 16) ** 2 + 1
    features = {name: layer.features for name, layer in profile.layers.items()}
    assert features["visual_encoder.blocks.0.attn.qkv"] == vision_tokens * 3 * 32
    text = "text_decoder.bert.encoder.layer.1."
    assert features[text + "crossattention.self.key"] == vision_tokens * 32
    assert features[text + "intermediate.dense"] == longest * 64
    assert all(layer.id > 1 for layer in profile.layers.values())
    assert profile.settings["nsamples"] == N
    assert (folder / "dim.txt").read_text().split() == [str(x) for x in features.values()]
    assert {"ID.png", "scale.png"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("partial_*"))


def test_nlvr(captioner, tmp_path, capsys):
    data = Path(captioner[1]).parent / "scenes"
    changes = {"batch_size_train": 8, "batch_size_test": 8}
    path = write_config(tmp_path / "config.yaml", data, **changes)
    captioning = ("coco_gt_root", "batch_size:", "num_beams", "max_length")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(captioning)]
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    torch.manual_seed(0)
    model = build_nlvr(load_config(path))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    flags = ["--config", path, "--pretrained", str(tmp_path / "weights.pt"), "--cpu", "-n", "40"]
    profile = measure(flags, tmp_path / "id")
    assert list(profile.layers) == list(prunable_layers(model))
    assert profile.settings["config"]["task"] == "nlvr"
    means = {"vision": [], "language": []}
    for name, value in ids(profile).items():
        means["vision" if name.startswith("visual_encoder") else "language"].append(value)
    out = capsys.readouterr().out
    for kind, values in means.items():
        assert f"{kind}: {len(values)} layers, mean ID {sum(values) / len(values):.2f}" in out


def test_budget_changes_nothing(captioner, whole, tmp_path, capsys):
    found = measure(captioner, tmp_path, "--save_distances", *LITTLE_MEMORY)
    assert "forward work 1.00" not in capsys.readouterr().out
    assert found == whole[1]


def test_batch_size_changes_nothing(captioner, tmp_path, monkeypatch):
    """But what is kept of an output is rounded to float32, about another batch's mean.

    Its size is at most the largest distance; so each run moves a distance by two roundings of that.
    In float64, where the batch size changes roundings 2^-29 as large.
    """
    read = profiling.Images.__getitem__
    monkeypatch.setattr(profiling.Images, "__getitem__", lambda *args: read(*args).double())
    folders = {size: tmp_path / size for size in ("16", "7")}
    torch.set_default_dtype(torch.float64)
    try:
        for size, folder in folders.items():
            profile = measure(captioner, folder, "--save_distances", "--batch_size", size)
            assert profile.settings["batch_size"] == int(size)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in profile.layers:
        expected, found = (load_distances(folder, name) for folder in folders.values())
        bound = 2 * 2 * ROUNDING32 * expected.max().item() * 1.01
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_keep_padding_counts_padding(captioner, whole, tmp_path):
    """Layers that see the image keep their bits: nothing that they are computed from changes."""
    found, without = ids(measure(captioner, tmp_path, "--keep_padding")), ids(whole[1])
    changed = {name for name in found if found[name] != without[name]}
    assert not any("visual" in name or ".crossattention.self.key" in name for name in changed)
    assert "text_decoder.bert.encoder.layer.1.output.dense" in changed


def test_two_processes_give_the_same_bits(captioner, whole, tmp_path):
    """Each runs all batches as one process does, and products of the same sizes and alignment."""
    started = start([*captioner, "--Path", str(tmp_path), "--save_distances"], 2, "ComputeID")
    assert finish(started) == [0, 0]
    folder, expected = whole
    assert IDProfile.read(tmp_path) == expected
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == files
    for name in ("ID.txt", "result_id.txt", "result_bar.txt", "dim.txt", "profile.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def stop_at(monkeypatch, *arguments, layers=1, before=False):
    """A run that is stopped at its first layers: after its ID, or after its distances alone."""

    def add(self, name, layer, add=PartialProfile.add):
        if not before:
            add(self, name, layer)
        if before or len(self.mine) == layers:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialProfile, "add", add)
        with pytest.raises(KeyboardInterrupt):
            measure(*arguments)


def test_resumes_at_the_first_unfinished_layer(captioner, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, captioner, tmp_path, layers=9)
    done = json.loads((tmp_path / "partial_0.json").read_text())["layers"]
    captured, hold = [], Accumulator.hold

    def recorded(self, planned, segments):
        captured.extend({segment.layer.name for segment in segments})
        hold(self, planned, segments)

    monkeypatch.setattr(Accumulator, "hold", recorded)
    assert measure(captioner, tmp_path).layers == whole[1].layers
    assert len(done) == 9
    assert sorted(captured) == sorted(set(whole[1].layers) - set(done))
    assert not list(tmp_path.glob("partial_*"))


@pytest.fixture
def own(captioner, tmp_path):
    """Flags of the captioner with data, sizes and weights of its own, and their folder."""
    source = Path(captioner[1]).parent
    shutil.copytree(source / "scenes", tmp_path / "scenes")
    sizes = load_config(captioner[1])["med_config"]
    (tmp_path / "med.json").write_text(json.dumps(sizes))
    changes = {"batch_size": 16, "med_config": str(tmp_path / "med.json")}
    config = write_config(tmp_path / "config.yaml", tmp_path / "scenes", **changes)
    return ["--config", config, *captioner[2:-1]], tmp_path


def reverse_annotation(folder):
    file = folder / "scenes" / "annotation" / "coco_karpathy_train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))


def other_heads(folder):
    file = folder / "med.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 4}))


def other_words(folder):
    file = folder / "scenes" / "tokenizer" / "vocab.txt"
    words = file.read_text().splitlines()
    words[-1], words[-2] = words[-2], words[-1]
    file.write_text("\n".join(words) + "\n")


@pytest.mark.parametrize("change", [None, reverse_annotation, other_heads, other_words])
def test_a_run_goes_on_only_with_the_same_content(own, monkeypatch, change):
    """The paths are the same; weights of the same shapes fit all of it."""
    flags, folder = own
    stop_at(monkeypatch, [*flags, "20"], folder / "ID", layers=3)
    if change:
        change(folder)
    anew, add = [], PartialProfile.add
    monkeypatch.setattr(PartialProfile, "add", lambda self, *x: anew.append(x[0]) or add(self, *x))
    profile = measure([*flags, "20"], folder / "ID")
    assert len(profile.layers) - len(anew) == (0 if change else 3)


def test_estimates_again_without_the_model(whole, monkeypatch):
    """To the bit: kept is the upper half of distances that were symmetric by construction."""
    folder, before = whole
    monkeypatch.setattr(profiling, "measure_task", None)
    assert measure(["-s"], folder).layers == before.layers
    other = measure(["-s"], folder, "--fraction", "0.9", "--seed", "5")
    assert other.settings["fraction"] == 0.9
    assert not set(ids(other).values()) & set(ids(before).values())
    before.write(folder)


def test_needs_kept_distances_of_the_same_run(captioner, tmp_path):
    measure(captioner, tmp_path, "--save_distances")
    measure(captioner, tmp_path, "--seed", "1", "--compare", "configs/id/blip_coco.json")
    assert (tmp_path / "compare.png").exists()
    with pytest.raises(ValueError, match="needs a profile measured with --save_distances"):
        measure(["-s"], tmp_path)


OTHER = ("--save_distances", "--seed", "1")


@pytest.mark.parametrize("before, message", [(False, "has not finished"), (True, "is not there")])
def test_a_stopped_run_leaves_no_mixed_distances(captioner, tmp_path, monkeypatch, before, message):
    measure(captioner, tmp_path, "--save_distances")
    stop_at(monkeypatch, captioner, tmp_path, *OTHER, before=before)
    with pytest.raises(ValueError, match=message):
        measure(["-s"], tmp_path)
    if not before:  # a second run is stopped, too, and the first one's file is a second process's
        (tmp_path / "partial_0.json").rename(tmp_path / "partial_1.json")
        stop_at(monkeypatch, captioner, tmp_path, "--save_distances")
    again = measure(captioner, tmp_path, *OTHER)
    assert ids(measure(["-s"], tmp_path, "--seed", "1")) == ids(again)


def test_a_mistake_or_a_run_that_keeps_none_leaves_distances_alone(
    captioner, tmp_path, monkeypatch
):
    before = measure(captioner, tmp_path, "--save_distances")
    with pytest.raises(ValueError, match="too little"):
        measure(captioner, tmp_path, *OTHER, "--memory_gb", "0.001")
    stop_at(monkeypatch, captioner, tmp_path, "--seed", "1")
    assert ids(measure(["-s"], tmp_path)) == ids(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "49"], "only 48 samples"),
        (["--memory_gb", "0.0001"], "--memory_gb 0.0001 is too little"),
        (["--pretrained", "absent.pt"], "absent.pt"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--compare", "absent.json"], "absent.json"),
    ],
)
def test_mistakes(captioner, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        measure(captioner, tmp_path, *flags)


@pytest.mark.parametrize("place", ["file/ID", "file", "/proc/self"])
def test_a_place_that_cannot_be_written(captioner, tmp_path, monkeypatch, place):
    """Known before processes meet and the model is built."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(profiling, "init_distributed", None)
    with pytest.raises(UserError, match=f"cannot write to --Path .*{place}"):
        measure(captioner, tmp_path / place)


def test_one_gpu_for_several_processes(monkeypatch):
    assert profiling.chosen_device(cpu=False, gpu=3) == "cuda:3"
    assert profiling.chosen_device(cpu=False, gpu=None) == "auto"
    assert profiling.chosen_device(cpu=True, gpu=None) == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--gpu 3: torchrun gives every process a GPU"):
        profiling.chosen_device(cpu=False, gpu=3)


def test_few_samples_and_repeated_ones(captioner, whole, own, capsys):
    """45 samples make two blocks of 20 points; 38 one; a data set of 24 records twice: twins."""
    assert [list(map(bool, x.block_means)) for x in whole[1].layers.values()] == [
        [True] * 2 + [False] * 18
    ] * len(whole[1].layers)
    remark, *_ = whole[1].remarks
    assert "45 samples are few" in remark and "over 2 of 20 levels;" in remark
    assert "-n 400 is enough" in remark
    capsys.readouterr()
    flags, folder = own
    again = measure([*flags, "38"], folder / "38", "--save_distances")
    assert "over 1 of 20 levels and have no error bars" in again.remarks[0]
    assert f"remark: {again.remarks[0]}" in capsys.readouterr().out
    assert all(layer.error is None for layer in again.layers.values())
    bars = (folder / "38" / "result_bar.txt").read_text().split()
    assert all(math.isnan(float(bar)) for bar in bars)
    assert measure(["-s"], folder / "38").remarks == again.remarks

    file = folder / "scenes" / "annotation" / "coco_karpathy_train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:24] * 2))
    twice = measure([*flags, "48"], folder / "ID")
    assert all(layer.duplicates == 48 for layer in twice.layers.values())
    assert f"in {len(twice.layers)} of {len(twice.layers)} layers" in twice.remarks[1]
    assert ": 100%) and are left out" in twice.remarks[1]


def test_paper_command_without_coco(tmp_path, monkeypatch, capsys):
    """As users of the paper's code type it, in a folder without data and without a network."""

    def offline(*_, **__):
        raise OSError("no network")

    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    argv = ["-n", "2000", "--Path", "ID/Blip_coco", "--cpu"]
    with pytest.raises(SystemExit) as stop:
        launch(ComputeID.main, ComputeID.parse_args(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "coco_karpathy_train.json" in error and "demo" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "2"], "--nsamples: must be a whole number of at least 3"),
        (["--fraction", "0"], "--fraction: no points are left"),
        (["--cpu", "--gpu", "0"], "argument --gpu: not allowed with argument --cpu"),
        (["--batch_size", "0"], "--batch_size: must be a whole number from 1 to"),
        (["--images", "x"], "--images goes with --hf"),
        (["--hf", "x", "-s"], "--skip does not go with --hf"),
        (["--hf", "x", "--pruned", "y"], "--pruned does not go with --hf"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        ComputeID.parse_args(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "ID/Blip_coco"),
        (["-s"], "ID/Blip_coco"),
        (["--config", "configs/retrieval_flickr_clip.yaml"], "ID/retrieval_flickr_clip"),
        (["--hf", "openai/clip-vit-base-patch32"], "ID/clip-vit-base-patch32"),
        (["--hf", "models/a.b/", "--Path", "there"], "there"),
        (["--hf", "models/a.b/"], "ID/a.b"),
    ],
)
def test_no_profile_takes_the_place_of_another_models(flags, folder):
    assert ComputeID.parse_args(flags).Path == folder


def random_order(dataset, seed=0):
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()


def damage(path):
    content = Path(path).read_bytes()
    Path(path).unlink()  # scenes' files may be links of each other
    Path(path).write_bytes(content[: len(content) // 2])


def test_bad_images_give_way_to_the_next_samples(own, capsys):
    """One is cut off and one is missing among the first 44 of the random order."""
    flags, folder = own
    dataset = build_caption_datasets(load_config(flags[1]) | {"augment": False})[0]
    order = random_order(dataset)
    damage(*dataset.image_paths(order[3]))
    with pytest.raises(BadImageError, match=r"go on without such images under --skip_bad_images"):
        measure([*flags, "44"], folder / "id")
    (missing,) = dataset.image_paths(order[40])
    Path(missing).unlink()
    with pytest.raises(UserError, match="1 of 48 images do not exist"):
        measure([*flags, "44"], folder / "id")

    profile = measure([*flags, "44", "--skip_bad_images"], folder / "id")
    assert profile.settings["bad_images"] == 2
    assert profile.remarks[0].startswith("2 samples were passed over for others")
    assert "remark: 2 samples were passed over" in capsys.readouterr().out
    dataset.skip_bad_images = True
    expected = [index for place, index in enumerate(order) if place not in (3, 40)][:44]
    assert profiling.choose_samples(dataset, 44, seed=0) == (expected, 2)
    with pytest.raises(UserError, match="-n 47: .* only 48 samples, of which 2 have images that"):
        profiling.choose_samples(dataset, 47, seed=0)


def test_a_pair_with_one_bad_image_gives_way(own):
    data = own[1] / "scenes"
    records = json.loads((data / "annotation" / "nlvr_train.json").read_text())
    dataset = NlvrDataset(records, data / "images", None, max_words=50, swap=False)
    dataset.skip_bad_images = True
    order = random_order(dataset)
    damage(dataset.image_paths(order[1])[1])
    bad = {
        index for index in order if dataset.image_names(order[1])[1] in dataset.image_names(index)
    }
    expected = [index for index in order if index not in bad][:20]
    passed_over = order.index(expected[-1]) + 1 - 20
    assert profiling.choose_samples(dataset, 20, seed=0) == (expected, passed_over)
    assert passed_over >= 1
