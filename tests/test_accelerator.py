"""What runs on a GPU: on the accelerator that torch finds, else on a simulated one.

The simulated one gives the CPU's results to the bit, and counts waits and copies. On a real one
trainings are compared in float64, where another order of sums changes 1e-16 of a number.
"""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs import load_config
from dimension import twonn
from dimension.profile import IDProfile
from engine import loop
from engine.tasks import TASKS
from models import nlvr
from tests import runs
from tests.runs import log_of, make_scenes, result, stopped_at, train_in_float64
from tests.simulated import DEVICE, DEVICE_TYPE, attached

SCRIPTS = {task.name: task.script.removesuffix(".py") for task in TASKS.values()}
REAL = torch.accelerator.current_accelerator(check_available=True)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9} if REAL else {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The name of the device, on which results are to be the CPU's within TOLERANCE."""
    monkeypatch.setattr(nlvr, "FIRST_MERGED_LAYER", 1)
    monkeypatch.setenv("PATH", "")  # no metrics in Java, which take long to start
    if REAL:
        train_in_float64(monkeypatch)
        yield REAL.type
        torch.set_default_dtype(torch.float32)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with attached(monkeypatch), sdpa_kernel(SDPBackend.MATH):
        DEVICE.has_float64 = False  # as Apple's GPUs
        twonn.has_float64.cache_clear()
        yield DEVICE_TYPE
    twonn.has_float64.cache_clear()
    torch.set_num_threads(threads)


def agree(ours: dict, theirs: dict) -> None:
    """Checks that tensors and numbers are equal within TOLERANCE, and their zeros the same."""
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for name, value in ours.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value == 0, theirs[name] == 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The scenes, and a config of each task; one with dropout and recomputed blocks, too."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_scenes(folder / "scenes", train=12)
    changes = {"max_epoch": 3, "batch_size": 1}
    runs.write_config(folder / "caption.yaml", data, 0.0, num_beams=3, **changes)
    runs.write_config(folder / "dropout.yaml", data, 0.1, **changes)
    runs.write_config(folder / "recomputed.yaml", data, 0.1, vit_grad_ckpt=True, **changes)
    runs.write_nlvr_config(folder / "nlvr.yaml", data, **changes)
    runs.write_clip_config(folder / "retrieval.yaml", data, queue_size=4, **changes)
    return folder


PRUNERS = {"caption": "PLATON", "nlvr": "Taylor", "retrieval": "Magnitude"}
# step 1 is not pruned, 2 and 4 are on the ramp, 6 is final
PRUNE = "--final_threshold 0.3 --warmup_steps 1 --deltaT 2 --max_steps 6"
PRUNE += " --initial_warmup 1 --final_warmup 1"
PLAIN = f"{PRUNE} --amp off --eval_epochs 0"
ACCUMULATED = f"{PRUNE} --amp off --eval_epochs 3 --gradient_accumulation_steps 2"


def run(folder, task, name, flags, config=None):
    config, script = folder / f"{config or task}.yaml", SCRIPTS[task]
    return runs.train(config, folder, name, *flags.split(), script=script)


def count_copies_and_waits(patch) -> list[int]:
    """Lets each step check that it copies its inputs, and waits only to mask and to log.

    Returns the steps that did.
    """
    train_step, read_losses, steps = loop.train_step, loop.read_losses, []

    def counted(run, state, parts, *terms):
        inputs = [("to sim", tuple(x.shape), x.dtype) for part in parts for x in part]
        step = state.progress.step + 1
        if step > 1:  # before the first, the model was moved
            assert (DEVICE.transfers, DEVICE.waits) == (inputs, [])
        DEVICE.clear()
        train_step(run, state, parts, *terms)
        assert state.loader.pin_memory
        masks = state.pruner.schedule.masks_at(step) and state.progress.remaining_ratio < 1
        assert DEVICE.transfers == [] and bool(DEVICE.waits) == masks, step
        DEVICE.clear()
        steps.append(step)

    def read(run, state):
        loss = read_losses(run, state)
        assert DEVICE.waits == ["copy to cpu"]
        DEVICE.clear()
        return loss

    def then_clear(call):
        return lambda *args: (call(*args), DEVICE.clear())

    patch.setattr(loop, "train_step", counted)
    patch.setattr(loop, "read_losses", read)
    patch.setattr(loop.Reporter, "is_due", lambda self, _: self.state.progress.step % 2 == 1)
    for name in ("save", "finish_epoch"):
        patch.setattr(loop, name, then_clear(getattr(loop, name)))
    return steps


@pytest.mark.parametrize("task", SCRIPTS)
def test_training_and_validation_are_those_of_the_cpu(folder, device, task, monkeypatch):
    flags = f"{ACCUMULATED} --pruner_name {PRUNERS[task]} --device"
    cpu = run(folder, task, f"{task}_cpu", f"{flags} cpu")
    steps = [] if REAL else count_copies_and_waits(monkeypatch)
    here = run(folder, task, f"{task}_here", f"{flags} {device}")
    assert REAL or steps == [1, 2, 3, 4, 5, 6]
    agree(result(cpu), result(here))
    last = log_of(here)[-1]
    agree(last, log_of(cpu)[-1])
    assert last["step"] == 6 and last["sparsity"] > 0.69
    if task == "caption":
        captions, others = ((x / "results/val.json").read_text() for x in (cpu, here))
        assert captions == others and '"caption": ""' not in captions


def test_resumes_with_the_devices_random_state_and_recomputes_with_it(folder, device):
    """On a GPU to the bit where its kernels are deterministic; here within TOLERANCE."""
    flags = f"{PLAIN} --device {device} --checkpoint_steps 2"
    whole = run(folder, "caption", "whole", flags, "dropout")
    with stopped_at(4, KeyboardInterrupt):
        run(folder, "caption", "killed", flags, "dropout")
    torch.rand(5, device=device)
    killed = run(folder, "caption", "killed", flags, "dropout")
    agree(result(whole), result(killed))
    agree(result(whole), result(run(folder, "caption", "blocks", flags, "recomputed")))


@pytest.mark.parametrize("back", [False, True])
def test_resumes_on_another_kind_of_device(folder, device, back):
    first, then = (device, "cpu") if back else ("cpu", device)
    flags = f"{PLAIN} --checkpoint_steps 2 --device"
    DEVICE.clear()
    whole = run(folder, "caption", f"whole_{back}", f"{flags} cpu")
    assert (DEVICE.rng_reads, DEVICE.transfers, DEVICE.waits) == (0, [], [])
    name = f"from_{first}"
    with stopped_at(4, KeyboardInterrupt):
        run(folder, "caption", name, f"{flags} {first}")
    agree(result(whole), result(run(folder, "caption", name, f"{flags} {then}")))


@pytest.mark.parametrize(
    ("accelerated", "amp", "half"),
    [(True, "auto", True), (False, "auto", False), (False, "bf16", True)],
)
def test_amp_chooses_the_precision_of_products(folder, device, monkeypatch, accelerated, amp, half):
    linear, types = nn.Linear.forward, set()

    def noted(self, x):
        out = linear(self, x)
        types.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", noted)
    flags = f"--device {device if accelerated else 'cpu'} --amp {amp} --max_steps 4"
    done = run(folder, "caption", f"{accelerated}_{amp}", f"{PRUNE} {flags}")
    own = torch.get_default_dtype()
    assert types == {torch.bfloat16 if half else own}
    assert {x.dtype for x in result(done).values()} == {own}
    assert log_of(done)[-1]["loss"] < 10 and log_of(done)[-1]["val_CIDEr"] >= 0


@pytest.mark.skipif(REAL is not None, reason="compares bits")
@pytest.mark.parametrize("has_float64", [True, False])
def test_profile_is_that_of_the_cpu(folder, tmp_path, monkeypatch, capsys, has_float64):
    """Also of outputs with many features, whose products are float32 by chunks."""
    torch.manual_seed(0)
    model = TASKS["caption"].build_model(load_config(folder / "caption.yaml", task="caption"))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    monkeypatch.setattr(DEVICE, "has_float64", has_float64)
    monkeypatch.setattr(twonn, "PRODUCT_FEATURES", 100)
    monkeypatch.setattr("dimension.profile.ENOUGH_POINTS", 5)  # of blocks of 6
    profiles = []
    for name, flags in (("sim", ["--gpu", "0"]), ("cpu", ["--cpu"])):
        argv = ["--config", str(folder / "caption.yaml"), "--pretrained", f"{tmp_path}/model.pt"]
        runs.run("ComputeID", [*argv, "-n", "12", "--Path", str(tmp_path / name), *flags])
        profiles.append(IDProfile.read(tmp_path / name))
    assert profiles[0].layers == profiles[1].layers
    assert "--memory_gb 0.86 of 1.07 GB free per process" in capsys.readouterr().out
