"""What runs on a GPU, run on a simulated one: the CPU's results, and where it waits and copies.

Where the simulation cannot follow, and why that is enough:
- DistributedDataParallel and NCCL: what they need of a model is tested here on the CPU, and the
  runs of two processes in other tests go through the same lines with gloo.
- Memory that lies in pieces (`expandable_segments`): training asks for the same sizes at each step
  but for the length of texts, and the profile's one large buffer is freed before it is made anew,
  so nothing here depends on how the allocator cuts its segments.
"""

import json

import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ComputeID
import train_caption
import train_clip_flickr30k
import train_nlvr
from configs import load_config
from dimension import twonn
from dimension.capture import Capture
from dimension.profile import IDProfile, PartialProfile
from engine import loop, processes, tasks
from engine.processes import choose_device, init_distributed
from engine.profile import chosen_device
from engine.run import start
from engine.tasks import TASKS
from models import nlvr
from pruners import Pruner, kernels, threshold
from pruners.mask import mask_checksums
from tests.runs import make_scenes, result, same, write_config
from tests.simulated import SimTensor, attached
from tests.test_train_clip import CLIP
from utils import UserError

SCRIPTS = {"caption": train_caption, "nlvr": train_nlvr, "retrieval": train_clip_flickr30k}
N = 45  # samples of a profile


@pytest.fixture
def sim(monkeypatch):
    with attached(monkeypatch) as device:
        yield device


@pytest.fixture(autouse=True)
def no_scoring(monkeypatch):
    """Captions are compared themselves; their scores take seconds, on the CPU alone."""
    report = {"scores": {"CIDEr": 0.5}, "tokenizer": "none", "left_out": {}, "remarks": []}
    monkeypatch.setattr(tasks, "score_results", lambda *_, **options: report)


@pytest.fixture(autouse=True)
def same_arithmetic(monkeypatch):
    """Lets the CPU compute by an accelerator's operations, so that results are equal."""
    monkeypatch.setattr(kernels, "all_float32_on_cpu", lambda pieces: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(nlvr, "FIRST_MERGED_LAYER", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.set_num_threads(threads)


# --- the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(2),
        lambda x: torch.ones(2) * x[0],
        lambda x: x.masked_fill_(torch.ones(2, dtype=torch.bool), 0),
        lambda x: torch.cat([x, torch.ones(())[None]]),
        lambda x: torch.mm(x[None], torch.ones(2, 1)),
        lambda x: torch.where(x > 1, torch.ones(2), x),
        lambda x: torch.add(x, x, out=torch.empty(2)),
        lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1)),
    ],
)
def test_the_device_refuses_cpu_tensors(sim, operation):
    with pytest.raises(RuntimeError, match="expected tensors on one device"):
        operation(torch.tensor([1.0, 2.0], device="sim"))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, host: x + host(3.0),
        lambda x, host: host(3.0) / x,
        lambda x, host: torch.where(x > host(1.0), x, host(7.0)),
        lambda x, host: x[torch.tensor([1, 0])],
        lambda x, host: x.clone().index_put_((torch.tensor([0]),), host(5.0)),
    ],
)
def test_the_device_takes_host_scalars_and_indices(sim, operation):
    values = torch.tensor([1.0, 2.0])
    found = operation(values.to("sim"), torch.tensor)
    assert isinstance(found, SimTensor) and found.device == torch.device("sim:0")
    assert found.tolist() == operation(values, torch.tensor).tolist()


@pytest.mark.parametrize(
    ("operation", "waits", "transfers"),
    [
        (lambda x: x * 2 + x.sum(), 0, 0),
        (lambda x: x.to(torch.int64), 0, 0),
        (lambda x: x.sum().item(), 1, 0),
        (lambda x: bool((x > 0).any()), 1, 0),
        (lambda x: x.nonzero(), 1, 0),
        (lambda x: x[x > 1], 1, 0),
        (lambda x: x.tolist(), 1, 1),
        (lambda x: x.cpu(), 1, 1),
        (lambda x: torch.zeros(2).copy_(x), 1, 1),
        (lambda x: torch.ones(2).to("sim"), 1, 1),
        (lambda x: torch.tensor(1.0, device="sim"), 1, 1),
        (lambda x: torch.ones(2).to("sim", non_blocking=True), 0, 1),
        (lambda x: x.copy_(torch.ones(2), non_blocking=True), 0, 1),
        (lambda x: x[torch.tensor([0])], 1, 1),
    ],
)
def test_the_device_counts_waits_and_transfers(sim, operation, waits, transfers):
    x = torch.tensor([1.0, 2.0], device="sim")
    sim.clear()
    operation(x)
    assert (len(sim.waits), len(sim.transfers)) == (waits, transfers)


def test_the_devices_memory_is_its_own(sim):
    host = torch.ones(2)
    there = host.to("sim")
    there += 1
    back = there.cpu()
    there += 1
    assert [x.tolist() for x in (host, back, there)] == [[1, 1], [2, 2], [3, 3]]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_the_device_finds_a_source_that_changes_under_a_copy(sim):
    host = torch.ones(2)
    there = host.to("sim", non_blocking=True)
    there.sum().item()
    host += 1  # after a wait it may
    there.copy_(host, non_blocking=True)
    host += 1
    with pytest.raises(RuntimeError, match="while a copy from it was on its way"):
        there.sum().item()


def test_the_device_draws_from_its_own_generator(sim):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(9)  # on the CPU, which changes nothing on the device
    host_state = torch.get_rng_state()
    assert torch.equal(torch.rand(4, device="sim").cpu(), expected)
    assert torch.equal(torch.get_rng_state(), host_state)
    with pytest.raises(RuntimeError, match="generator of the device"):
        torch.rand(4, device="sim", generator=torch.Generator())


def test_the_device_may_lack_float64(sim):
    sim.has_float64 = False
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device="sim").double()


def test_autocast_multiplies_in_bfloat16_and_normalises_in_float32(sim):
    layer = nn.Linear(3, 3).to("sim")
    with torch.autocast("sim", torch.bfloat16):
        found = layer(torch.ones(2, 3, device="sim"))
        assert found.dtype == torch.bfloat16
        assert nn.functional.layer_norm(found, (3,)).dtype == torch.float32
        loss = nn.functional.cross_entropy(found, torch.zeros(2, dtype=torch.long, device="sim"))
    loss.backward()
    assert loss.dtype == layer.weight.grad.dtype == torch.float32


# --- which device --------------------------------------------------------------------------------


def test_an_accelerator_of_any_kind_is_chosen(sim):
    assert choose_device("auto", 1) == choose_device("sim", 1) == torch.device("sim:0")
    assert choose_device("cpu", 1) == torch.device("cpu")
    assert init_distributed("auto").device == torch.device("sim:0")
    for device, world_size, message in [
        ("cuda", 1, "cuda is asked for, but torch sees sim: take the CPU"),
        ("gpu", 1, "--device gpu: choose auto, cpu, cuda, cuda:N, mps or xpu"),
        ("sim:1", 1, "sim:1 is asked for, but there are 1 such devices"),
        ("sim:0", 2, "each process needs a device of its own"),
    ]:
        with pytest.raises(UserError, match=message):
            choose_device(device, world_size)
    assert chosen_device(cpu=False, gpu=0) == "sim:0"


def test_host_values_go_over_gloo_and_gradients_over_nccl(monkeypatch):
    """A host value in a NCCL group would be copied to the GPU, and wait for all its work."""
    begun = []
    monkeypatch.setattr(processes, "launched_processes", lambda: 2)
    monkeypatch.setattr(processes, "choose_device", lambda *_: torch.device("cuda", 1))
    monkeypatch.setattr(torch.accelerator, "set_device_index", begun.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: begun.append(backend))
    monkeypatch.setenv("RANK", "1")
    init_distributed()
    assert begun == [1, "cpu:gloo,cuda:nccl"]


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The scenes, and a config of each task without dropout."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_scenes(folder / "scenes")
    for name, dropout in (("caption", 0.0), ("dropout", 0.1)):
        write_config(folder / f"{name}.yaml", data, dropout, num_beams=3, max_epoch=1)
    yaml = YAML()
    config = yaml.load(folder / "caption.yaml")
    for key in ("coco_gt_root", "num_beams", "max_length"):
        config.pop(key)
    yaml.dump({**config, "batch_size": 1, "max_epoch": 3}, folder / "nlvr.yaml")
    for key in ("vit", "med_config", "prompt"):
        config.pop(key, None)
    yaml.dump({**config, "clip": CLIP, "queue_size": 8}, folder / "retrieval.yaml")
    return folder


# step 1 is not pruned, 2 and 4 are on the ramp, 6 is final
PRUNE = "--final_threshold 0.3 --warmup_steps 1 --deltaT 2 --max_steps 6"
PRUNE += " --initial_warmup 1 --final_warmup 1"
PLAIN = f"{PRUNE} --amp off --eval_epochs 0"
ACCUMULATED = f"{PLAIN} --gradient_accumulation_steps 2"


def run(folder, task, name, flags, config=None):
    script = SCRIPTS[task]
    argv = ["--config", str(folder / f"{config or task}.yaml"), "--output_dir", str(folder)]
    script.main(script.parse_args([*argv, "--model_dir", name, *flags.split()]))
    return folder / name


@pytest.mark.parametrize("task", SCRIPTS)
def test_training_gives_the_weights_and_the_log_of_the_cpu(folder, sim, task):
    sim.has_float64 = False
    flags = f"{ACCUMULATED} --eval_epochs 1"
    runs = [run(folder, task, f"{task}_{d}", f"{flags} --device {d}") for d in ("cpu", "sim")]
    assert same(*map(result, runs))
    logs = [[json.loads(line) for line in (r / "log.txt").read_text().splitlines()] for r in runs]
    assert logs[0] == logs[1]
    assert logs[0][-1]["step"] == 6 and logs[0][-1]["sparsity"] > 0.69


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_step_copies_its_inputs_and_waits_only_to_mask_and_to_log(folder, sim, monkeypatch, task):
    train_step, read_losses = loop.train_step, loop.read_losses
    seen = {}  # by step: copies before, copies and waits within, pruned or not

    def counted(run, state, parts, weights):
        inputs = [("to sim", tuple(x.shape), x.dtype) for part in parts for x in part]
        step = state.progress.step + 1
        if step > 1:  # before the first, the model was moved
            assert (sim.transfers, sim.waits) == (inputs, [])
        sim.clear()
        train_step(run, state, parts, weights)
        assert state.loader.pin_memory
        seen[step] = list(sim.transfers), len(sim.waits)
        masks = state.pruner.schedule.masks_at(step) and state.progress.remaining_ratio < 1
        assert sim.transfers == [] and bool(sim.waits) == masks, step
        sim.clear()

    def read(run, state):
        loss = read_losses(run, state)
        assert sim.waits == ["copy to cpu"]
        sim.clear()
        return loss

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(loop, "read_losses", read)
    monkeypatch.setattr(loop.Reporter, "is_due", lambda self, _: self.state.progress.step % 2 == 1)
    monkeypatch.setattr(loop, "save", lambda *_: sim.clear())
    monkeypatch.setattr(loop, "finish_epoch", lambda *_: sim.clear())
    run(folder, task, f"{task}_counted", f"{ACCUMULATED} --device sim --resume off")
    assert len(seen) == 6


class Killed(Exception):
    """Stands for a kill: nothing is written after it."""


def train_and_kill(monkeypatch, step, *arguments):
    train_step = loop.train_step

    def killed_after(run, state, parts, weights):
        train_step(run, state, parts, weights)
        if state.progress.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed_after)
        with pytest.raises(Killed):
            run(*arguments)


def test_resumes_bit_by_bit_with_the_devices_random_state(folder, sim, monkeypatch):
    flags = f"{PLAIN} --device sim --checkpoint_steps 2"
    whole = run(folder, "caption", "whole", flags, "dropout")
    train_and_kill(monkeypatch, 3, folder, "caption", "killed", flags, "dropout")
    torch.rand(5, device="sim")
    assert same(result(whole), result(run(folder, "caption", "killed", flags, "dropout")))


@pytest.mark.parametrize(("first", "then"), [("sim", "cpu"), ("cpu", "sim")])
def test_resumes_on_another_kind_of_device(folder, sim, monkeypatch, first, then):
    flags = f"{PLAIN} --checkpoint_steps 2 --device"
    whole = run(folder, "caption", "whole_cpu", f"{flags} cpu")
    name = f"from_{first}"
    train_and_kill(monkeypatch, 3, folder, "caption", name, f"{flags} {first}")
    assert same(result(whole), result(run(folder, "caption", name, f"{flags} {then}")))


def test_recomputed_blocks_draw_the_same_dropout(folder, sim):
    config = YAML().load(folder / "dropout.yaml")
    YAML().dump({**config, "vit_grad_ckpt": True}, folder / "recomputed.yaml")
    flags = f"{PLAIN} --device sim"
    plain, recomputed = (
        run(folder, "caption", f"{config}_blocks", flags, config)
        for config in ("dropout", "recomputed")
    )
    assert same(result(plain), result(recomputed))


def test_a_run_on_the_cpu_leaves_the_accelerator_alone(folder, sim):
    run(folder, "caption", "on_cpu", f"{PLAIN} --device cpu")
    assert (sim.rng_reads, sim.transfers, sim.waits) == (0, [], [])


def test_an_accelerator_trains_in_bfloat16_and_keeps_float32_weights(folder, sim, monkeypatch):
    train_step, types = loop.train_step, set()

    def hooked(run, state, parts, weights):
        layer = state.model.visual_encoder.blocks[0].attn.qkv
        hook = layer.register_forward_hook(lambda *call: types.add(call[-1].dtype))
        train_step(run, state, parts, weights)
        hook.remove()
        types.add(layer.weight.grad is None)

    monkeypatch.setattr(loop, "train_step", hooked)
    flags = f"{PRUNE} --device sim"  # with a validation
    done = run(folder, "caption", "bf16", flags)
    assert types == {torch.bfloat16, True}
    assert {x.dtype for x in result(done).values()} == {torch.float32}
    assert json.loads((done / "log.txt").read_text())["loss"] < 10


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "files"),
    [("caption", ["val", "test"]), ("nlvr", ["accuracy"]), ("retrieval", ["recalls"])],
)
def test_evaluation_gives_the_results_of_the_cpu(folder, sim, task, files):
    torch.manual_seed(0)
    model = TASKS[task].build_model(load_config(folder / f"{task}.yaml", task=task))
    torch.save({"model": model.state_dict()}, folder / f"{task}.pt")
    sim.has_float64 = False
    flags = f"--evaluate --pruned {folder / task}.pt --amp off --device"
    results = []
    for device in ("cpu", "sim"):
        done = run(folder, task, f"{task}_results_{device}", f"{flags} {device}")
        results.append([json.loads((done / f"results/{name}.json").read_text()) for name in files])
    assert results[0] == results[1]
    if task == "caption":
        assert {image["caption"] for image in results[0][0]} != {""}


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_captions_in_bfloat16(folder, sim, device):
    """On a CPU, the fast product of one row must not get weights in bfloat16."""
    run(folder, "caption", f"bf16_weights_{device}", f"{PRUNE} --eval_epochs 0 --device cpu")
    flags = f"--evaluate --pruned {folder}/bf16_weights_{device} --amp bf16 --device {device}"
    done = run(folder, "caption", f"bf16_captions_{device}", flags)
    assert len(json.loads((done / "results/val.json").read_text())) == 6


# --- pruner --------------------------------------------------------------------------------------


def pruner_of(device, method, layers=("0", "1")):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 300), nn.Linear(300, 260)).to(device)
    schedule = dict(total_steps=24, initial_warmup=1, final_warmup=2, warmup_steps=4, delta_t=3)
    ids = dict(zip(layers, (30.5, 2.25), strict=True))
    return Pruner(
        model, layers, method, final_threshold=0.2, steps_per_epoch=8, layer_id=ids, **schedule
    )


def take_steps(pruner, steps, gradients, as_views=False):
    """Steps of plain descent, with gradients of their own or in data parallelism's bucket."""
    found = []
    for step in steps:
        parameters = list(pruner.parameters.values())
        drawn = gradients[step].to(parameters[0].device)
        for p, grad in zip(parameters, drawn.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p) if as_views else grad.view_as(p).clone()
            p.data.sub_(p.grad, alpha=0.02)
        found.append(pruner.step(step))
    return found


@pytest.fixture
def gradients():
    numel = 9 * 300 + 300 + 300 * 260 + 260
    return torch.randn(25, numel, generator=torch.Generator().manual_seed(1))


def weights_of(pruner):
    return {name: p.detach().cpu() for name, p in pruner.parameters.items()}


@pytest.mark.parametrize("bracketed", [True, False])
@pytest.mark.parametrize("method", ["PLATON", "Taylor", "Magnitude"])
def test_prunes_as_on_the_cpu(sim, gradients, monkeypatch, method, bracketed):
    sim.has_float64 = False
    selected = []
    select_between = threshold.select_between
    if bracketed:  # so small a model would be sorted without a bracket
        monkeypatch.setattr(threshold, "SAMPLE", 1 << 14)
        monkeypatch.setattr(
            threshold,
            "select_between",
            lambda *call: selected.append(select_between(*call)) or selected[-1],
        )
    cpu, here = pruner_of("cpu", method), pruner_of("sim", method)
    assert take_steps(cpu, range(1, 25), gradients) == take_steps(here, range(1, 25), gradients)
    assert same(weights_of(cpu), weights_of(here))
    assert cpu.report() == here.report() and here.report()["pruned"] > 0.79 * here.numel
    assert any(found is not None for found in selected) == bracketed
    sums = [mask_checksums(p.parameters.values()).tolist() for p in (cpu, here)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("method", ["PLATON", "Taylor", "Magnitude"])
def test_a_pruners_state_goes_from_device_to_device(sim, gradients, method, tmp_path):
    whole = pruner_of("cpu", method)
    expected = take_steps(whole, range(1, 25), gradients)
    devices, last = ("sim", "cpu", "sim"), None
    for device, first in zip(devices, (1, 9, 17), strict=True):
        pruner = pruner_of(device, method)
        if last is not None:
            torch.save(last.state_dict(), tmp_path / "state.pt")
            pruner.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for name, value in weights_of(last).items():
                pruner.parameters[name].data.copy_(value)
        steps = range(first, first + 8)
        assert take_steps(pruner, steps, gradients) == expected[first - 1 : first + 7]
        last = pruner
    assert same(weights_of(whole), weights_of(last))


def test_gradients_may_be_views_of_a_bucket(sim, gradients):
    own, views = pruner_of("sim", "PLATON"), pruner_of("sim", "PLATON")
    expected = take_steps(own, range(1, 25), gradients)
    assert take_steps(views, range(1, 25), gradients, as_views=True) == expected
    assert same(weights_of(own), weights_of(views))


@pytest.mark.parametrize(("flags", "device"), [("", "sim"), ("--sparse", "cpu")])
def test_sparse_evaluation_takes_the_cpu(folder, sim, flags, device):
    argv = ["--config", str(folder / "caption.yaml"), "--output_dir", str(folder), "--evaluate"]
    args = train_caption.parse_args([*argv, "--model_dir", device, *flags.split()])
    assert start(args, tasks.CAPTION).process.device.type == device


# --- profile -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(folder):
    """Flags that profile a captioner, but for the device and the folder."""
    torch.manual_seed(0)
    model = TASKS["caption"].build_model(load_config(folder / "caption.yaml", task="caption"))
    torch.save({"model": model.state_dict()}, folder / "profiled.pt")
    flags = (
        f"--config {folder}/caption.yaml --pretrained {folder}/profiled.pt -n {N} --batch_size 8"
    )
    return flags.split()


def measure(flags, path, *more):
    ComputeID.main(ComputeID.parse_args([*flags, "--Path", str(path), *more]))
    return IDProfile.read(path)


@pytest.mark.parametrize("has_float64", [True, False])
def test_profile_is_that_of_the_cpu(profiled, sim, tmp_path, capsys, has_float64):
    sim.has_float64 = has_float64
    twonn.has_float64.cache_clear()
    here = measure(profiled, tmp_path / "sim", "--gpu", "0")
    assert "--memory_gb 0.86 of 1.07 GB free per process" in capsys.readouterr().out
    cpu = measure(profiled, tmp_path / "cpu", "--cpu")
    twonn.has_float64.cache_clear()
    assert here.layers == cpu.layers
    assert here.settings == cpu.settings | {"device": "sim"}


def test_distances_of_many_features(sim):
    """Float32 products of centred chunks, close pairs and duplicates computed anew."""
    points = torch.randn(50, twonn.PRODUCT_FEATURES + 40)
    points[7], points[8] = points[3], points[3] + 1e-4
    cpu, here = (twonn.pairwise_distances(points.to(device)) for device in ("cpu", "sim"))
    assert isinstance(here, SimTensor) and torch.equal(here.cpu(), cpu)
    permutations = twonn.draw_permutations(50, torch.Generator().manual_seed(0))
    of_cpu, of_sim = (twonn.block_analysis(d, permutations=permutations) for d in (cpu, here))
    torch.testing.assert_close(of_sim.mean, of_cpu.mean, rtol=0, atol=0, equal_nan=True)
    assert of_cpu.id == of_sim.id > 1
    assert of_cpu.duplicates == of_sim.duplicates == 2


def test_a_profile_does_not_go_on_where_another_device_was(profiled, sim, tmp_path, monkeypatch):
    """Half of the IDs would be rounded otherwise than the others."""
    add, measured = PartialProfile.add, []

    def killed_after_three(self, name, layer):
        if len(measured) == 3:
            raise Killed
        measured.append(name)
        add(self, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(PartialProfile, "add", killed_after_three)
        with pytest.raises(Killed):
            measure(profiled, tmp_path, "--cpu")
    anew = []
    monkeypatch.setattr(PartialProfile, "add", lambda self, *x: anew.append(x[0]) or add(self, *x))
    profile = measure(profiled, tmp_path)
    assert len(measured) == 3 and anew == list(profile.layers)


def test_profiles_use_no_tf32(profiled, tmp_path, monkeypatch):
    """On by default in cuDNN's convolutions, such as the patch embedding."""
    batches, precisions = Capture._batches, set()

    def noted(self, name):
        matmul = torch.get_float32_matmul_precision()
        precisions.add((matmul, torch.backends.cudnn.allow_tf32))
        return batches(self, name)

    monkeypatch.setattr(Capture, "_batches", noted)
    before = torch.backends.cudnn.allow_tf32
    measure(profiled, tmp_path, "--cpu")
    assert precisions == {("highest", False)} and torch.backends.cudnn.allow_tf32 == before


# --- what data parallelism and compilers need ----------------------------------------------------


@pytest.fixture
def batch():
    """By task, a batch as the training set gives it."""
    image, texts = torch.rand(2, 3, 32, 32), ["a picture of a red circle", "a picture of a square"]
    labels = torch.tensor([0, 1])
    return {
        "caption": (image, texts),
        "nlvr": (image, image, texts, labels),
        "retrieval": (image, texts, labels),
    }


@pytest.mark.parametrize("task", SCRIPTS)
def test_every_parameter_takes_part_in_the_loss(folder, batch, task):
    """Data parallelism would wait for the gradient of one that does not; tied ones are one."""
    model = TASKS[task].build_model(load_config(folder / f"{task}.yaml", task=task))
    tensors, _ = model.prepare(*batch[task])
    model(*tensors).backward()
    parameters = dict(model.named_parameters())
    assert [name for name, p in parameters.items() if p.grad is None] == []
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)


def test_tied_parameters_stay_tied_on_the_device(folder, sim):
    model = TASKS["caption"].build_model(load_config(folder / "caption.yaml", task="caption"))
    tied = len(list(model.parameters(recurse=True)))
    names = len(dict(model.named_parameters(remove_duplicate=False)))
    model.to("sim")
    assert len(list(model.parameters())) == tied < names


def test_compiled_steps_prune_and_recompute_as_plain_ones(folder, monkeypatch):
    """The graphs of torch.compile, run without a compiler of code.

    Without dropout: this way of running them draws it anew in recomputed blocks, while what
    `--compile` takes (AOTAutograd) keeps it.
    """
    compile_model = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_model(self, backend="eager"))
    config = YAML().load(folder / "caption.yaml")
    YAML().dump({**config, "vit_grad_ckpt": True}, folder / "compiled.yaml")
    flags = f"{PLAIN} --device cpu"
    plain, compiled = (
        run(folder, "caption", f"compiled{flag}", f"{flags} {flag}", "compiled")
        for flag in ("", "--compile")
    )
    assert same(result(plain), result(compiled))
