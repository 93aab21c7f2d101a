"""Sparse layers against dense ones, and what `sparsify_` makes of models."""

import copy
import io
import multiprocessing
import os
import pickle
import threading
import weakref

import compat  # noqa: F401

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from models import build_captioner, build_clip, load_checkpoint, prunable_layers, sparsify_
from models.generation import linear as few_rows
from sparse import SparseLinear, kernels, linear, product
from tests.conftest import read_golden
from tests.test_costs import SMALL_CLIP

ROUNDING = 2.0**-24  # of a float32 operation, relative


@pytest.fixture
def every_layer_gains(monkeypatch):
    """Lets the small layers of test models become sparse, too."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "gains", lambda rows, columns, nonzeros: True)


def random_layer(rows: int, columns: int, density: float, bias: bool = True) -> nn.Linear:
    """Of outputs near one where inputs are."""
    layer = nn.Linear(columns, rows, bias=bias).eval()
    with torch.no_grad():
        layer.weight.normal_(0, (columns * density + 1) ** -0.5)
        layer.weight.mul_(torch.rand(rows, columns) < density)
    return layer


def sparse_net() -> nn.Sequential:
    """Two layers that gain."""
    return nn.Sequential(random_layer(512, 256, 0.1), nn.ReLU(), random_layer(256, 512, 0.1)).eval()


def prune_(model: nn.Module, density: float) -> None:
    with torch.no_grad():
        for layer in prunable_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < density)


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


@settings(max_examples=40, deadline=None)
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
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert_equals_dense(
            random_layer(rows, columns, density, bias), torch.randn(tokens, columns)
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(300,), (10_000, 300), (2, 5, 7, 300), (2, 0, 300)])
def test_any_leading_shape(shape):
    assert_equals_dense(random_layer(33, 300, 0.2), torch.randn(shape))


def test_non_contiguous_input():
    layer = random_layer(20, 30, 0.3)
    for x in (torch.randn(30, 9).T, torch.randn(9, 60)[:, ::2], torch.randn(30).expand(70, 30)):
        assert not x.is_contiguous()
        assert_equals_dense(layer, x)


@pytest.mark.parametrize("tokens", [1, 70])
def test_empty_and_full_rows_and_columns(tokens):
    layer = random_layer(40, 520, 0.1)
    with torch.no_grad():
        layer.weight[:, 256:] = 0  # the second panel is empty
        layer.weight[[0, 7, 39]] = 0
        layer.weight[:, [0, 5, 255]] = 0
        layer.weight[3] = torch.randn(520)
        x = torch.randn(tokens, 520)
        assert_equals_dense(layer, x)
        assert torch.equal(SparseLinear(layer)(x)[:, 7], layer.bias[7].expand(tokens))


@pytest.mark.parametrize("tokens", [3, 12, 20, 70])
@torch.no_grad()
def test_infinite_and_nan_elements_change_only_what_they_are_multiplied_with(tokens):
    layer = random_layer(40, 300, 0.2)
    sparse, x = SparseLinear(layer), torch.randn(tokens, 300)
    before = sparse(x)
    x[1, 7], x[2, 9] = torch.inf, torch.nan
    after = sparse(x)
    touched = torch.zeros(tokens, 40, dtype=torch.bool)
    touched[1], touched[2] = layer.weight[:, 7] != 0, layer.weight[:, 9] != 0
    assert touched.any() and not touched.all()
    assert torch.equal(before.isfinite() & ~touched, after.isfinite())
    assert torch.equal(before[~touched], after[~touched])


def test_nan_weights_are_kept():
    layer = random_layer(4, 5, 0.0)
    with torch.no_grad():
        layer.weight[2, 3] = torch.nan
    assert SparseLinear(layer)(torch.ones(1, 5)).isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        (576, 1, [(64, 768)] * 9),
        (576, 2, [(64, 768)] * 8 + [(64, 384)] * 2),  # the last of nine tiles is shared
        (576, 16, [(64, 160)] * 36 + [(64, 128)] * 9),  # 45 tasks, three to a thread
        (2304, 2, [(64, 768)] * 36),
        (3, 2, [(3, 384)] * 2),
        (577, 3, [(64, 768)] * 9 + [(1, 256)] * 3),
    ],
)
def test_tasks_keep_all_threads_busy(tokens, count, expected):
    parts = product.plan(tokens, 768, count)
    shapes = [(height, stop - first) for _, t, _ in parts for _, height, first, stop in t.tolist()]
    assert shapes == expected
    covered = torch.zeros(tokens, 768, dtype=torch.int8)
    for tile, tasks, team in parts:
        for token, height, first, stop in tasks.tolist():
            covered[token : token + height, first:stop] += 1
            assert 0 < height <= tile
        assert team == min(count, len(tasks))
    assert (covered == 1).all()


@pytest.mark.parametrize("with_openmp", [True, False])
def test_several_threads_of_python_at_once(monkeypatch, with_openmp):
    if not with_openmp:
        monkeypatch.setattr(product, "_openmp_team", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layers = [SparseLinear(random_layer(200, 300, 0.2)) for _ in range(4)]
    x = torch.randn(300, 300)
    expected, found = [layer(x) for layer in layers], [None] * 4

    def work(i: int) -> None:
        found[i] = [layer(x) for layer in layers * 3]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, expected * 3, strict=True))


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
    kept = []

    def cfunc(signature, cache=False):
        kept.append(cache)
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: function.__name__

    monkeypatch.setattr(kernels, "cfunc", cfunc)
    assert kernels.compile_kernel(4) == "kernel"
    assert kept == [True, False]


def test_keeps_only_nonzeros():
    layer = random_layer(100, 600, 0.1)
    sparse, nonzeros = SparseLinear(layer), int(layer.weight.count_nonzero())
    assert sparse.values.numel() == nonzeros
    stored = sum(buffer.nbytes for buffer in sparse.buffers())
    assert stored == 5 * nonzeros + 3 * 101 * 4
    assert list(sparse.parameters()) == [layer.bias]
    assert f"nonzeros={nonzeros}" in repr(sparse)


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


def test_torch_refuses_a_gradient():
    sparse = SparseLinear(random_layer(5, 7, 0.5))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sparse(torch.randn(2, 7, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to("meta"), lambda m: m])
def test_refuses_other_types_and_devices(change):
    sparse = change(SparseLinear(random_layer(5, 7, 0.5)))
    x = torch.ones(2, 7, dtype=torch.float64 if sparse.values.dtype == torch.float32 else None)
    with pytest.raises(RuntimeError, match="float32 on the CPU"):
        sparse(x)
    with pytest.raises(RuntimeError, match="no tokens of 7 features"):
        SparseLinear(random_layer(5, 7, 0.5))(torch.ones(2, 14))


class Reader(nn.Module):
    """Two layers are called, of the third the weight is read where `sparsify_` does not see it."""

    def __init__(self):
        super().__init__()
        self.net, self.layers = sparse_net(), nn.ModuleList([random_layer(256, 256, 0.1)])

    def forward(self, x):
        return F.linear(self.net(x), self.layers[0].weight)


def saved(model: nn.Module, save, load) -> nn.Module:
    file = io.BytesIO()
    save(model, file)
    file.seek(0)
    return load(file)


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: saved(torch.jit.trace(m, torch.ones(3, 256)), torch.jit.save, torch.jit.load),
        lambda m: torch.export.export(m, (torch.ones(4, 256),)).module(),
        lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    ],
    ids=["deepcopy", "pickle", "trace", "export", "compile"],
)
def test_what_torch_does_with_models_it_does_with_sparse_ones(way):
    model, x = Reader().eval(), torch.randn(4, 256)
    with torch.no_grad():
        dense = model(x)
        assert len(sparsify_(model).sparse) == 3
        assert_close(way(model)(x), dense)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_other_defaults_of_torch(default):
    model, x = sparse_net(), torch.randn(4, 256)
    state, dense = copy.deepcopy(model.state_dict()), model(x)
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        assert len(sparsify_(model).sparse) == 2
        found, weights = model(x), model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_close(found, dense.detach())
    for name, value in state.items():
        assert weights[name].dtype == value.dtype and torch.equal(weights[name], value)


def test_few_rows_of_generation_take_a_sparse_layer():
    layer, x = random_layer(20, 48, 0.3), torch.randn(2, 3, 48)
    with torch.no_grad():
        assert_close(few_rows(SparseLinear(layer), x), layer(x))


def golden_captioner(config, tmp_path):
    model = build_captioner(config).eval()
    save_file(read_golden("caption_tiny", "weights."), tmp_path / "caption.safetensors")
    load_checkpoint(model, tmp_path / "caption.safetensors")
    return model


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_captions_stay_the_same(caption_tiny_config, tmp_path, every_layer_gains, density):
    model = golden_captioner(caption_tiny_config, tmp_path)
    prune_(model, density)
    weights = [weakref.ref(layer.weight) for layer in prunable_layers(model).values()]
    images, ids = torch.randn(5, 3, 32, 32), torch.randint(110, 158, (5, 9))
    prompt = torch.tensor([[158, 1, 2, 3]]).expand(5, -1)

    @torch.no_grad()
    def outputs():
        embeds = model.encode_image(images)
        logits = model.text_decoder(ids, encoder_hidden_states=embeds).logits
        return logits, model.generate_ids(images, prompt), model.generate_ids(images, prompt, 1)

    dense = outputs()
    report = sparsify_(model)
    assert len(report.sparse) == 2 * 4 + 3 * 10 + 1  # all but the tied one
    assert all(weight() is None for weight in weights)  # freed
    assert (report.bytes_after < 0.6 * report.bytes_before) == (density < 1)
    assert_close(outputs()[0], dense[0])
    assert all(torch.equal(a, b) for a, b in zip(outputs()[1:], dense[1:], strict=True))


def test_clips_similarities_stay_the_same(every_layer_gains):
    """open_clip asks a layer's weight for its type; its attention uses the weight of `out_proj`."""
    torch.manual_seed(0)
    model = build_clip({"clip": SMALL_CLIP, "image_size": 32, "queue_size": 8}).eval()
    prune_(model, 0.2)
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 40, (3, 12))
    with torch.no_grad():
        dense = model.logits_from_ids(images, ids)
        report = sparsify_(model)
        assert len(report.sparse) == 2 * 4
        assert all(".attn." in name for name in report.layers if name not in report.sparse)
        assert_close(model.logits_from_ids(images, ids), dense)


def test_a_state_loads_into_a_sparse_model(caption_tiny_config, tmp_path, every_layer_gains):
    model = golden_captioner(caption_tiny_config, tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, 0.1)
    sparsify_(model)
    with pytest.raises(ValueError, match="load weights before `sparsify_`"):
        load_checkpoint(model, tmp_path / "caption.safetensors")
    with pytest.raises(ValueError, match="before `sparsify_`"):
        prunable_layers(model)
    model.load_state_dict(expected)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class Parted(nn.Module):
    """One layer of each kind that `sparsify_` tells apart."""

    def __init__(self):
        super().__init__()
        self.pruned, self.whole = random_layer(256, 256, 0.1), random_layer(256, 256, 1.0)
        self.again = self.pruned
        self.conv = conv1d(256, 256, 0.1, True)
        self.embedding, self.tied = nn.Embedding(256, 256), random_layer(256, 256, 0.1)
        self.tied.weight = self.embedding.weight
        self.small = random_layer(16, 16, 0.1)
        self.rounded = random_layer(256, 256, 0.1).bfloat16()
        self.far = random_layer(256, 256, 0.1).to("meta")
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


@pytest.mark.filterwarnings("ignore:.*(deprecated|beta)")
@torch.no_grad()
def test_report_says_what_became_of_each_layer():
    model, x = Parted().eval(), torch.randn(4, 256)
    dense = model(x)
    nonzeros = int(model.pruned.weight.count_nonzero())
    report = sparsify_(model)
    assert report.sparse == ["pruned", "conv", "asked"]
    assert report.layers["pruned"].nonzeros == nonzeros
    assert report.layers["pruned"].elements == report.layers["quantized.0"].elements == 256 * 256
    why = {name: layer.why_dense for name, layer in report.layers.items() if layer.why_dense}
    parts = {
        "whole": "too few zeros",
        "tied": "shared",
        "small": "too small",
        "rounded": "bfloat16",
        "far": "on meta",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
        "read": "Parted reads the weight itself",
        "replaced": "forward was replaced",
        "masked": "prune.remove",
        "normed": "ParametrizedLinear",
        "rows": "sparse_csr",
        "quantized.0": "DynamicQuantizedLinear",
    }
    assert why.keys() == parts.keys()
    assert all(parts[name] in reason for name, reason in why.items())
    lines = str(report).splitlines()
    assert lines[0].startswith("3 of 15 linear layers are sparse, ")
    assert len(lines) == 13
    assert_close(model(x), dense)
    assert model.again is model.pruned and isinstance(model.pruned, SparseLinear)
    assert not any(p.requires_grad for p in model.parameters())


def test_bytes_are_those_of_nonzeros():
    model = nn.Sequential(random_layer(256, 256, 0.1))
    nonzeros = int(model[0].weight.count_nonzero())
    report = sparsify_(model)
    assert report.bytes_before - report.bytes_after == 4 * 256 * 256 - 5 * nonzeros - 257 * 4
    assert f"{nonzeros / 65536:.1%} of their weights" in str(report)


def test_hooks_and_mode_stay():
    model, x, seen = sparse_net().train(), torch.randn(4, 256), []
    model[0].register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    handle = model[2].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.no_grad():
        dense = model(x)
        sparsify_(model)
        assert_close(model(x), dense)
        handle.remove()
        model(x)
    assert len(seen) == 2
    assert model[0].training


def test_beit_reads_weights_itself():
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 4}
    model = timm.create_model("beit_base_patch16_224", num_classes=5, **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.2).mul_(torch.rand_like(module.weight) < 0.1)
        dense = model(x)
        report = sparsify_(model)
        assert "Attention reads the weight" in report.layers["blocks.0.attn.qkv"].why_dense
        assert {"blocks.0.attn.proj", "blocks.0.mlp.fc1"} <= set(report.sparse)
        assert_close(model(x), dense)


def test_a_dense_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    report = sparsify_(model)
    assert report.sparse == [] and report.bytes_after == report.bytes_before
    assert str(report) == "0 of 2 linear layers are sparse\n2 dense: too few zeros to gain"
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_compiler_the_model_stays_dense(monkeypatch):
    def fail(tile):
        raise ImportError("No module named 'numba'\nand more")

    monkeypatch.setattr(linear, "compiled", fail)
    report = sparsify_(sparse_net())
    why = "Numba compiles no kernel here (ImportError: No module named 'numba')"
    assert str(report) == f"0 of 2 linear layers are sparse\n2 dense: {why}"


def test_under_autocast_the_model_stays_dense():
    with torch.autocast("cpu", torch.bfloat16):
        report = sparsify_(sparse_net())
    assert report.sparse == []
    assert "autocast" in str(report)


def test_a_second_call_reports_what_is_sparse_already():
    model = nn.Sequential(random_layer(256, 256, 0.1), random_layer(256, 256, 1.0))
    first = sparsify_(model)
    with torch.no_grad():
        model[1].weight[8:] = 0
    report = sparsify_(model)
    assert report.layers["0"].nonzeros == first.layers["0"].nonzeros
    assert str(report).startswith("2 of 2 linear layers are sparse (1 were before), ")


@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (2304, 768), (3072, 768), (768, 3072)])
def test_the_rule_has_one_crossover(rows, columns):
    elements = rows * columns
    verdicts = [linear.gains(rows, columns, elements * share // 100) for share in range(101)]
    assert verdicts == sorted(verdicts, reverse=True)
    assert 0.3 < sum(verdicts) / 100 < 0.5  # density below which a layer is sparse
