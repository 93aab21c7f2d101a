"""Times the pruner on tensors of BLIP-base captioning's sizes, 198 million parameters.

    python -m benchmarks.pruner

Compares PLATON's score update and mask event with the straightforward method (new tensors, one
concatenation of all scores, `kthvalue`, `masked_fill`) and with a copy of as many bytes. A mask
event reads the scores' two averages twice to find the threshold, then once more, and reads and
writes the parameters; between folds the scores stand still, and the threshold is known. Needs 10 GB
of memory and Linux; takes a minute on two cores.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import peak_memory, print_document, reset_peak, seconds
from pruners.mask import mask_, mask_checksums
from pruners.pruner import Pruner
from pruners.threshold import kth_smallest

SHAPES = Path(__file__).parents[1] / "tests/golden/blip_caption_base.json"
REMAINING = 0.3
# how often a work reads or writes all parameters; a copy does it twice
PASSES = {"average": 4, "fold": 8, "find": 4, "mask": 4, "event": 8, "checksum": 1, "report": 1}


def build_pruner() -> Pruner:
    """PLATON on BLIP base's layers, with averages that two short windows have filled."""
    model = nn.Module()
    for key, shape in json.loads(SHAPES.read_text()).items():
        name = key.removesuffix(".weight")
        if re.search(r"\.(blocks|layer)\.\d.*\.weight$", key) and len(shape) == 2:
            model.add_module(name.replace(".", "_"), nn.Linear(shape[1], shape[0]))
    run = dict(total_steps=100, initial_warmup=0, final_warmup=1, warmup_steps=1)
    layers = [name for name, _ in model.named_children()]
    pruner = Pruner(model, layers, final_threshold=REMAINING, **run)
    for step in (1, 10, 11, 20):
        for p in pruner.parameters.values():
            p.grad = torch.randn_like(p) * (torch.rand(p.shape[-1]) + 0.5) * 1e-3
        pruner.score.update_(step)
    return pruner


class Straightforward:
    """PLATON as its formulas read: a new tensor for every intermediate result."""

    def __init__(self, pruner: Pruner):
        self.parameters = pruner.parameters
        for kind, averages in pruner.score.state.items():
            setattr(self, kind, dict(averages))

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


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each kind of work, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default: 7")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pruner = build_pruner()
    plain, score, rank = Straightforward(pruner), pruner.score, int(pruner.numel * (1 - REMAINING))
    threshold, tied = kth_smallest(score, rank)
    same = plain.mask(rank) == threshold
    source, target = torch.ones(2, pruner.numel)
    ours = {
        "copy": lambda: target.copy_(source),
        "find": lambda: kth_smallest(score, rank),
        "mask": lambda: mask_(score, threshold),
        "event": lambda: mask_(score, kth_smallest(score, rank)[0]),
        "checksum": lambda: mask_checksums(pruner.parameters.values()),
        "report": pruner.report,
        "average": lambda: score.update_(5),
        "fold": lambda: score.update_(10),
    }
    times = seconds(ours, args.rounds)
    reset_peak("cpu")
    before = peak_memory("cpu", "VmRSS")
    ours["event"]()
    memory = peak_memory("cpu") - before
    straight = seconds({"event": lambda: plain.mask(rank)}, 2)
    straight |= seconds({"average": lambda: plain.update(5), "fold": lambda: plain.update(0)}, 2)
    print(f"{len(pruner.parameters)} tensors, {pruner.numel:,} parameters")
    print(f"{'':10} {'ours':>8} {'straightforward':>18} {'copies':>8}")
    for name, passes in PASSES.items():
        other = straight.get(name)
        compared = f"{other:8.3f} s {other / times[name]:5.1f} x" if other else " " * 18
        print(f"{name:10} {times[name]:6.3f} s {compared} {passes * times['copy'] / 2:6.3f} s")
    print(f"a mask event takes {memory / 1e6:.1f} MB; its threshold is kthvalue's: {same}")
    found = dict(threshold=threshold, tied=tied, same_threshold=same, event_bytes=memory)
    print_document("pruner", seconds=times, straightforward=straight, **found)


if __name__ == "__main__":
    main()
