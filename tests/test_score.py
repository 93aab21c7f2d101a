import pytest
import torch
from torch import nn

from pruners import score
from pruners.score import METHODS, Platon

PIECE = 1000
# Longer than a piece, odd sizes, a whole piece, and small ones.
SHAPES = [(3,), (PIECE + 1,), (5, 7), (2, PIECE // 2), (1,)]


def parameters(*shapes) -> dict[str, nn.Parameter]:
    """Random parameters with gradients: layer0.weight, layer1.weight, ..."""
    named = {f"layer{i}.weight": nn.Parameter(torch.randn(s)) for i, s in enumerate(shapes)}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    return named


def test_a_window_of_platon_by_hand():
    """The goldens of test_pruner hold the equations over many windows, with the default betas."""
    named = parameters((1,))
    (weight,) = named.values()
    platon, changed = Platon(named, None, 2, 0.5, 0.25), []
    for step, sensitivity in ((1, 4.0), (2, 3.0)):
        weight.data.fill_(-0.5)
        weight.grad.fill_(2 * sensitivity)
        changed.append(platon.update_(step))
    assert changed == [False, True]
    found = {kind: averages["layer0.weight"].item() for kind, averages in platon.state.items()}
    assert found == {"ipt": 3.0, "avg": 0.5 * 2.0, "unc": 0.75 * 1.0}  # of the window's mean 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ids", [None, {f"layer{i}": i + 1.5 for i in range(len(SHAPES))}])
def test_scores_are_abs_a_b_times_id_in_pieces(method, ids, monkeypatch):
    monkeypatch.setattr(score, "PIECE_ON_CPU", PIECE)
    named = parameters(*SHAPES)
    scores = METHODS[method](named, ids, delta_t=1)
    scores.update_(1)
    scores.update_(2)
    for i, (name, p) in enumerate(named.items()):
        averages = [scores.state[kind][name] for kind in ("avg", "unc")] if scores.state else []
        a, b = {"PLATON": averages, "Taylor": (p, p.grad), "Magnitude": (p, torch.ones(()))}[method]
        expected = (a * b).abs() * (1 if ids is None else i + 1.5)
        assert (expected > 0).any()
        found = list(scores.scores(name))
        assert max(len(s) for _, s in found) <= PIECE
        assert torch.equal(torch.cat([s for _, s in found]), expected.view(-1))
        assert torch.equal(torch.cat([piece for piece, _ in found]), p.detach().view(-1))
    assert sum(len(s) for _, s in scores) == sum(p.numel() for p in named.values())


def test_parameters_of_lower_precision_have_float32_scores():
    named = {"layer0.weight": nn.Parameter(torch.tensor([1.0, -3.0], dtype=torch.bfloat16))}
    named["layer0.weight"].grad = torch.tensor([1 / 3, 1.0], dtype=torch.bfloat16)
    platon = Platon(named, None, 1, 0.5, 0.0)
    platon.update_(1)
    ipt = platon.state["ipt"]["layer0.weight"]
    assert ipt.dtype == torch.float32
    assert ipt.tolist() == [named["layer0.weight"].grad[0].item(), 3.0]
