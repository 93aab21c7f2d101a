"""Times the pruner on tensors of BLIP-base captioning's sizes, 198 million parameters.

    python -m benchmarks.pruner

Compares PLATON's score update and mask event with the straightforward method (new tensors, one
concatenation of all scores, `kthvalue`, `masked_fill`) and with the time that a copy of the same
number of bytes takes. A mask event reads the scores' two averages to find the threshold, then reads
them again and reads and writes the parameters; between folds the scores stand still, so that the
threshold is known and only the second is left. Needs 10 GB of memory and Linux; takes a minute on
two cores.
"""

import argparse
import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pruners.mask import mask_, mask_checksums
from pruners.pruner import Pruner
from pruners.threshold import kth_smallest

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "tests/golden/blip_caption_base.json"
PROFILE = ROOT / "configs/id/blip_coco.json"
REMAINING = 0.3


def build_layers() -> nn.Module:
    """The prunable linear layers of BLIP base with random weights and gradients."""
    model = nn.Module()
    for key, shape in json.loads(SHAPES.read_text()).items():
        name, kind = key.rsplit(".", 1)
        in_block = re.search(r"\.(blocks|layer)\.\d", name)
        if not (in_block and kind == "weight" and len(shape) == 2):
            continue
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(shape[1], shape[0]))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def build_pruner(model: nn.Module) -> Pruner:
    """PLATON, with averages that three short windows have filled."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    run = dict(total_steps=100, initial_warmup=0, final_warmup=1, warmup_steps=1)
    pruner = Pruner(model, layers, final_threshold=REMAINING, **run)
    for step in [1, 10, 11, 20, 21, 30]:
        for parameter in model.parameters():
            parameter.grad.mul_(torch.rand(parameter.shape[-1]) + 0.5)
        pruner.score.update_(step)
    return pruner


class Straightforward:
    """PLATON as its formulas read: a new tensor for every intermediate result."""

    def __init__(self, pruner: Pruner):
        self.parameters = pruner.parameters
        for kind, averages in pruner.score.state.items():
            setattr(self, kind, {name: average.clone() for name, average in averages.items()})

    @torch.no_grad()
    def update(self, position: int) -> None:
        """A step at a position of the window; 0 folds the window before."""
        for name, p in self.parameters.items():
            if position:
                self.ipt[name] = (self.ipt[name] * position + (p * p.grad).abs()) / (position + 1)
            else:
                self.avg[name] = 0.85 * self.avg[name] + 0.15 * self.ipt[name]
                deviation = (self.ipt[name] - self.avg[name]).abs()
                self.unc[name] = 0.95 * self.unc[name] + 0.05 * deviation
                self.ipt[name] = (p * p.grad).abs()

    @torch.no_grad()
    def mask(self, rank: int) -> float:
        """A mask event; returns the threshold."""
        scores = {name: self.avg[name] * self.unc[name] for name in self.parameters}
        flat = torch.cat([score.view(-1) for score in scores.values()])
        threshold = flat.kthvalue(rank).values.item()
        for name, parameter in self.parameters.items():
            parameter.masked_fill_(scores[name] < threshold, 0.0)
        return threshold


def median_times(runs: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each work over several rounds; the works take turns, after a warm-up."""
    times = {name: [] for name in works}
    for _ in range(runs + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_extra_memory(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grows at most during work (Linux)."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="timed rounds")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pruner = build_pruner(build_layers())
    plain = Straightforward(pruner)
    rank = int(pruner.numel * (1 - REMAINING))
    print(f"{len(pruner.parameters)} tensors, {pruner.numel:,} parameters, ", end="")
    print(f"{torch.get_num_threads()} threads")
    print(f"{'':32} {'ours':>9} {'straightforward':>18} {'copy bound':>11}")

    def line(what: str, ours: float, bound: float, straight: float | None = None) -> None:
        compared = f"{straight:8.3f} s {straight / ours:5.1f} x" if straight else " " * 18
        print(
            f"{what:32} {ours:7.3f} s {compared} {bound:7.3f} s {ours / bound:5.2f} x", flush=True
        )

    def copy() -> None:  # 8 bytes a parameter: the yardstick
        for name, target in plain.ipt.items():
            target.copy_(pruner.score.state["ipt"][name])

    def find() -> float:
        return kth_smallest(pruner.score, pruner.numel, rank)[0]

    def find_and_mask() -> None:
        mask_(pruner.score, find())

    t = median_times(
        args.runs,
        copy=copy,
        step=lambda: pruner.score.update_(5),
        plain_step=lambda: plain.update(5),
        fold=lambda: pruner.score.update_(10),
        plain_fold=lambda: plain.update(0),
    )
    line("score update, plain step", t["step"], 2 * t["copy"], t["plain_step"])
    line("score update, folding step", t["fold"], 4 * t["copy"], t["plain_fold"])
    both = (t["step"] + t["fold"]) / 2, 3 * t["copy"], (t["plain_step"] + t["plain_fold"]) / 2
    line("score update, mean of both", *both)

    plain.avg, plain.unc = pruner.score.state["avg"], pruner.score.state["unc"]  # the same scores
    threshold = find()
    t = median_times(
        args.runs,
        copy=copy,
        event=find_and_mask,
        find=find,
        mask=lambda: mask_(pruner.score, threshold),
        checksum=lambda: mask_checksums(pruner.parameters.values()),
        report=pruner.report,
    )
    straight = median_times(2, event=lambda: plain.mask(rank))["event"]
    line("mask event after a fold", t["event"], 3 * t["copy"], straight)
    line("  finding the threshold", t["find"], t["copy"])
    line("mask event between folds", t["mask"], 2 * t["copy"], straight)
    line("checksum of the masks", t["checksum"], t["copy"] / 2)
    line("sparsity report", t["report"], t["copy"] / 2)
    pruner.score.layer_id = json.loads(PROFILE.read_text())
    t = median_times(args.runs, copy=copy, event=find_and_mask)
    line("mask event with --useID", t["event"], 3 * t["copy"])
    same = "as" if plain.mask(rank) == threshold else "UNLIKE"
    print(f"threshold {threshold:.7e}, {same} kthvalue's")
    largest = 4e-6 * max(parameter.numel() for parameter in pruner.parameters.values())
    print(f"peak extra memory of a mask event: {1e-6 * peak_extra_memory(find_and_mask):.1f} MB,")
    print(f"the bracket included; two of the largest tensors: {2 * largest:.1f} MB")


if __name__ == "__main__":
    main()
