"""Training step of BLIP base with pruning, against the straightforward loop, in one process.

    python -m benchmarks.train
    python -m benchmarks.train --batch_size 20        # on a GPU

Straightforward: attention in separate operations, AdamW parameter by parameter, float32, and PLATON
as its formulas read. Ours: the trainer's own step, in float32 and with --amp bf16. All take the
same steps of a PLATON run in its cubic phase, with the same images; every tenth is a mask event.
From the two kinds of step follow the mean step of that phase, and that of the paper's whole run of
five epochs: one without events, three of the cubic phase, one with an event at each step. (Ours is
quicker still in that last epoch, where it finds one threshold in ten steps.) Needs Linux; with its
defaults 16 GB and two minutes.
"""

import argparse
import ctypes
import gc
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import train_caption
from benchmarks.pruner import Straightforward
from data.image_dataset import ImageDataset
from data.scenes.words import vocabulary
from engine.loop import train_step
from engine.plan import StepPlan, plan_steps
from engine.processes import keep_freed_memory
from engine.run import Run, start
from engine.state import build_pruner, build_state
from engine.tasks import CAPTION
from models.captioner import Captioner, build_captioner

DELTA_T = 10
EVENTS = {"cubic": 1 / DELTA_T, "run": (3 / DELTA_T + 1) / 5}  # share of the steps
FIRST_STEP = 209  # of 1000, in the cubic phase; 210 is a mask event
TEXT = "a picture of a small red circle to the left of a large blue square on a white background"

Step = Callable[[int], None]


def measure(step: Step, device: torch.device, ordinary: int) -> dict[str, float]:
    """Times optimizer steps.

    Args:
        step: takes the optimizer step of a number; its first call is not timed.
        device: to wait for.
        ordinary: steps to time besides a mask event.

    Returns:
        Seconds of the best `ordinary` step, of the mask `event`, of the mean step of the `cubic`
        phase and of the whole `run`, and `memory`, the peak in GB.
    """
    step(FIRST_STEP - 1)
    reset_peak(device)
    seconds = {}
    for number in range(FIRST_STEP, FIRST_STEP + ordinary + 1):
        began = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        kind = "ordinary" if number % DELTA_T else "event"
        seconds[kind] = min(seconds.get(kind, float("inf")), time.perf_counter() - began)
    ordinary, event = seconds["ordinary"], seconds["event"]
    means = {phase: (1 - share) * ordinary + share * event for phase, share in EVENTS.items()}
    return {"ordinary": ordinary, "event": event, **means, "memory": peak_memory(device)}


def reset_peak(device: torch.device) -> None:
    """Lets the peak of memory start from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of the process's resident memory


def peak_memory(device: torch.device) -> float:
    """Peak memory since `reset_peak` in GB, of the GPU or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024 / 1e9


def release_memory() -> None:
    """Gives back what the last loop left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def straightforward(run: Run, model: Captioner, batch: tuple) -> Step:
    """The loop that one would write first."""
    fuse_attention(model, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    pruner = build_pruner(run, model, plan(run))
    schedule, numel, plain = pruner.schedule, pruner.numel, Straightforward(pruner)
    del pruner

    def step(number: int) -> None:
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
        plain.update(number % DELTA_T)
        if number % DELTA_T == 0:
            plain.mask(int(numel * (1 - schedule.remaining_ratio(number))))

    return step


def ours(run: Run, model: Captioner, batch: tuple, amp: str) -> Step:
    """The trainer's step."""
    run = replace(run, args=argparse.Namespace(**{**vars(run.args), "amp": amp}))
    keep_freed_memory(run.process.device)
    fuse_attention(model, True)
    state = build_state(run, model, ImageDataset([{}] * 1000 * run.samples_per_step, ".", None))
    state.progress.step = FIRST_STEP - 2

    def step(number: int) -> None:
        train_step(run, state, [batch], [1.0])
        assert state.progress.step == number

    return step


def fuse_attention(model: Captioner, fused: bool) -> None:
    """Chooses one operation for the attention of the vision transformer, or several."""
    for block in model.visual_encoder.blocks:
        block.attn.fused_attn = fused


def plan(run: Run) -> StepPlan:
    """A run of 1000 steps."""
    return plan_steps(run.args, 1000 * run.samples_per_step, run.samples_per_step, 1)


def build_run(args: argparse.Namespace, folder: str) -> tuple[Run, nn.Module, tuple]:
    """BLIP base with random weights, and a batch of noise with one caption."""
    torch.manual_seed(0)
    Path(folder, "vocab.txt").write_text("\n".join(vocabulary()))
    flags = ["--warmup_steps", "50", "--output_dir", folder, "--batch_size", str(args.batch_size)]
    flags += ["--device", args.device]
    run = start(train_caption.parse_args(flags), CAPTION)
    sizes = {"vit": args.vit, "image_size": args.image_size, "tokenizer": folder}
    model = build_captioner({**run.config, **sizes}).to(run.process.device).train()
    image = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    return run, model, (image.to(run.process.device), [TEXT] * args.batch_size)


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each loop and one of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--vit", default="base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2, help="timed besides a mask event")
    args = parser.parse_args(argv)
    loops = {
        "straightforward": straightforward,
        "ours, float32": partial(ours, amp="off"),
        "ours, bf16": partial(ours, amp="bf16"),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run, model, batch = build_run(args, folder)
        columns = "".join(f"{name:>10}" for name in ("ordinary", "event", *EVENTS))
        print(f"{'seconds a step':16}{columns} {'memory':>10}")
        for name, loop in loops.items():
            results[name] = measure(loop(run, model, batch), run.process.device, args.steps)
            *seconds, memory = results[name].values()
            numbers = "".join(f"{value:10.3f}" for value in seconds)
            print(f"{name:16}{numbers} {memory:7.2f} GB", flush=True)
            model.zero_grad()
            release_memory()
    first, *others = results.items()
    for name, result in others:
        ratios = "".join(f"{first[1][kind] / result[kind]:9.2f}x" for kind in result)
        print(f"{first[0]} : {name:14}{ratios}")


if __name__ == "__main__":
    main()
