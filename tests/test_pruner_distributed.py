"""Processes that prune different weights stop; what they compare sees any difference."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruners import Pruner
from tests.runs import on_two_processes

STEPS = 12


def work(rank: int, folder: Path):
    """A process: trains undisturbed, then with differences planted on either process."""
    outcomes = [train(rank, planted_rank) for planted_rank in (None, 0, 1)]
    torch.save(outcomes, folder / f"{rank}.pt")


def train(rank: int, planted_rank: int | None) -> tuple[str, torch.Tensor]:
    """Trains a tiny model on the process's own data; at step 5 the planted rank changes a score.

    Returns how it ended, and where the zeros are.
    """
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)))
    run = dict(total_steps=STEPS, initial_warmup=1, final_warmup=1, warmup_steps=2, delta_t=2)
    pruner = Pruner(model, ["0", "2"], final_threshold=0.3, **run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    try:
        for step in range(1, STEPS + 1):
            loss = (model(torch.randn(8, 6, generator=data)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 5 and rank == planted_rank:
                pruner.score.state["avg"]["2.weight"].view(-1)[7] = 1e9
            pruner.step(step)
        ending = "finished"
    except RuntimeError as error:
        ending = f"step {step}: {error}"
    return ending, torch.cat([(p == 0).view(-1) for p in pruner.parameters.values()])


def test_processes_prune_the_same_weights_or_stop(tmp_path):
    on_two_processes(work, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    (first_ending, first_zeros), (second_ending, second_zeros) = first[0], second[0]
    assert first_ending == second_ending == "finished"
    assert torch.equal(first_zeros, second_zeros)
    assert int(first_zeros.sum()) == int(len(first_zeros) * 0.7) - 1
    for ending, zeros in first[1:] + second[1:]:
        assert ending.startswith("step 6: the processes have pruned different weights")
        assert zeros.any()
