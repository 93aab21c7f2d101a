"""ComputeID.py as it is run: one process and two, stopped and resumed, and with mistakes."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import ComputeID
from configs import load_config
from data.caption_dataset import build_caption_datasets
from data.image_dataset import BadImageError
from data.nlvr_dataset import build_nlvr_datasets
from dimension.profile import IDProfile, PartialProfile
from engine import profile as profiling
from models import build_captioner, build_nlvr, prunable_layers
from tests.runs import compute_id, finish, ids, make_scenes, start, write_config, write_nlvr_config
from utils import UserError

N = 45
OTHER = ("--seed", "1")


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


def with_weights(config, model):
    """Flags to measure these weights with N samples."""
    weights = Path(config).with_name("weights.pt")
    torch.save({"model": model.state_dict()}, weights)
    return ["--config", config, "--pretrained", str(weights), "--cpu", "-n", str(N)]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Flags for a captioner of a few thousand weights and 48 scenes."""
    folder = tmp_path_factory.mktemp("caption")
    data = make_scenes(folder / "scenes", statements=48)
    config = write_config(folder / "config.yaml", data, batch_size=16)
    torch.manual_seed(0)
    return with_weights(config, build_captioner(load_config(config)))


@pytest.fixture(scope="module")
def whole(captioner, tmp_path_factory):
    """An undisturbed run: its folder and profile."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, compute_id(folder, *captioner, "--save_distances")


@pytest.fixture
def kept(whole, tmp_path):
    """A copy of its folder."""
    return Path(shutil.copytree(whole[0], tmp_path / "kept"))


@pytest.fixture
def own(captioner, tmp_path):
    """Flags of the captioner with data and sizes of its own, and their folder."""
    config = load_config(captioner[1])
    data = shutil.copytree(Path(captioner[1]).with_name("scenes"), tmp_path / "scenes")
    (tmp_path / "med.json").write_text(json.dumps(config["med_config"]))
    changes = {"batch_size": 16, "med_config": str(tmp_path / "med.json")}
    return [
        "--config",
        write_config(tmp_path / "c.yaml", data, **changes),
        *captioner[2:],
    ], tmp_path


def test_captioner(captioner, whole):
    folder, profile = whole
    config = load_config(captioner[1])
    model = build_captioner(config)
    assert list(profile.layers) == list(prunable_layers(model))
    dataset = build_caption_datasets(config)[0]
    texts = [dataset.text(index) for index in random_order(dataset)[:N]]
    longest = model.tokenize(texts)[0].shape[1]
    assert profile.layers["text_decoder.bert.encoder.layer.1.output.dense"].features == longest * 32
    assert all(layer.id > 1 for layer in profile.layers.values())
    assert profile.settings["nsamples"] == N
    files = {"ID.txt", "result_id.txt", "result_bar.txt", "dim.txt", "profile.json"}
    files |= {"ID.png", "scale.png", "estimators.png", "distances"}
    assert {path.name for path in folder.iterdir()} == files


def test_nlvr_of_few_samples_has_no_error_bars(captioner, tmp_path, capsys):
    config = write_nlvr_config(tmp_path / "c.yaml", Path(captioner[1]).with_name("scenes"))
    model = build_nlvr(load_config(config))
    profile = compute_id(tmp_path, *with_weights(config, model), "-n", 38, "--save_distances")
    assert list(profile.layers) == list(prunable_layers(model))
    assert profile.settings["config"]["task"] == "nlvr"
    out, remark = capsys.readouterr().out, profile.remarks[0]
    for kind, sees in (("vision", True), ("language", False)):
        found = [x for n, x in ids(profile).items() if n.startswith("visual_encoder") == sees]
        assert f"{kind}: {len(found)} layers, mean ID {sum(found) / len(found):.2f}" in out
    assert "no error bars" in remark and f"remark: {remark}" in out
    assert all(math.isnan(float(x)) for x in (tmp_path / "result_bar.txt").read_text().split())
    again = compute_id(tmp_path, "-s")
    assert (again.layers, again.remarks) == (profile.layers, profile.remarks)


def test_keep_padding_counts_padding(captioner, whole, tmp_path):
    """Layers that see the image keep their bits: nothing that they are computed from changes."""
    found, without = ids(compute_id(tmp_path, *captioner, "--keep_padding")), ids(whole[1])
    changed = {name for name in found if found[name] != without[name]}
    assert not any("visual" in name or ".crossattention.self.key" in name for name in changed)
    assert "text_decoder.bert.encoder.layer.1.output.dense" in changed


def test_two_processes_give_the_same_bits(captioner, whole, tmp_path):
    """Each runs all batches as one process does, and products of the same sizes and alignment."""
    started = start([*captioner, "--Path", str(tmp_path), "--save_distances"], 2, "ComputeID")
    assert finish(started) == [0, 0]
    folder, expected = whole
    assert IDProfile.read(tmp_path) == expected
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")) == files
    assert all(
        (folder / x).read_bytes() == (tmp_path / x).read_bytes()
        for x in files
        if x.suffix != ".png"
    )


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
            compute_id(*arguments)


CHANGES = {  # a file, and what becomes what in it
    "nothing": ("med.json", "", ""),
    "heads": ("med.json", 'attention_heads": 2', 'attention_heads": 4'),
    "words": ("scenes/tokenizer/vocab.txt", r"(\S+)\n(\S+)\n$", r"\2\n\1\n"),
    "order": ("scenes/annotation/coco_karpathy_train.json", r"(?s)^\[(.*?}),(.*?})", r"[\2,\1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_only_with_the_same_content(own, whole, monkeypatch, what):
    """The paths are the same; weights of the same shapes fit all of it."""
    flags, folder = own
    stop_at(monkeypatch, folder / "ID", *flags, layers=9)
    file, part, other = CHANGES[what]
    (folder / file).write_text(re.sub(part, other, (folder / file).read_text()))
    anew, add = [], PartialProfile.add
    monkeypatch.setattr(PartialProfile, "add", lambda self, *x: anew.append(x[0]) or add(self, *x))
    profile = compute_id(folder / "ID", *flags)
    assert len(profile.layers) - len(anew) == (9 if what == "nothing" else 0)
    assert (profile.layers == whole[1].layers) == (what == "nothing")
    assert not list((folder / "ID").glob("partial_*"))


def test_a_mistake_or_a_stopped_run_that_keeps_none_leaves_distances_alone(
    captioner, whole, kept, monkeypatch
):
    """Estimates without the model are equal to the bit: distances are symmetric as measured."""
    with pytest.raises(ValueError, match="too little"):
        compute_id(kept, *captioner, *OTHER, "--save_distances", "--memory_gb", "0.001")
    stop_at(monkeypatch, kept, *captioner, *OTHER)
    assert compute_id(kept, "-s").layers == whole[1].layers
    other = compute_id(kept, "-s", "--fraction", "0.9", *OTHER)
    assert other.settings["fraction"] == 0.9
    assert not set(ids(other).values()) & set(ids(whole[1]).values())


def test_a_run_that_keeps_no_distances_ends_those_of_the_run_before(captioner, kept):
    compute_id(kept, *captioner, *OTHER, "--compare", "configs/id/blip_coco.json")
    assert (kept / "compare.png").exists()
    with pytest.raises(ValueError, match="needs a profile measured with --save_distances"):
        compute_id(kept, "-s")


@pytest.mark.parametrize("before, message", [(False, "has not finished"), (True, "is not there")])
def test_a_stopped_run_leaves_no_mixed_distances(captioner, kept, monkeypatch, before, message):
    flags = [*captioner, "--save_distances"]
    stop_at(monkeypatch, kept, *flags, *OTHER, before=before)
    with pytest.raises(ValueError, match=message):
        compute_id(kept, "-s")
    if not before:  # a second run is stopped, too, and the first one's file is a second process's
        (kept / "partial_0.json").rename(kept / "partial_1.json")
        stop_at(monkeypatch, kept, *flags)
    again = compute_id(kept, *flags, *OTHER)
    assert ids(compute_id(kept, "-s", *OTHER)) == ids(again)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "49"], "only 48 samples"),
        (["--pretrained", "absent.pt"], "absent.pt"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--compare", "absent.json"], "absent.json"),
        (["--Path", "LICENSE/ID"], "cannot write to --Path LICENSE/ID"),
        (["--Path", "LICENSE"], "cannot write to --Path LICENSE"),
        (["--Path", "/proc/self"], "cannot write to --Path /proc/self"),
    ],
)
def test_mistakes(captioner, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        compute_id(tmp_path, *captioner, *flags)


@pytest.mark.cpu
def test_one_gpu_for_several_processes(monkeypatch):
    flags = {(False, 3): "cuda:3", (False, None): "auto", (True, None): "cpu"}
    assert [profiling.chosen_device(*given) for given in flags] == [*flags.values()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--gpu 3: torchrun gives every process a GPU"):
        profiling.chosen_device(cpu=False, gpu=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-n 2", "--nsamples: must be a whole number of at least 3"),
        ("--fraction 0", "--fraction: no points are left"),
        ("--images x", "--images goes with --hf"),
        ("--hf x -s", "--skip does not go with --hf"),
        ("--hf x --pruned y", "--pruned does not go with --hf"),
        ("-s --one_length", "-s has the samples of the run before"),
        ("--hf x --images x --one_length", "without --texts"),
        ("--hf x --images x --max_tokens 9", "without --texts"),
        ("--max_tokens 9", "max_tokens goes with --hf"),
        ("--one_length 0", "a whole number from 1"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        ComputeID.parse_args(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("-s", "ID/Blip_coco"),
        ("--config configs/retrieval_flickr_clip.yaml", "ID/retrieval_flickr_clip"),
        ("--hf openai/clip-vit-base-patch32", "ID/clip-vit-base-patch32"),
        ("--hf models/a.b/ --Path there", "there"),
        ("--hf models/a.b/", "ID/a.b"),
    ],
)
def test_no_profile_takes_the_place_of_another_models(flags, folder):
    assert ComputeID.parse_args(flags.split()).Path == folder


def random_order(dataset):
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()


def damage(path):
    content = Path(path).read_bytes()
    Path(path).unlink()  # scenes' files may be links of each other
    Path(path).write_bytes(content[: len(content) // 2])


def test_bad_images_give_way_to_the_next_samples(own, capsys):
    """One is cut off and one is missing among the first 44 of the random order."""
    flags, folder = own
    flags += ["-n", "44"]
    dataset = build_caption_datasets(load_config(flags[1]) | {"augment": False})[0]
    order = random_order(dataset)
    damage(*dataset.image_paths(order[3]))
    with pytest.raises(BadImageError, match="--skip_bad_images"):
        compute_id(folder / "id", *flags)
    Path(*dataset.image_paths(order[40])).unlink()
    with pytest.raises(UserError, match="1 of 48 images do not exist"):
        compute_id(folder / "id", *flags)
    profile = compute_id(folder / "id", *flags, "--skip_bad_images")
    assert profile.settings["bad_images"] == 2
    assert "remark: 2 samples were passed over" in capsys.readouterr().out
    dataset.skip_bad_images = True
    expected = [index for place, index in enumerate(order) if place not in (3, 40)][:44]
    assert profiling.choose_samples(dataset, 44, seed=0) == (expected, 2)
    with pytest.raises(UserError, match="-n 47: .* only 48 samples, of which 2 have images that"):
        profiling.choose_samples(dataset, 47, seed=0)
    nlvr = load_config(write_nlvr_config(folder / "nlvr.yaml", folder / "scenes"))
    pairs = build_nlvr_datasets(nlvr)[0]
    good = next(i for i in range(len(pairs)) if pairs.is_readable(i))
    damage(pairs.image_paths(good)[1])
    assert not pairs.is_readable(good)
