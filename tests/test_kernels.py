import math

import pytest
import torch

from pruners import kernels

SIZES = [1, 31, 32, 33, 1000, 7]  # around a group
CHANGING = {
    "average": (kernels.average, 3, [0.25]),
    "fold": (kernels.fold, 5, [0.15, 0.05]),
    "mask": (kernels.mask, 3, [2.0, 0.5]),
}


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CHANGING)
def test_loops_do_what_operations_do(name, threads):
    kernel, count, numbers = CHANGING[name]
    tensors = [(torch.randn(n), *torch.rand(count - 1, n)) for n in SIZES]
    by_loop = [[x.clone() for x in piece] for piece in tensors]
    by_operations = [[x.clone() for x in piece] for piece in tensors]
    kernel([(*piece, *numbers) for piece in by_loop])
    for piece in by_operations:
        kernel.operations(*piece, *numbers)
    changed = 0
    for piece, expected, before in zip(by_loop, by_operations, tensors, strict=True):
        for found, other, old in zip(piece, expected, before, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-7)
            changed += not torch.equal(found, old)
    assert changed >= len(SIZES) - 1  # a single number may stay unmasked


def test_finds_what_lies_between(threads, kernel_form):
    values = [0.0, 1.0, 2.0, 2.5, 3.0, 4.0, math.inf, math.nan]
    a = [torch.tensor(values)[torch.randint(len(values), (n,))] for n in SIZES]
    pieces = [(x, torch.full_like(x, -0.5), 2.0, 2.0, 3.0) for x in a]  # so that scores are x
    for x, (below, found) in zip(a, kernels.between(pieces), strict=True):
        assert below == (x <= 2).sum()
        expected = x[(x == 2.5) | x.isnan()]
        torch.testing.assert_close(torch.as_tensor(found), expected, equal_nan=True, rtol=0, atol=0)


def test_masks_strictly_below_the_threshold(kernel_form):
    p = torch.tensor([1.0, -2.0, 3.0, 4.0])
    kernels.mask([(p, torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.ones(4), 2.0, 4.0)])
    assert p.tolist() == [0.0, -2.0, 3.0, 0.0]


def test_raises_what_a_thread_raised():
    with pytest.raises(TypeError):
        kernels.average([(torch.rand(3), torch.rand(3), torch.rand(3))])  # no weight


def test_other_types_take_operations():
    ipt = torch.zeros(2)
    p, grad = torch.tensor([[1.0, -3.0], [1 / 3, 1.0]], dtype=torch.bfloat16)
    kernels.average([(p, grad, ipt, 1.0)])
    assert torch.equal(ipt, (p.float() * grad.float()).abs())
