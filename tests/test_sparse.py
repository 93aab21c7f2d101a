"""Sparse layers against dense ones, and what `sparsify_` makes of models."""

import copy
import math
import multiprocessing
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import compat  # noqa: F401

import numba
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from models import build_captioner, load_checkpoint, prunable_layers, sparsify_
from sparse import SparseLinear, kernels, linear, product
from tests.test_model_classes import CLASSES

ROUNDING = 2.0**-24  # of a float32 operation, relative


def random_layer(rows: int, columns: int, density: float, bias: bool = True) -> nn.Linear:
    """With outputs near one where inputs are."""
    layer = nn.Linear(columns, rows, bias=bias).eval()
    with torch.no_grad():
        layer.weight.normal_(0, (columns * density + 1) ** -0.5)
        layer.weight.mul_(torch.rand(rows, columns) < density)
    return layer


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def sparse_net() -> nn.Sequential:
    """Two layers that gain."""
    return nn.Sequential(random_layer(512, 256, 0.1), nn.ReLU(), random_layer(256, 512, 0.1)).eval()


def assert_close(found: torch.Tensor, dense: torch.Tensor) -> None:
    """Values near one of a few layers, whose sums of n products are taken in two orders.

    These differ by less than 2 n 2^-24 times the sum of the products' sizes, about n^0.5: by 4e-5
    for n = 50 nonzeros.
    """
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_equals_dense(layer: nn.Linear, x: torch.Tensor) -> None:
    """Against float64; every product and sum of a row rounds once, and its parts are joined."""
    found = SparseLinear(layer)(x)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    x, weight, bias = x.double(), layer.weight.double(), bias.double()
    bound = (x.abs() @ weight.abs().T + bias.abs()) * ROUNDING * (layer.in_features + 3)
    assert found.dtype == torch.float32
    assert found.shape == bound.shape
    assert ((found - (x @ weight.T + bias)).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 600),
    tokens=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7, 1.0]),
    bias=st.booleans(),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equals_dense(rows, columns, tokens, density, bias, count, seed):
    torch.manual_seed(seed)
    layer, x = random_layer(rows, columns, density, bias), torch.randn(tokens, columns)
    with mock.patch.object(torch, "get_num_threads", lambda: count):
        assert_equals_dense(layer, x)


@pytest.mark.parametrize(
    "x",
    [
        ramp(300),
        ramp(10_000, 300),
        ramp(2, 5, 7, 300),
        ramp(2, 0, 300),
        ramp(300, 9).T,
        ramp(9, 600)[:, ::2],
        ramp(300).expand(70, 300),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_any_shape_and_stride(x):
    assert_equals_dense(random_layer(33, 300, 0.2), x)


@pytest.mark.parametrize("tokens", [3, 12, 20, 70])  # for each size of tile
@torch.no_grad()
def test_infinite_and_nan_elements_change_only_what_they_are_multiplied_with(tokens):
    layer = random_layer(40, 300, 0.2)
    layer.weight[5, 7] = torch.nan
    sparse, x = SparseLinear(layer), torch.randn(tokens, 300)
    before = sparse(x)
    x[1, 8], x[2, 9] = torch.inf, torch.nan
    after = sparse(x)
    touched = torch.zeros(tokens, 40, dtype=torch.bool)
    touched[1], touched[2] = layer.weight[:, 8] != 0, layer.weight[:, 9] != 0
    assert touched.any() and not touched.all()
    touched[:, 5] = True
    assert torch.equal(after.isfinite(), ~touched) and before[:, 5].isnan().all()
    assert torch.equal(before[~touched], after[~touched])


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        (576, 2, [(64, 768)] * 8 + [(64, 384)] * 2),  # the last of nine tiles is shared
        (576, 16, [(64, 160)] * 36 + [(64, 128)] * 9),  # 45 tasks, three to a thread
        (577, 3, [(64, 768)] * 9 + [(1, 256)] * 3),
    ],
)
def test_tasks_keep_all_threads_busy(tokens, count, expected):
    parts = product.plan(tokens, 768, count)
    shapes = [(height, stop - first) for _, t, _ in parts for _, height, first, stop in t.tolist()]
    assert shapes == expected
    assert [team for *_, team in parts] == [count] * len(parts)


@pytest.mark.parametrize("with_openmp", [True, False])
def test_several_threads_of_python_at_once(monkeypatch, with_openmp):
    if not with_openmp:
        monkeypatch.setattr(product, "_openmp_team", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layers = [SparseLinear(random_layer(200, 300, 0.2)) for _ in range(4)] * 3
    x = torch.randn(300, 300)
    expected = [layer(x) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        everything = pool.map(lambda _: [layer(x) for layer in layers], range(4))
    for found in everything:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_forked_process_multiplies_alone(monkeypatch):
    """OpenMP's threads do not live on in it, and a dense product of two threads hangs there."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sparse, x = SparseLinear(random_layer(64, 300, 0.2)), torch.randn(64, 300)
    expected = sparse(x)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=lambda: os._exit(not torch.equal(sparse(x), expected)))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


def test_kernels_need_no_folder_to_keep_them_in(monkeypatch):
    def cfunc(signature, cache=False):
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: function.__name__

    monkeypatch.setattr(kernels, "cfunc", cfunc)
    assert kernels.compile_kernel(4) == "kernel"


def test_keeps_only_nonzeros():
    model = nn.Sequential(random_layer(256, 256, 0.1))
    nonzeros, weight = int(model[0].weight.count_nonzero()), weakref.ref(model[0].weight)
    report = sparsify_(model)
    assert weight() is None  # freed
    assert model[0].values.numel() == nonzeros
    assert list(model.parameters()) == [model[0].bias]
    assert report.bytes_before - report.bytes_after == 4 * 256 * 256 - 5 * nonzeros - 257 * 4
    assert f"nonzeros={nonzeros}" in repr(model)
    assert f"{nonzeros / 65536:.1%} of their weights" in str(report)


def conv1d(rows: int, columns: int, density: float, bias: bool) -> Conv1D:
    layer = Conv1D(rows, columns)
    with torch.no_grad():
        layer.weight.copy_(random_layer(columns, rows, density).weight)
        layer.bias.normal_()
    return layer.eval()


@pytest.mark.parametrize(
    ("make", "bias"), [(random_layer, True), (random_layer, False), (conv1d, True)]
)
def test_saves_and_loads_as_a_dense_layer(make, bias):
    layer, other = make(30, 300, 0.1, bias), make(30, 300, 0.4, bias)
    sparse = SparseLinear(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value)
        assert sparse.state_dict()[name].is_contiguous()
    assert sparse.state_dict().keys() == layer.state_dict().keys()
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse.weight, other.weight)
    x = torch.randn(5, 300)
    assert_close(sparse(x), other(x).detach())
    with pytest.raises(RuntimeError, match=r"weight has shape \((30, 301|301, 30)\)"):
        sparse.load_state_dict(make(30, 301, 0.1, bias).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        sparse.load_state_dict({"bias": torch.zeros(30)} if bias else {})
    with pytest.raises(RuntimeError, match="Unexpected key.*offsets"):
        sparse.load_state_dict({**layer.state_dict(), "offsets": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "x", "message"),
    [
        (lambda m: m.half(), torch.ones(2, 7).half(), "float32 on the CPU"),
        (lambda m: m.to("meta"), torch.ones(2, 7, device="meta"), "float32 on the CPU"),
        (lambda m: m, torch.ones(2, 7).double(), "float32 on the CPU"),
        (lambda m: m, torch.ones(2, 14), "no tokens of 7 features"),
        (lambda m: m, torch.ones(2, 7, requires_grad=True), "no autograd formula"),
    ],
)
def test_refuses_other_types_devices_shapes_and_gradients(change, x, message):
    sparse = change(SparseLinear(random_layer(5, 7, 0.5)))
    with pytest.raises(RuntimeError, match=message):
        sparse(x).sum().backward()


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.jit.trace(m, torch.ones(3, 256)),
        lambda m: torch.export.export(m, (torch.ones(4, 256),)).module(),
        lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    ],
    ids=["deepcopy", "pickle", "trace", "export", "compile"],
)
def test_what_torch_does_with_models_it_does_with_sparse_ones(way):
    model, x = sparse_net(), torch.randn(4, 256)
    with torch.no_grad():
        dense = model(x)
        assert len(sparsify_(model).sparse) == 2
        assert_close(way(model)(x), dense)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_other_defaults_of_torch(default):
    model, x = sparse_net(), torch.randn(4, 256)
    state, dense = copy.deepcopy(model.state_dict()), model(x)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            assert len(sparsify_(model).sparse) == 2
            found, weights = model(x), model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(found, dense.detach())
    torch.testing.assert_close(weights, state, atol=0, rtol=0)


@torch.no_grad()
def test_captions_stay_the_same(caption_tiny_config, monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "gains", lambda rows, columns, nonzeros: True)
    model = build_captioner(caption_tiny_config).eval()
    for layer in prunable_layers(model).values():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.1)
    images, prompt = torch.randn(5, 3, 32, 32), torch.tensor([[158, 1, 2, 3]]).expand(5, -1)
    dense = model.generate_ids(images, prompt)
    assert len(sparsify_(model).sparse) == 2 * 4 + 3 * 10 + 1  # all but the tied one
    assert torch.equal(model.generate_ids(images, prompt), dense)


def test_weights_are_loaded_and_pruned_before():
    model = sparse_net()
    sparsify_(model)
    with pytest.raises(ValueError, match="load weights before `sparsify_`"):
        load_checkpoint(model, "weights.pth")
    with pytest.raises(ValueError, match="before `sparsify_`"):
        prunable_layers(model)


class Parted(nn.Module):
    """One layer of each kind that `sparsify_` tells apart."""

    def __init__(self):
        super().__init__()
        self.pruned, self.whole = random_layer(256, 256, 0.1), random_layer(256, 256, 1.0)
        self.again, self.conv = self.pruned, conv1d(256, 256, 0.1, True)
        self.embedding, self.tied = nn.Embedding(256, 256), random_layer(256, 256, 0.1)
        self.tied.weight = self.embedding.weight
        self.small = random_layer(16, 16, 0.1)
        self.rounded = random_layer(256, 256, 0.1).bfloat16()
        self.attention = nn.MultiheadAttention(256, 2)
        self.read, self.asked = random_layer(256, 256, 0.1), random_layer(256, 256, 0.1)
        self.replaced = random_layer(256, 256, 0.1)
        self.replaced.forward = lambda x: x @ self.replaced.weight.T
        self.masked = prune.l1_unstructured(random_layer(256, 256, 1.0), "weight", 0.9)
        self.normed = parametrizations.weight_norm(random_layer(256, 256, 0.1))
        self.rows = random_layer(256, 256, 0.1)
        self.rows.weight = nn.Parameter(self.rows.weight.detach().to_sparse_csr(), False)
        quantized = nn.Sequential(random_layer(256, 256, 0.1))
        self.quantized = torch.ao.quantization.quantize_dynamic(quantized, {nn.Linear})

    def forward(self, x):
        y = self.quantized(x)
        for layer in (self.pruned, self.again, self.conv, self.whole, self.rows, self.masked):
            x = layer(x)
        x = F.linear(x, self.read.weight) + self.asked(x.to(self.asked.weight.dtype))
        return y + self.replaced(x) + self.normed(x) + self.attention(x, x, x)[0]


WHY_DENSE = {
    "whole": "too few zeros",
    "tied": "shared",
    "small": "too small",
    "rounded": "bfloat16",
    "attention.out_proj": "NonDynamicallyQuantizableLinear",
    "read": "Parted reads the weight itself",
    "replaced": "forward was replaced",
    "masked": "prune.remove",
    "normed": "ParametrizedLinear",
    "rows": "sparse_csr",
    "quantized.0": "DynamicQuantizedLinear",
}


@pytest.mark.filterwarnings("ignore:.*(deprecated|beta)")
@torch.no_grad()
def test_report_says_what_became_of_each_layer():
    model, x = Parted().eval(), torch.randn(4, 256)
    dense = model(x)
    report = sparsify_(model)
    assert report.sparse == ["pruned", "conv", "asked"]
    assert report.layers["pruned"].elements == report.layers["quantized.0"].elements == 256 * 256
    assert set(report.layers) == {*report.sparse, *WHY_DENSE}
    assert all(part in report.layers[name].why_dense for name, part in WHY_DENSE.items())
    first, *reasons = str(report).splitlines()
    assert first.startswith("3 of 14 linear layers are sparse, ")
    assert len(reasons) == len(WHY_DENSE)
    assert_close(model(x), dense)
    assert model.again is model.pruned and isinstance(model.pruned, SparseLinear)
    assert not any(p.requires_grad for p in model.parameters())
    again = sparsify_(model)
    assert again.layers["pruned"].nonzeros == report.layers["pruned"].nonzeros
    assert str(again).startswith("3 of 14 linear layers are sparse (3 were before), ")


@torch.no_grad()
def test_hooks_and_mode_stay():
    model, x, seen = sparse_net().train(), torch.randn(4, 256), []
    model[0].register_forward_pre_hook(lambda layer, inputs: seen.append(layer.weight.mul_(2)))
    handle = model[2].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    dense = copy.deepcopy(model)(x)
    assert sparsify_(model).sparse == ["2"]
    assert_close(model(x), dense)
    handle.remove()
    model(x)
    assert len(seen) == 2 + 2 + 1 and model[2].training


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_classes_of_transformers_and_timm_give_what_they_gave(kind, monkeypatch):
    """Outputs of a size of about one.

    At most 20 layers follow one another, each of sums of at most 24 products: 2 * 24 * 20 * 2^-24
    is 6e-5 of the outputs, see `assert_close`.
    """
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "gains", lambda rows, columns, nonzeros: True)
    make, inputs = CLASSES[kind]
    model, given = make().eval(), inputs()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
        if parameter.dim() == 2 and "embed" not in name:
            parameter.mul_(torch.rand_like(parameter) < 0.1)
    dense = list(filter(torch.is_tensor, tree_leaves(model(**given))))
    assert sparsify_(model).sparse
    sparse = filter(torch.is_tensor, tree_leaves(model(**given)))
    for found, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_dense_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    report = sparsify_(model)
    assert str(report) == "0 of 2 linear layers are sparse\n2 dense: too few zeros to gain"
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_compiler_or_under_autocast_the_model_stays_dense(monkeypatch):
    def fail(tile):
        raise ImportError("No module named 'numba'\nand more")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        patch.setattr(numba.config, "DISABLE_JIT", 1)
        product.compiled.__wrapped__(16)
    with torch.autocast("cpu", torch.bfloat16):
        report = sparsify_(sparse_net())
    assert report.sparse == [] and "autocast" in str(report)
    monkeypatch.setattr(linear, "compiled", fail)
    report = sparsify_(sparse_net())
    assert report.sparse == []
    assert str(report).endswith(
        "Numba compiles no kernel here (ImportError: No module named 'numba')"
    )


@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (2304, 768), (3072, 768), (768, 3072)])
def test_the_rule_has_one_crossover(rows, columns):
    elements = rows * columns
    verdicts = [linear.gains(rows, columns, elements * share // 100) for share in range(101)]
    assert verdicts == sorted(verdicts, reverse=True)
    assert 0.3 < sum(verdicts) / 100 < 0.5  # density below which a layer is sparse
