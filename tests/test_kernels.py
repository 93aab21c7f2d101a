import math

import pytest
import torch
from torch import nn

from pruners import Pruner, kernels, mask, score, threshold

SIZES = [1, 31, 32, 33, 1000, 7]  # around kernels.VECTOR
EPS = 2.0**-24  # relative error of one rounding to float32

# Equation, loop, tensors, scalars, how many of the tensors change, and how many roundings lie
# between an element's old value and its new one in each form.
FORMS = {
    "average": (score.average_, kernels.average_loop, 3, [3], 1, 5),
    "fold": (score.fold_, kernels.fold_loop, 5, [0.85, 0.95], 3, 10),
    "zero below": (mask.zero_below_, kernels.zero_below_loop, 3, [2.0, 0.5], 1, 0),
}
EQUATIONS = [
    (score, "average_"),
    (score, "fold_"),
    (mask, "zero_below_"),
    (threshold, "between"),
]
LOOPS = ["average_loop", "fold_loop", "zero_below_loop", "between_loop"]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FORMS)
def test_loops_compute_the_equations(name, threads):
    equation, loop, count, scalars, changing, roundings = FORMS[name]
    before = [tuple(2 * torch.rand(count, n) - 1) for n in SIZES]
    by_loop = [[x.clone() for x in piece] for piece in before]
    by_equation = [[x.clone() for x in piece] for piece in before]
    kernels.on_pieces(equation, loop, [(*piece, *scalars) for piece in by_loop])
    for piece in by_equation:
        equation(*piece, *scalars)
    # No value on the way exceeds 2, so that each form is off by at most 2 * roundings * EPS.
    bound = 4 * roundings * EPS
    for piece, expected in zip(by_loop, by_equation, strict=True):
        for found, other in zip(piece, expected, strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=bound)
    longest = SIZES.index(1000)
    changes = [
        not torch.equal(x, y) for x, y in zip(by_loop[longest], before[longest], strict=True)
    ]
    assert changes == [i < changing for i in range(count)]


def test_finds_what_lies_between(threads, kernel_form):
    values = [0.0, 1.0, 2.0, 2.5, 3.0, 4.0, math.inf, math.nan]
    a = [torch.tensor(values)[torch.randint(len(values), (n,))] for n in SIZES]
    pieces = [(x, torch.full_like(x, -0.5), 2.0, 2.0, 3.0) for x in a]  # so that scores are x
    results = kernels.on_pieces(threshold.between, kernels.between_loop, pieces)
    for x, (below, found) in zip(a, results, strict=True):
        assert below == (x <= 2).sum()
        expected = x[(x == 2.5) | x.isnan()]
        torch.testing.assert_close(torch.as_tensor(found), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dimension", [1.0, 1 / 3])
def test_scores_equal_to_a_bound_are_outside_in_both_forms(dimension, kernel_form):
    """A threshold is a float32 that came through Python's double precision, as was the ID."""
    a, b = torch.rand(2, 1000)
    value = score.scores(a, b, dimension)[700].item()
    ((below, found),) = kernels.on_pieces(
        threshold.between, kernels.between_loop, [(a, b, dimension, value, math.inf)]
    )
    p = torch.ones(1000)
    piece = (p, a, b, dimension, value)
    kernels.on_pieces(mask.zero_below_, kernels.zero_below_loop, [piece])
    assert p[700] == 1 and int((p == 0).sum()) == below - 1 == 999 - len(found)


def test_masks_strictly_below_the_threshold(kernel_form):
    p = torch.tensor([1.0, -2.0, 3.0, 4.0])
    piece = (p, torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.ones(4), 2.0, 4.0)
    kernels.on_pieces(mask.zero_below_, kernels.zero_below_loop, [piece])
    assert p.tolist() == [0.0, -2.0, 3.0, 0.0]


def test_raises_what_a_thread_raised():
    with pytest.raises(TypeError):  # no position
        kernels.on_pieces(score.average_, kernels.average_loop, [tuple(torch.rand(3, 3))])


def run_pruner(model: nn.Module, method: str, monkeypatch) -> list[float]:
    """Six steps with a fold, masks, and thresholds found between the bounds of a sample."""
    monkeypatch.setattr(threshold, "SAMPLE", 1 << 13)
    run = dict(total_steps=6, initial_warmup=0, final_warmup=1, warmup_steps=2, delta_t=2)
    pruner = Pruner(model, ["0"], method, final_threshold=0.5, **run)
    thresholds = []
    for step in range(1, 7):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        thresholds.append(pruner.step(step)[1])
    return thresholds


def forbid(*arguments):
    raise AssertionError("this form is not for these tensors")


@pytest.mark.parametrize("method", score.METHODS)
def test_float32_on_a_cpu_takes_the_loops(method, monkeypatch):
    for module, name in EQUATIONS:
        monkeypatch.setattr(module, name, forbid)
    run_pruner(nn.Sequential(nn.Linear(300, 301)), method, monkeypatch)
    monkeypatch.setattr(kernels, "zero_below_loop", forbid)
    with pytest.raises(AssertionError, match="not for these tensors"):
        run_pruner(nn.Sequential(nn.Linear(300, 301)), method, monkeypatch)


@pytest.mark.parametrize("method", score.METHODS)
def test_other_types_take_the_equations(method, monkeypatch):
    model = nn.Sequential(nn.Linear(300, 301)).bfloat16()
    for name in LOOPS:
        if not (method == "PLATON" and name == "between_loop"):  # its averages are float32
            monkeypatch.setattr(kernels, name, forbid)
    assert run_pruner(model, method, monkeypatch)[-1] > 0
    assert 0.45 < (model[0].weight == 0).float().mean() < 0.55


def test_other_devices_take_the_equations_and_long_pieces():
    on_accelerator = torch.empty(2, kernels.PIECE_ON_ACCELERATOR, device="meta")
    on_cpu = torch.empty(2, kernels.PIECE_ON_CPU)
    for tensor in (on_accelerator, on_cpu):
        pieces = list(kernels.cut(tensor, tensor))
        assert [[len(t) for t in piece] for piece in pieces] == [[tensor.shape[1]] * 2] * 2
        assert kernels.all_float32_on_cpu(pieces) == (tensor is on_cpu)
    assert not kernels.all_float32_on_cpu([(on_cpu,), (on_cpu.double(),)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_parameters_are_positive_zeros(dtype):
    """A negative zero is no zero to a file that stores what is not all bits 0."""
    p = -torch.ones(100, dtype=dtype)
    pieces = [(p, torch.ones(100, dtype=dtype), torch.ones(100, dtype=dtype), 1.0, 2.0)]
    kernels.on_pieces(mask.zero_below_, kernels.zero_below_loop, pieces)
    assert (p == 0).all() and not p.signbit().any()
