import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def platon_by_definition(sensitivities: list, delta_t: int, beta1: float, beta2: float) -> tuple:
    """ipt, avg, unc after steps 1, 2, ..., of one parameter, as the method is written down."""
    ipt = avg = unc = 0.0
    for step, sensitivity in enumerate(sensitivities, start=1):
        position = step % delta_t
        if position:
            ipt = (ipt * position + sensitivity) / (position + 1)
        else:
            avg = beta1 * avg + (1 - beta1) * ipt
            unc = beta2 * unc + (1 - beta2) * abs(ipt - avg)
            ipt = sensitivity
    return ipt, avg, unc


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30),
    st.integers(1, 9),
    st.floats(0.01, 0.99),
    st.floats(0, 0.99),
)
def test_platon_averages_follow_the_definition(sensitivities, delta_t, beta1, beta2):
    named = parameters((2, 3))
    (weight,) = named.values()
    platon = Platon(named, None, delta_t, beta1, beta2)
    for step, sensitivity in enumerate(sensitivities, start=1):
        weight.data.fill_(-0.5)
        weight.grad.fill_(2 * sensitivity)
        assert platon.update_(step) == (step % delta_t == 0)
    expected = platon_by_definition(sensitivities, delta_t, beta1, beta2)
    # 30 steps of at most 10 roundings in both forms, each of a value up to 100
    bound = 30 * 10 * 100 * 2.0**-24
    for kind, value in zip(("ipt", "avg", "unc"), expected, strict=True):
        state = platon.state[kind]["layer0.weight"]
        torch.testing.assert_close(state, torch.full((2, 3), value), rtol=0, atol=bound)


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
