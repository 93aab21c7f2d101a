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
from benchmarks.timing import peak_memory, print_document, reset_peak, wait
from data.image_dataset import ImageDataset
from data.scenes.words import vocabulary
from engine.experiment import Run, read_experiment
from engine.loop import train_step
from engine.main import start
from engine.processes import keep_freed_memory
from engine.state import build_pruner, build_state, plan_steps
from models.captioner import Captioner, build_captioner

DELTA_T, STEPS = 10, 1000
EVENTS = {"cubic": 1 / DELTA_T, "run": (3 / DELTA_T + 1) / 5}  # share of the steps
FIRST_STEP = 209  # in the cubic phase; 210 is a mask event
TEXT = "a picture of a small red circle to the left of a large blue square on a white background"

Step = Callable[[int], None]


def measure(step: Step, device: torch.device, ordinary: int) -> dict[str, float]:
    """Seconds of the best of some ordinary steps, of a mask event, of mean steps; peak bytes."""
    step(FIRST_STEP - 1)
    reset_peak(device)
    found = {}
    for number in range(FIRST_STEP, FIRST_STEP + ordinary + 1):
        began = time.perf_counter()
        step(number)
        wait(device)
        kind = "ordinary" if number % DELTA_T else "event"
        found[kind] = min(found.get(kind, float("inf")), time.perf_counter() - began)
    for phase, share in EVENTS.items():
        found[phase] = (1 - share) * found["ordinary"] + share * found["event"]
    return found | {"memory": peak_memory(device)}


def straightforward(run: Run, model: Captioner, batch: tuple) -> Step:
    """The loop that one would write first."""
    fuse_attention(model, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    plan = plan_steps(run.flags, STEPS * run.samples_per_step, run.samples_per_step, 1)
    pruner = build_pruner(run.flags, model, plan, None)
    schedule, numel, plain = pruner.schedule, pruner.numel, Straightforward(pruner)

    def step(number: int) -> None:
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
        plain.update(number % DELTA_T)
        if number % DELTA_T == 0:
            plain.mask(int(numel * (1 - schedule.remaining_ratio(number))))

    return step


def ours(run: Run, model: Captioner, batch: tuple, bf16: bool) -> Step:
    """The trainer's step."""
    run = replace(run, bf16=bf16)
    keep_freed_memory(run.process.device)
    fuse_attention(model, True)
    dataset = ImageDataset([{}] * STEPS * run.samples_per_step, ".", None)
    state = build_state(run, model, dataset, None)
    state.progress.step = FIRST_STEP - 2

    def step(number: int) -> None:
        train_step(run, state, [batch], [1], lambda: [1.0])
        assert state.progress.step == number

    return step


def fuse_attention(model: Captioner, fused: bool) -> None:
    """Chooses one operation for the attention of the vision transformer, or several."""
    for block in model.visual_encoder.blocks:
        block.attn.fused_attn = fused


def build_run(args: argparse.Namespace, folder: str) -> tuple[Run, nn.Module, tuple]:
    """BLIP base with random weights, and a batch of noise with one caption."""
    torch.manual_seed(0)
    Path(folder, "vocab.txt").write_text("\n".join(vocabulary()))
    flags = ["--warmup_steps", "50", "--output_dir", folder, "--batch_size", str(args.batch_size)]
    flags = train_caption.parse_args([*flags, "--device", args.device])
    experiment = read_experiment(flags, "caption")
    sizes = {"vit": args.vit, "image_size": args.image_size, "tokenizer": folder}
    run = start(replace(experiment, config=experiment.config | sizes))
    model = build_captioner(run.config).to(run.process.device).train()
    image = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    return run, model, (image.to(run.process.device), [TEXT] * args.batch_size)


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each loop, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=2, help="samples a step; default: 2")
    parser.add_argument("--image_size", type=int, default=384, help="pixels; default: 384")
    parser.add_argument("--vit", default="base", help="vision transformer; default: base")
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument("--steps", type=int, default=2, help="timed beside an event; default: 2")
    args = parser.parse_args(argv)
    loops = {
        "straightforward": straightforward,
        "ours, float32": partial(ours, bf16=False),
        "ours, bf16": partial(ours, bf16=True),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run, model, batch = build_run(args, folder)
        device = run.process.device
        print(f"{'seconds a step':16}{'ordinary':>10}{'event':>10}{'cubic':>10}{'run':>10}")
        for name, loop in loops.items():
            found = results[name] = measure(loop(run, model, batch), device, args.steps)
            *times, memory = found.values()
            numbers = "".join(f"{value:10.3f}" for value in times)
            ratio = results["straightforward"]["run"] / found["run"]
            print(f"{name:16}{numbers} {memory / 1e9:7.2f} GB {ratio:6.2f} x", flush=True)
            model.zero_grad()
    print_document("train", device, batch_size=args.batch_size, loops=results)


if __name__ == "__main__":
    main()
