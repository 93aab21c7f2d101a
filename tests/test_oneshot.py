import copy

import compat  # noqa: F401

import pytest
import torch
import transformers
from torch import nn

from models.captioner import build_captioner
from pruners.oneshot import allocate, lowest, prune_
from tests.test_model_classes import CLASSES, N
from utils import UserError

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2}


def qwen2_vl():
    vision = dict(depth=2, embed_dim=16, num_heads=2, hidden_size=16, patch_size=4, mlp_ratio=2)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = TEXT | {"num_key_value_heads": 2, "rope_parameters": rope}
    special = dict(image_token_id=2, vision_start_token_id=1, video_token_id=0)
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **special)
    ids = torch.cat([torch.tensor([[1, 2, 2, 2, 2]] * N), torch.randint(3, 39, (N, 7))], 1)
    patches = torch.randn(N * 16, 3 * 2 * 4 * 4).double()
    grid = torch.tensor([[1, 4, 4]] * N)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid}
    inputs["mm_token_type_ids"] = (ids == 2).int()
    return transformers.Qwen2VLForConditionalGeneration(config), inputs


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(3, 39, (N, 7))}


def in_float64(make, inputs):
    given = {n: x.double() if x.is_floating_point() else x for n, x in inputs().items()}
    return make().double().eval(), given


@pytest.fixture(params=["CLIP", "LLaVA", gpt2, qwen2_vl, "captioner"])
def model_and_inputs(request, caption_tiny_config):
    """In float64, so that no rounding puts two scores into another order."""
    if request.param == "captioner":
        images = torch.randn(N, 3, 32, 32).double()
        captions = ["a picture of word7 word9"] * N
        return build_captioner(caption_tiny_config).double().eval(), (images, captions)
    if request.param in CLASSES:
        return in_float64(*CLASSES[request.param])
    model, inputs = request.param()
    return model.double().eval(), inputs


def weight_of(layer) -> torch.Tensor:
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def wanda_by_definition(model, inputs, names, sparsity) -> dict:
    """Where the zeros are, by layer, of norms of all inputs in memory."""
    layers, seen = {n: model.get_submodule(n) for n in names}, {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, n=name: seen.setdefault(n, []).append(x[0]))
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    zeros = {}
    for name, layer in layers.items():
        x, weight = torch.cat([call.flatten(0, -2) for call in seen[name]]), weight_of(layer)
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        if mask is not None and seen[name][0].shape[:2] == mask.shape:  # of padded texts
            x = x[mask.flatten().bool()]
        metric = weight.abs() * x.norm(p=2, dim=0)
        removed = metric.sort(dim=1, stable=True).indices[:, : int(metric.shape[1] * sparsity)]
        zeros[name] = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, removed, True)
    return zeros


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_is_its_definition(model_and_inputs, sparsity):
    model, inputs = model_and_inputs
    names = prune_(model, [], 1e-9, "Magnitude")["layers"]
    expected = wanda_by_definition(model, inputs, names, sparsity)
    found = prune_(model, [inputs], sparsity)
    assert len(expected) >= 8 and found["layers"].keys() == expected.keys()
    for name, zeros in expected.items():
        assert torch.equal(weight_of(model.get_submodule(name)) == 0, zeros), name
        assert found["layers"][name] == int(zeros.sum())
    assert not any(n.endswith("lm_head") for n in expected)


def test_batches_add_up_and_modes_stay():
    model, inputs = in_float64(*CLASSES["CLIP"])
    other = copy.deepcopy(model).train()
    parts = ({name: x[i : i + 2] for name, x in inputs.items()} for i in range(0, N, 2))
    assert prune_(model, [inputs], 0.5) == prune_(other, parts, 0.5)
    states = model.state_dict().values(), other.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert other.training and not any(m._forward_pre_hooks for m in other.modules())


class Attended(nn.Module):
    """Torch's own attention, whose `out_proj` is never called."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


def test_out_proj_is_scored_by_the_context():
    model, x = Attended().double(), torch.randn(3, 5, 8).double()
    weight = model.attn.out_proj.weight.detach().clone()
    q, k, v = (x @ model.attn.in_proj_weight.T + model.attn.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    context = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    metric = weight.abs() * context.flatten(0, 1).norm(dim=0)
    assert list(prune_(model, [x], 0.5)["layers"]) == ["attn.out_proj", "fc"]
    expected = metric >= metric.sort(dim=1).values[:, 4:5]
    assert torch.equal(model.attn.out_proj.weight != 0, expected)


def test_errors_of_held_out_outputs_are_their_definition():
    model, held_out = Attended().double(), torch.randn(2, 5, 8).double()
    dense, seen, errors = copy.deepcopy(model), {}, {}
    dense.fc.register_forward_hook(lambda _, x, y: seen.update(fc=(x[0], y)))
    report = prune_(model, [torch.randn(3, 5, 8).double()], 0.6, held_out=held_out.split(1))
    y = dense.attn(held_out, held_out, held_out)[0]
    dense(held_out)
    errors["attn.out_proj"] = (model.attn(held_out, held_out, held_out)[0] - y).norm() / y.norm()
    x, y = seen["fc"]
    errors["fc"] = (model.fc(x) - y).norm() / y.norm()
    assert report["errors"] == pytest.approx({n: e.item() for n, e in errors.items()}, rel=1e-9)
    assert prune_(dense, None, 0.6, "Magnitude")["errors"] == {}


def test_sequential_sees_what_the_pruned_layers_before_give():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).double()
    x, dense = torch.randn(20, 16).double(), model[2].weight.detach().clone()
    prune_(model, [x], 0.75, sequential=True)
    hidden = model[1](model[0](x)).detach()  # of the pruned first layer
    metric = dense.abs() * hidden.norm(dim=0)
    assert torch.equal(model[2].weight != 0, metric >= metric.sort(dim=1).values[:, 12:13])


@pytest.mark.parametrize("method", ["Magnitude", "Wanda"])
def test_n_of_m_holds_in_every_group(method):
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    dense = model[0].weight.detach().clone()
    report = prune_(model, [torch.randn(9, 16)], method=method, nm=(2, 4))
    for layer in model:
        assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert report["sparsity"] == 0.5
    if method == "Magnitude":
        groups = dense.abs().unflatten(1, (-1, 4))
        kept = groups >= groups.sort(-1).values[..., 2:3]
        assert torch.equal(model[0].weight != 0, kept.flatten(1))


def test_magnitude_compares_within_the_layer():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 8.0]])
    prune_(model, None, 0.5, "Magnitude")
    assert model[0].weight.tolist() == [[0, 0, 0, 0], [-5, 6, 7, 8]]


def test_lowest_takes_the_exact_count_and_the_first_of_ties():
    scores = torch.tensor([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    assert lowest(scores, 4).int().tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_allocation_keeps_more_where_the_profile_is_higher(sparsity):
    shapes = {"a": (30, 40), "b": (7, 9), "c": (50, 11), "d": (20, 20)}
    profile = {"a": 10.0, "b": 40.0, "c": 20.0, "d": 10.0}
    zeros = allocate(shapes, sparsity, "Wanda", profile)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    assert sum(zeros.values()) == int(sparsity * sum(sizes.values()))
    shares = {name: 1 - zeros[name] / sizes[name] for name in shapes}
    for name in shapes:  # r = min(1, c * w), to a weight
        c = shares["a"] / profile["a"]
        assert abs(shares[name] - min(1, c * profile[name])) * sizes[name] <= 4 + 1, name
    model = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
    report = prune_(model, None, sparsity, "Magnitude", profile, layers=list(shapes))
    assert report["layers"] == allocate(
        {name: (i, o) for name, (o, i) in shapes.items()}, sparsity, "Magnitude", profile
    )


@pytest.mark.parametrize("unit", [1e-320, 1e307])
def test_a_profile_has_no_unit(unit):
    shapes = {"a": (30, 40), "b": (50, 20)}
    found = allocate(shapes, 0.5, "Wanda", {"a": unit, "b": 3 * unit})
    assert found == allocate(shapes, 0.5, "Wanda", {"a": 1, "b": 3}) == {"a": 886, "b": 214}


def test_heads_and_tied_weights_are_left_out_and_said():
    model, inputs = gpt2()
    report = prune_(model, [inputs], 0.5, skip=["*.1.mlp.*"])
    assert report["left_out"]["lm_head"] == "output head"
    assert report["left_out"]["transformer.h.1.mlp.c_fc"] == "skipped"
    assert model.transformer.wte.weight.all()
    report = prune_(model, [inputs], 0.5, layers=["lm_head", "transformer.h.0.mlp.c_fc"])
    assert report["left_out"] == {"lm_head": "shares its weight with transformer.wte"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=0.0), "share of zeros, above 0 and below 1; got 0.0"),
        (dict(sparsity=50), "got 50"),
        (dict(), "got None"),
        (dict(sparsity=0.5, method="SparseGPT"), "Magnitude, Wanda"),
        (dict(sparsity=0.5, batches=[]), "Wanda needs calibration samples"),
        (dict(sparsity=0.5, layers=["1"]), "no layer to prune is called"),
        (dict(sparsity=0.5, allocation={"0": 1.0}), "missing: 1"),
        (
            dict(sparsity=0.9, method="Magnitude", allocation={"0": 1, "1": 1e-9}),
            "nothing of 1 would remain",
        ),
        (dict(sparsity=0.5, allocation={"0": 1, "1": torch.inf}), "not positive: 1"),
        (dict(sparsity=0.5, method="Magnitude", sequential=True), "Magnitude looks at no inputs"),
        (dict(nm=(4, 2)), "0 < n < m; got 4:2"),
        (dict(nm=(2, 4), sparsity=0.7), "same share of every layer zero, 0.5"),
        (dict(nm=(2, 5)), "inputs of 0 are no multiple of 5"),
        (dict(sparsity=0.5, batches=[torch.full((2, 8), torch.inf)]), "inputs of 0 are not finite"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(arguments, message):
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model.forward = lambda x: model[0](x)
    before = [p.detach().clone() for p in model.parameters()]
    arguments = {"batches": [torch.randn(2, 8)]} | arguments
    with pytest.raises(UserError, match=message):
        prune_(model, **({"sparsity": None} | arguments))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
