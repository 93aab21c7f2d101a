import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruners import score as score_module
from pruners.score import Magnitude, Platon, Taylor


def parameters(*shapes) -> dict[str, nn.Parameter]:
    """Random parameters with gradients: layer0.weight, layer1.weight, ..."""
    named = {f"layer{i}.weight": nn.Parameter(torch.randn(s)) for i, s in enumerate(shapes)}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    return named


def platon_by_definition(sensitivities: list, delta_t: int, beta1: float, beta2: float) -> tuple:
    """ipt, avg, unc after steps 1, 2, ..., one number, as the method is written down."""
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
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_platon_averages_follow_the_definition(sensitivities, delta_t, beta1, beta2):
    named = parameters((2, 3))
    (weight,) = named.values()
    score = Platon(named, None, delta_t, beta1, beta2)
    for step, sensitivity in enumerate(sensitivities, start=1):
        weight.data.fill_(-0.5)
        weight.grad.fill_(2 * sensitivity)
        assert score.update_(step) == (step % delta_t == 0)
    expected = platon_by_definition(sensitivities, delta_t, beta1, beta2)
    for kind, value in zip(("ipt", "avg", "unc"), expected, strict=True):
        state = score.state[kind]["layer0.weight"]
        torch.testing.assert_close(state, torch.full((2, 3), value), rtol=1e-4, atol=1e-5)


BLOCK = 1000
# Larger than a block, odd sizes, a whole block, and small ones.
SHAPES = [(3,), (BLOCK + 1,), (5, 7), (2, BLOCK // 2), (1,)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(score_module, "BLOCK", {"cpu": BLOCK})


@pytest.mark.parametrize("kind", [Magnitude, Taylor, Platon])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("stride", "count"), [(1, 6), (101, 5)])
def test_blocks_stream_every_score_once(kind, weighted, stride, count, small_blocks):
    named = parameters(*SHAPES)
    ids = {f"layer{i}": i + 1.5 for i in range(len(SHAPES))} if weighted else None
    if kind is Platon:
        score = Platon(named, ids, 1, 0.85, 0.95)
        score.update_(1)
        score.update_(2)
        one_by_one = [score.state["avg"][name] * score.state["unc"][name] for name in named]
        assert all(bool((scores > 0).any()) for scores in one_by_one)
    else:
        score = kind(named, ids)
        factors = [p if kind is Magnitude else p * p.grad for p in named.values()]
        one_by_one = [factor.detach().abs() for factor in factors]
    if weighted:
        one_by_one = [s * dimension for s, dimension in zip(one_by_one, ids.values(), strict=True)]
    blocks = list(score.blocks(stride))
    assert len(blocks) == count
    assert max(map(len, blocks)) <= BLOCK
    expected = torch.cat([scores.view(-1)[::stride] for scores in one_by_one])
    assert torch.equal(torch.cat(blocks), expected)


def test_parameters_of_lower_precision_have_float32_scores():
    named = {"layer0.weight": nn.Parameter(torch.tensor([1.0, -3.0], dtype=torch.bfloat16))}
    named["layer0.weight"].grad = torch.tensor([1 / 3, 1.0], dtype=torch.bfloat16)
    score = Platon(named, None, 1, 0.0, 0.0)
    score.update_(1)
    assert score.state["ipt"]["layer0.weight"].dtype == torch.float32
    assert score.state["ipt"]["layer0.weight"].tolist() == pytest.approx([1 / 3, 3.0], rel=1e-2)
