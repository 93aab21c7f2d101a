"""Processes that prune different weights stop; what they compare sees any difference."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruners import Pruner
from tests.runs import on_two_processes


def work(rank: int, folder: Path):
    """Trains undisturbed, then with differences planted on either process."""
    outcomes = [train(rank, planted_rank) for planted_rank in (None, 0, 1)]
    torch.save(outcomes, folder / f"{rank}.pt")


def train(rank: int, planted_rank: int | None) -> tuple[str, torch.Tensor]:
    """How a tiny model's training ends, and its zeros; at step 5 the planted rank's score jumps."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)))
    run = dict(total_steps=12, initial_warmup=1, final_warmup=1, warmup_steps=2, delta_t=2)
    pruner = Pruner(model, ["0", "2"], final_threshold=0.3, **run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    ending = "finished"
    try:
        for step in range(1, 13):
            loss = (model(torch.randn(8, 6, generator=data)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 5 and rank == planted_rank:
                pruner.score.state["avg"]["2.weight"].view(-1)[7] = 1e9
            pruner.step(step)
    except RuntimeError as error:
        ending = f"step {step}: {error}"
    return ending, torch.cat([(p == 0).view(-1) for p in pruner.parameters.values()])


def test_processes_prune_the_same_weights_or_stop(tmp_path):
    on_two_processes(work, tmp_path)
    whole, *planted = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    (first, zeros), (second, other_zeros) = whole
    assert first == second == "finished" and torch.equal(zeros, other_zeros)
    assert int(zeros.sum()) == int(len(zeros) * 0.7) - 1
    for ending, zeros in sum(planted, ()):
        assert ending.startswith("step 6: the processes have pruned different weights")
        assert zeros.any()
