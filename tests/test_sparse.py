"""Sparse layers against dense ones, and what `sparsify_` makes of models."""

import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from models import (
    build_captioner,
    build_clip,
    build_nlvr,
    load_checkpoint,
    prunable_layers,
    sparsify_,
)
from models.generation import linear as few_rows
from sparse import SparseLinear, kernels, linear, product
from tests.conftest import read_golden
from tests.test_costs import SMALL_CLIP

ROUNDING = 2.0**-24  # of a float32 operation, relative


@pytest.fixture
def threads():
    """Sets torch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def every_layer_gains(monkeypatch):
    """Lets the small layers of test models become sparse, too."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "gains", lambda rows, columns, nonzeros: True)


def random_layer(rows: int, columns: int, density: float, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns) * (torch.rand(rows, columns) < density))
    return layer


def prune_(model: nn.Module, density: float) -> None:
    with torch.no_grad():
        for layer in prunable_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < density)


@torch.no_grad()
def assert_equals_dense(layer: nn.Linear, x: torch.Tensor) -> None:
    """Against float64; every product and sum of a row rounds once, and its parts are joined."""
    found = SparseLinear(layer).eval()(x)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    x, weight, bias = x.double(), layer.weight.double(), bias.double()
    bound = (x.abs() @ weight.abs().T + bias.abs()) * ROUNDING * (layer.in_features + 3)
    assert found.dtype == torch.float32
    assert found.shape == bound.shape
    assert ((found - (x @ weight.T + bias)).abs() <= bound).all()


@settings(max_examples=80, deadline=None)
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


@pytest.mark.parametrize("shape", [(1, 300), (300,), (10_000, 300), (2, 5, 7, 300), (1, 1, 300)])
def test_any_leading_shape(shape):
    assert_equals_dense(random_layer(33, 300, 0.2), torch.randn(shape))


def test_no_tokens():
    assert SparseLinear(random_layer(5, 7, 0.5)).eval()(torch.randn(2, 0, 7)).shape == (2, 0, 5)


def test_non_contiguous_input():
    layer = random_layer(20, 30, 0.3)
    for x in (torch.randn(30, 9).T, torch.randn(9, 60)[:, ::2], torch.randn(9, 4, 30)[:, 1]):
        assert not x.is_contiguous()
        assert_equals_dense(layer, x)
    assert_equals_dense(layer, torch.randn(30).expand(70, 30))


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
        assert torch.equal(SparseLinear(layer).eval()(x)[:, 7], layer.bias[7].expand(tokens))


@pytest.mark.parametrize("bias", [True, False])
def test_zeros_only(bias):
    layer = random_layer(40, 300, 0.0, bias)
    expected = layer.bias if bias else torch.zeros(40)
    assert torch.equal(SparseLinear(layer).eval()(torch.randn(70, 300)), expected.expand(70, 40))


@pytest.mark.parametrize("tokens", [3, 12, 20, 70])
def test_infinite_and_nan_elements_change_only_what_they_are_multiplied_with(tokens):
    layer = random_layer(40, 300, 0.2)
    sparse, x = SparseLinear(layer).eval(), torch.randn(tokens, 300)
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
    assert SparseLinear(layer).eval()(torch.ones(1, 5)).isnan().tolist() == [
        [False, False, True, False]
    ]


@pytest.mark.parametrize("tokens", [1, 64, 577, 2308])
@pytest.mark.parametrize("rows", [1, 40, 768, 3072])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_tasks_cover_the_output_once(tokens, rows, count):
    covered = torch.zeros(tokens, rows, dtype=torch.int8)
    for tile, tasks, team in product.plan(tokens, rows, count):
        for token, height, first, stop in tasks.tolist():
            covered[token : token + height, first:stop] += 1
            assert 0 < height <= tile
        assert team == min(count, len(tasks))
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        (576, 1, [(64, 768)] * 9),
        (576, 2, [(64, 768)] * 8 + [(64, 384)] * 2),  # the last of nine tiles is shared
        (576, 3, [(64, 768)] * 9),
        (576, 16, [(64, 160)] * 36 + [(64, 128)] * 9),  # 45 tasks, three to a thread
        (2304, 2, [(64, 768)] * 36),
        (3, 2, [(3, 384)] * 2),
        (20, 4, [(20, 192)] * 4),
    ],
)
def test_tasks_keep_all_threads_busy(tokens, count, expected):
    [(_, tasks, _)] = product.plan(tokens, 768, count)
    assert [(height, stop - first) for _, height, first, stop in tasks.tolist()] == expected


@pytest.mark.parametrize("with_openmp", [True, False])
def test_several_threads_of_python_at_once(threads, monkeypatch, with_openmp):
    if not with_openmp:
        monkeypatch.setattr(product, "_openmp_team", lambda: None)
    threads(3)
    layers = [SparseLinear(random_layer(200, 300, 0.2)).eval() for _ in range(4)]
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


def test_kernels_need_no_folder_to_keep_them_in(monkeypatch):
    compiler, kept = kernels.cfunc, []

    def cfunc(signature, cache=False):
        kept.append(cache)
        if cache:
            raise RuntimeError("no locator available")
        return compiler(signature)

    monkeypatch.setattr(kernels, "cfunc", cfunc)
    address = kernels.compile_kernel(4)
    assert kept == [True, False]
    monkeypatch.setattr(product, "compiled", lambda tile: address)
    assert_equals_dense(random_layer(20, 30, 0.3), torch.randn(3, 30))


def test_keeps_only_nonzeros():
    layer = random_layer(100, 600, 0.1)
    sparse, nonzeros = SparseLinear(layer), int(layer.weight.count_nonzero())
    assert sparse.values.numel() == nonzeros
    stored = sum(buffer.nbytes for buffer in sparse.buffers())
    assert stored == 5 * nonzeros + 3 * 101 * 4 + 100 * 4
    assert list(sparse.parameters()) == []
    assert torch.equal(sparse.dense_weight(), layer.weight)
    assert f"nonzeros={nonzeros}" in repr(sparse)


@pytest.mark.parametrize("bias", [True, False])
def test_saves_and_loads_as_a_dense_layer(bias):
    layer, other = random_layer(30, 300, 0.1, bias), random_layer(30, 300, 0.4, bias)
    sparse = SparseLinear(layer).eval()
    for name, value in layer.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value)
    assert sparse.state_dict().keys() == layer.state_dict().keys()
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse.dense_weight(), other.weight)
    x = torch.randn(5, 300)
    torch.testing.assert_close(sparse(x), other(x).detach())
    with pytest.raises(RuntimeError, match=r"weight has shape \(30, 301\)"):
        sparse.load_state_dict(random_layer(30, 301, 0.1, bias).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        sparse.load_state_dict({"bias": torch.zeros(30)} if bias else {})
    with pytest.raises(RuntimeError, match="Unexpected key.*offsets"):
        sparse.load_state_dict({**layer.state_dict(), "offsets": torch.zeros(3)})


def test_has_no_gradient():
    sparse, x = SparseLinear(random_layer(5, 7, 0.5)), torch.randn(2, 7)
    with pytest.raises(RuntimeError, match="no gradient"):
        sparse.train()(x)
    with pytest.raises(RuntimeError, match="no gradient"):
        sparse.eval()(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(sparse.train()(x), sparse.eval()(x))


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to("meta"), lambda m: m])
def test_refuses_other_types_and_devices(change):
    sparse = change(SparseLinear(random_layer(5, 7, 0.5)).eval())
    x = torch.ones(2, 7, dtype=torch.bfloat16 if sparse.values.is_floating_point() else None)
    with pytest.raises(RuntimeError, match="float32 on the CPU"):
        sparse(x)
    if sparse.values.dtype == torch.float32 and sparse.values.device.type == "cpu":
        sparse(x.float())
    else:
        with pytest.raises(RuntimeError, match="float32 on the CPU"):
            sparse(x.float())


def test_few_rows_of_generation_take_a_sparse_layer():
    layer, x = random_layer(20, 48, 0.3), torch.randn(2, 3, 48)
    with torch.no_grad():
        torch.testing.assert_close(few_rows(SparseLinear(layer).eval(), x), layer(x))


def golden_captioner(config, tmp_path):
    model = build_captioner(config).eval()
    save_file(read_golden("caption_tiny", "weights."), tmp_path / "caption.safetensors")
    load_checkpoint(model, tmp_path / "caption.safetensors")
    return model


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_captions_stay_the_same(caption_tiny_config, tmp_path, every_layer_gains, density):
    model = golden_captioner(caption_tiny_config, tmp_path)
    prune_(model, density)
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
    torch.testing.assert_close(outputs()[0], dense[0], atol=1e-4, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(outputs()[1:], dense[1:], strict=True))


def test_nlvr_logits_stay_the_same(nlvr_tiny_config, every_layer_gains):
    model = build_nlvr(nlvr_tiny_config).eval()
    prune_(model, 0.2)
    images, ids = torch.randn(2, 3, 3, 32, 32), torch.randint(110, 158, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        dense = model.logits_from_ids(*images, ids, mask)
        report = sparsify_(model)
        assert len(report.sparse) == len(report.layers) == 2 * 4 + 8 * 14 + 2 + 2
        torch.testing.assert_close(
            model.logits_from_ids(*images, ids, mask), dense, atol=1e-4, rtol=0
        )


def test_clips_similarities_stay_the_same(every_layer_gains):
    """open_clip asks a layer's weight for its type; its attention uses the weight of `out_proj`."""
    torch.manual_seed(0)
    model = build_clip(SMALL_CLIP).eval()
    prune_(model, 0.2)
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 40, (3, 12))
    with torch.no_grad():
        dense = model.logits_from_ids(images, ids)
        report = sparsify_(model)
        assert len(report.sparse) == 2 * 4
        assert all(".attn." in name for name in report.layers if name not in report.sparse)
        torch.testing.assert_close(model.logits_from_ids(images, ids), dense, atol=1e-4, rtol=0)


def test_a_state_loads_into_a_sparse_model(caption_tiny_config, tmp_path, every_layer_gains):
    model = golden_captioner(caption_tiny_config, tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, 0.1)
    sparsify_(model)
    with pytest.raises(ValueError, match="load weights before `sparsify_`"):
        load_checkpoint(model, tmp_path / "caption.safetensors")
    model.load_state_dict(expected)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_frees_dense_weights(caption_tiny_config, every_layer_gains):
    model = build_captioner(caption_tiny_config).eval()
    prune_(model, 0.1)
    weights = [weakref.ref(layer.weight) for layer in prunable_layers(model).values()]
    dense = sum(p.numel() for p in model.parameters())
    pruned = sum(p.numel() for layer in prunable_layers(model).values() for p in layer.parameters())
    report = sparsify_(model)
    assert all(weight() is None for weight in weights)
    assert sum(p.numel() for p in model.parameters()) <= dense - pruned
    assert report.bytes_after < 0.6 * report.bytes_before
    assert not any(p.requires_grad for p in model.parameters())


class Reader(nn.Module):
    """One layer of each kind that `sparsify_` tells apart."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        self.tied = nn.Linear(256, 256, bias=False)
        self.tied.weight = self.embedding.weight
        self.pruned, self.whole = random_layer(256, 256, 0.1), random_layer(256, 256, 1.0)
        self.small = random_layer(16, 16, 0.1)
        self.rounded = random_layer(256, 256, 0.1).bfloat16()
        self.far = random_layer(256, 256, 0.1).to("meta")
        self.attention = nn.MultiheadAttention(256, 2)


def test_report_says_what_became_of_each_layer():
    model = Reader()
    nonzeros = int(model.pruned.weight.count_nonzero())
    report = sparsify_(model)
    assert report.sparse == ["pruned"]
    assert report.layers["pruned"].nonzeros == nonzeros
    assert report.layers["pruned"].elements == 256 * 256
    why = {name: layer.why_dense for name, layer in report.layers.items()}
    assert "shared" in why["tied"]
    assert "too few zeros" in why["whole"]
    assert "too small" in why["small"]
    assert "bfloat16" in why["rounded"]
    assert "on meta" in why["far"]
    assert "NonDynamicallyQuantizableLinear" in why["attention.out_proj"]
    assert report.bytes_before - report.bytes_after == 4 * 256 * 256 - 5 * nonzeros - 257 * 4
    lines = str(report).splitlines()
    assert lines[0].startswith(f"1 of 7 linear layers are sparse, {nonzeros / 65536:.1%} of their")
    assert len(lines) == 7
    assert isinstance(model.pruned, SparseLinear) and isinstance(model.whole, nn.Linear)
    assert not model.pruned.training


def test_a_dense_model_stays_as_it_is(caption_tiny_config):
    model = build_captioner(caption_tiny_config)
    before = {name: type(module) for name, module in model.named_modules()}
    report = sparsify_(model)
    assert report.sparse == [] and report.bytes_after == report.bytes_before
    assert str(report).startswith("0 of 40 linear layers are sparse")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_compiler_the_model_stays_dense(monkeypatch):
    def fail(tile):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(linear, "compiled", fail)
    report = sparsify_(Reader())
    assert report.sparse == []
    assert "Numba compiles no kernel here (ImportError: No module named 'numba')" in str(report)


def test_under_autocast_the_model_stays_dense():
    with torch.autocast("cpu", torch.bfloat16):
        report = sparsify_(Reader())
    assert report.sparse == []
    assert "autocast" in str(report)


def test_a_second_call_changes_nothing():
    model = Reader()
    sparsify_(model)
    pruned = model.pruned
    assert "pruned" not in sparsify_(model).layers
    assert model.pruned is pruned


@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (2304, 768), (3072, 768), (768, 3072)])
def test_the_rule_has_one_crossover(rows, columns):
    elements = rows * columns
    verdicts = [linear.gains(rows, columns, elements * share // 100) for share in range(101)]
    assert verdicts == sorted(verdicts, reverse=True)
    assert 0.3 < sum(verdicts) / 100 < 0.5  # density below which a layer is sparse


def test_a_sparse_model_has_no_prunable_layers(caption_tiny_config, every_layer_gains):
    model = build_captioner(caption_tiny_config)
    sparsify_(model)
    with pytest.raises(ValueError, match="before `sparsify_`"):
        prunable_layers(model)
