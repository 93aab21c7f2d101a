import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruners import NonFiniteScores, Pruner, off_target, score, sparsity_report
from utils import UserError

GOLDEN_RUN = dict(
    total_steps=120,
    final_threshold=0.2,
    initial_warmup=1,
    final_warmup=2,
    warmup_steps=12,
    steps_per_epoch=40,
)
GOLDENS = {
    "platon": dict(method="PLATON"),
    "platon_id": dict(method="PLATON"),
    "platon_dt7_id": dict(method="PLATON", delta_t=7),
    "magnitude_id": dict(method="Magnitude"),
    "taylor": dict(method="Taylor"),
}


def build_model(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """A tree of linear layers with these names and (outputs, inputs)."""
    model = nn.Module()
    for name, (outputs, inputs) in shapes.items():
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(inputs, outputs))
    return model


class GoldenRun:
    """The golden's model, its pruner, and its steps `p <- p - 0.02 * grad`."""

    def __init__(self, golden_dir, name: str):
        self.data = dict(np.load(golden_dir / f"{name}.npz"))
        self.layers = [str(layer) for layer in self.data["layer_names"]]
        self.model = build_model({n: self.data[f"init.{n}.weight"].shape for n in self.layers})
        self.parameters = dict(self.model.named_parameters())
        self.set(lambda n: self.data[f"init.{n}"])
        ids = dict(zip(self.layers, self.data["layer_id"].tolist(), strict=True))
        self.arguments = GOLDENS[name] | {"layer_id": ids if "_id" in name else None}
        self.pruner = self.build_pruner()

    def build_pruner(self) -> Pruner:
        return Pruner(self.model, self.layers, **GOLDEN_RUN, **self.arguments)

    def set(self, values):
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(values(name)))

    def step(self, step: int):
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(self.data[f"grad.{name}"][step - 1])
            parameter.data -= 0.02 * parameter.grad
        return self.pruner.step(step)


@pytest.fixture(params=GOLDENS)
def golden_run(golden_dir, request):
    return GoldenRun(golden_dir, request.param)


def test_prunes_like_the_original_code(golden_run):
    data = golden_run.data
    for step in range(1, 121):
        ratio, threshold = golden_run.step(step)
        assert ratio == pytest.approx(data["remaining_ratio"][step - 1], rel=1e-12)
        expected = data["score_threshold"][step - 1]
        assert (threshold is None) == np.isnan(expected)
        if threshold is not None:
            assert threshold == pytest.approx(expected, rel=1e-4)
        for name, parameter in golden_run.parameters.items():
            after = data[f"after.{name}"][step - 1]
            np.testing.assert_array_equal(parameter.detach().numpy() == 0, after == 0)
            np.testing.assert_allclose(parameter.detach().numpy(), after, rtol=1e-5, atol=1e-6)


# Window positions and phases: mid-window, on a fold, on an epoch's end, in the final phase.
@pytest.mark.parametrize("saved_at", [13, 30, 40, 103])
def test_resumes_bit_by_bit(golden_run, golden_dir, saved_at, tmp_path):
    for step in range(1, saved_at + 1):
        golden_run.step(step)
    torch.save(golden_run.pruner.state_dict(), tmp_path / "state.pt")
    weights = {n: p.detach().clone() for n, p in golden_run.parameters.items()}
    expected = [golden_run.step(step) for step in range(saved_at + 1, 121)]

    final = {n: p.detach().clone() for n, p in golden_run.parameters.items()}
    golden_run.set(lambda name: weights[name].numpy())
    golden_run.pruner = golden_run.build_pruner()
    golden_run.pruner.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [golden_run.step(step) for step in range(saved_at + 1, 121)] == expected
    for name, parameter in golden_run.parameters.items():
        assert torch.equal(parameter, final[name])


def pruner_of(shapes, final_threshold=0.25, layer_id=None, method="Magnitude", **arguments):
    """A pruner that masks at each of 4 steps, down to the final threshold at once."""
    run = dict(total_steps=4, initial_warmup=0, final_warmup=3, warmup_steps=1, delta_t=1)
    model = build_model(shapes)
    run |= dict(final_threshold=final_threshold, layer_id=layer_id, method=method) | arguments
    return Pruner(model, list(shapes), **run)


def test_zeroes_the_exact_number_across_pieces():
    pruner = pruner_of({"a.0.wide": (3, score.PIECE_ON_CPU - 1), "b.0.small": (5, 7)})
    ratio, threshold = pruner.step(1)
    scores = torch.cat([p.detach().abs().view(-1) for p in pruner.parameters.values()])
    assert ratio == 0.25
    assert int((scores == 0).sum()) == int(0.75 * pruner.numel) - 1  # the k-th itself stays
    assert scores[scores > 0].min() == threshold


def test_each_layers_bias_is_pruned_by_its_own_score():
    pruner = pruner_of({"a.0.x": (4, 4)}, 0.5)
    layer = pruner.layers["a.0.x"]
    nn.init.uniform_(layer.weight, 1.0, 2.0)
    layer.bias.data = torch.tensor([0.1, 3.0, 0.2, 4.0])
    pruner.step(1)
    assert pruner.numel == 20
    assert layer.bias.tolist() == [0.0, 3.0, 0.0, 4.0]
    assert int((layer.weight == 0).sum()) == 10 - 1 - 2


@pytest.mark.parametrize("method", ["PLATON", "Taylor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_names_its_parameter(method, value):
    pruner = pruner_of({"a.0.x": (2, 4), "a.1.y": (2, 4)}, method=method)
    for parameter in pruner.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    bias = pruner.parameters["a.1.y.bias"]
    bias.grad[1], bias.data[1] = value, 0.0  # infinity times zero
    with pytest.raises(
        NonFiniteScores, match=r"a\.1\.y\.bias are not numbers.*lower learning rate"
    ):
        for step in range(1, 4):
            pruner.step(step)
    assert issubclass(NonFiniteScores, FloatingPointError)


@pytest.mark.parametrize("method", ["PLATON", "Taylor", "Magnitude"])
def test_a_threshold_is_found_again_when_scores_changed(method):
    """PLATON's scores stand still between folds, the others' change at each step."""
    pruner = pruner_of({"a.0.x": (8, 8)}, method=method, total_steps=6, delta_t=3)
    thresholds = []
    for step in range(1, 7):
        for parameter in pruner.parameters.values():
            parameter.grad = torch.randn_like(parameter)
            parameter.data = torch.randn_like(parameter)
        thresholds.append(pruner.step(step)[1])
    found = [threshold for threshold in thresholds if threshold]
    assert len(set(found)) == (2 if method == "PLATON" else 4)  # masks at 3, 4, 5, 6; folds at 3, 6
    assert thresholds[:2] == [None, None] and len(found) == 4


def test_processes_masks_are_compared_in_the_cubic_phase(monkeypatch):
    pruner = pruner_of({"a.0.x": (4, 4)}, total_steps=6, final_warmup=2)
    compared = []
    monkeypatch.setattr(pruner, "check_masks_equal", lambda: compared.append(step))
    for step in range(1, 7):
        pruner.step(step)
    assert compared == [1, 2, 3, 4]


def test_missing_gradient_names_its_parameter():
    pruner = pruner_of({"a.0.x": (2, 4)}, method="PLATON")
    with pytest.raises(ValueError, match=r"a\.0\.x\.weight has no gradient"):
        pruner.step(1)


@pytest.mark.parametrize(
    "layer_id, message",
    [
        ({"a.0.x": 3.0}, "missing: a.0.y"),
        ({"a.0.x": 3.0, "a.0.y": 2.0, "a.0.z": 1.0}, "unknown: a.0.z"),
        ({"a.0.x": 3.0, "a.0.y": float("nan")}, "not positive: a.0.y"),
    ],
)
def test_profile_of_other_layers_is_an_error(layer_id, message):
    with pytest.raises(UserError, match=message):
        pruner_of({"a.0.x": (2, 4), "a.0.y": (2, 4)}, layer_id=layer_id)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "OBD"}, "PLATON, Taylor, Magnitude"),
        ({"beta1": 0.0}, "0 < beta1 < 1, got 0.0.*all scores are zero"),
        ({"beta1": 1.0}, "0 < beta1 < 1, got 1.0"),
        ({"beta2": 2.0}, "0 <= beta2 < 1, got 2.0"),
        ({"delta_t": 5}, "nothing would be pruned.* zero until step 5.*has 4 steps.*lower delta_t"),
        ({"total_steps": 1, "final_warmup": 0}, "zero until step 2.*has 1 steps"),
        ({"final_warmup": 4}, "longer than the run"),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        pruner_of({"a.0.x": (2, 4)}, **({"method": "PLATON"} | arguments))


def test_arguments_arrive():
    run = dict(total_steps=50, final_threshold=0.3, initial_threshold=0.8, initial_warmup=2)
    run |= dict(final_warmup=3, warmup_steps=4, delta_t=5, steps_per_epoch=11)
    ids = {"a.0.x": 3.0}
    pruner = pruner_of(
        {"a.0.x": (2, 4)}, layer_id=ids, method="PLATON", beta1=0.6, beta2=0.7, **run
    )
    assert vars(pruner.schedule) == run | {"first_scored": 5}
    score = pruner.score
    assert (score.delta_t, score.beta1, score.beta2, score.layer_id) == (5, 0.6, 0.7, ids)


@pytest.mark.parametrize("delta_t", [1, 2, 3, 4, 7])
def test_the_shortest_run_that_platon_allows_prunes(delta_t):
    shortest = max(delta_t, 2)
    pruner = pruner_of(
        {"a.0.x": (8, 8)}, method="PLATON", total_steps=shortest, final_warmup=1, delta_t=delta_t
    )
    for step in range(1, shortest + 1):
        for parameter in pruner.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        pruner.step(step)
    assert pruner.report()["pruned"] == int(0.75 * 72) - 1
    pruner_of({"a.0.x": (2, 4)}, method="Taylor", delta_t=5)  # has scores from the first step


def test_state_of_another_run_is_an_error():
    pruner = pruner_of({"a.0.x": (2, 4)}, method="PLATON")
    other = pruner_of({"a.0.z": (2, 4)}, method="PLATON")
    with pytest.raises(UserError, match=r"a\.0\.[xz]"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="method PLATON: resume with it, not with Magnitude"):
        pruner_of({"a.0.x": (2, 4)}).load_state_dict(pruner.state_dict())


def test_report_counts_zeros_by_layer_and_modality():
    model = build_model(
        {
            "visual_encoder.blocks.0.attn.qkv": (4, 4),  # 20 parameters
            "visual_encoder.blocks.1.attn.qkv": (4, 4),
            "text_decoder.bert.encoder.layer.0.crossattention.self.key": (2, 4),  # 10 parameters
        }
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer in layers.values():
        nn.init.ones_(layer.bias)
    first, second, text = layers.values()
    nn.init.zeros_(first.weight)  # 16 zeros
    second.bias.data[:2] = 0  # 2 zeros
    text.weight.data[0] = 0  # 4 zeros
    report = sparsity_report(layers)
    assert report["overall"] == 22 / 50 and (report["pruned"], report["prunable"]) == (22, 50)
    assert report["by_modality"] == {"vision": 18 / 40, "language": 0.4}
    assert list(report["by_layer"].values()) == [0.8, 0.1, 0.4]
    assert report["vision_share_of_pruned"] == 18 / 22
    assert json.loads(json.dumps(report)) == report


def test_tied_scores_are_counted_and_told():
    """30 of 60 weights share one magnitude, which is the threshold for any share above a half."""
    pruner = pruner_of({"a.0.x": (6, 9)}, 0.2)
    values = torch.cat([torch.linspace(0.1, 0.4, 30), torch.full((30,), 0.5)])
    pruner.parameters["a.0.x.weight"].data = values[:54].view(6, 9)
    pruner.parameters["a.0.x.bias"].data = values[54:]
    pruner.step(1)
    assert pruner.tied == 30
    again = pruner_of({"a.0.x": (6, 9)}, 0.2)
    again.load_state_dict(pruner.state_dict())
    assert again.tied == 30
    again.load_state_dict({"method": "Magnitude", "score": {}})  # of an earlier version
    report = pruner.report()
    assert report["pruned"] == 30
    assert off_target(report, 0.2, pruner.tied) == (
        "asked for 0.2 remaining, but 0.5 remain, because 30 scores tie at the threshold and none "
        "of them is pruned"
    )


@pytest.mark.parametrize(
    "pruned, tied, told",
    [
        (79_999, 1, None),  # the k-th smallest stays
        (79_900, 101, None),  # a tenth of a percentage point
        (79_899, 101, "asked for 0.2 remaining, but 0.201 remain, because 101 scores tie"),
        (79_800, 199, "but 0.202 remain; ties at the threshold (scores: 199) do not explain it"),
        (0, 1, "but 1 remain; ties at the threshold (scores: 1) do not explain it"),
        (
            90_000,
            20_000,
            "but 0.1 remain; ties at the threshold (scores: 20,000) do not explain it",
        ),
    ],
)
def test_a_run_that_misses_its_target_says_so(pruned, tied, told):
    sentence = off_target({"prunable": 100_000, "pruned": pruned}, 0.2, tied)
    assert sentence is None if told is None else told in sentence


# --- layers, and loops that would prune nothing ---------------------------------------------------

RUN = dict(total_steps=12, initial_warmup=0, final_warmup=1, warmup_steps=2, delta_t=2)
RUN |= dict(final_threshold=0.2)


def foreign() -> nn.Sequential:
    """Layers "0" and "2" around a ReLU, and a block "3" of a norm and a linear layer "3.1"."""
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), block)


@pytest.mark.parametrize(
    "layers, message",
    [
        (None, r"nothing to prune.*no transformer blocks.*layers=\[...\]"),
        ([], "nothing to prune: no layer is named"),
        ([""], r"'' is no linear layer \(Sequential\)"),
        (["0", "3"], r"'3' is no linear layer \(Sequential\)"),
        (["0", "1"], r"'1' is no linear layer \(ReLU\)"),
        (["0", "3.0"], r"'3.0' is no linear layer \(LayerNorm\)"),
        (["0", "7", "x"], "'7' is not a layer of the model, 'x' is not"),
        ("blocks.*", r"'blocks.\*' is not a layer"),
        (list("56789"), "and 2 more"),
    ],
)
def test_layers_that_cannot_be_pruned_are_refused(layers, message):
    with pytest.raises(UserError, match=message):
        Pruner(foreign(), layers, **RUN)


@pytest.mark.parametrize(
    "reparametrize, weight",
    [
        (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0"),
        (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
        (nn.utils.weight_norm, "weight_g"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig"),
    ],
)
def test_computed_weights_are_refused_by_name(reparametrize, weight):
    model = foreign()
    reparametrize(model[2])
    with pytest.raises(UserError, match=f"'2' computes its weight from .*{weight}"):
        Pruner(model, ["0", "2"], **RUN)


@pytest.mark.parametrize("method", ["PLATON", "Taylor", "Magnitude"])
def test_tied_weights_are_left_out_and_said(method):
    """A language model whose head has the weights of its word embeddings."""
    model = nn.ModuleDict({"wte": nn.Embedding(50, 8), "c_fc": nn.Linear(8, 8)})
    model["lm_head"] = nn.Linear(8, 50, bias=False)
    model["lm_head"].weight = model["wte"].weight
    ids = {"c_fc": 3.0, "lm_head": 2.0}
    with pytest.warns(UserWarning, match=r"left out: lm_head \(with wte\)"):
        pruner = Pruner(model, ids, method, layer_id=ids, **RUN)
    train(model, pruner, lambda: model["lm_head"](model["c_fc"](model["wte"](torch.arange(50)))))
    assert model["wte"].weight.all()
    assert int((model["c_fc"].weight == 0).sum()) > 45
    assert pruner.report()["left_out"] == ["lm_head"]
    with pytest.raises(UserError, match=r"nothing to prune.*lm_head \(with wte\)"):
        Pruner(model, ["lm_head"], **RUN)


def train(model, pruner, forward, order="backward optimizer pruner zero", steps=12, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    for step in range(1, steps + 1):
        actions = {
            "backward": lambda: (forward() - 1).square().mean().backward(),
            "optimizer": optimizer.step,
            "pruner": lambda: pruner.step(step),  # noqa: B023
            "zero": lambda: optimizer.zero_grad(set_to_none=False),
        }
        for action in order.split():
            actions[action]()


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("method", ["PLATON", "Taylor", "Magnitude"])
def test_pruning_before_the_optimizer_is_refused(method, kind):
    model, x = foreign(), torch.randn(32, 8)
    pruner = Pruner(model, ["0", "2"], method, **RUN)
    with pytest.raises(UserError, match="after optimizer.step.. and before zero_grad"):
        train(model, pruner, lambda: model(x), "zero backward pruner optimizer", **kind)


@pytest.mark.parametrize("method", ["PLATON", "Taylor"])
@pytest.mark.parametrize("order", ["backward optimizer zero pruner", "pruner backward optimizer"])
def test_gradients_that_are_zero_or_missing_are_refused(method, order):
    model, x = foreign(), torch.randn(32, 8)
    pruner = Pruner(model, ["0", "2"], method, **RUN)
    with pytest.raises(UserError, match="after backward.. and before"):
        train(model, pruner, lambda: model(x), order)


@pytest.mark.parametrize(
    "order", ["backward optimizer pruner zero", "zero backward optimizer pruner"]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_loops_in_order_are_accepted_and_prune(order, parts, recwarn):
    model, x = foreign(), torch.randn(32, 8)
    pruner = Pruner(model, ["0", "2"], **RUN)
    order = order.replace("backward", "backward " * parts)
    train(model, pruner, lambda: model(x), order, fused=True)
    assert pruner.report()["pruned"] == int(0.8 * pruner.numel) - 1
    assert pruner.note() is None and not recwarn.list


def test_the_last_step_warns_of_a_sparsity_that_was_not_reached():
    pruner = pruner_of({"a.0.x": (6, 9)}, 0.2)
    for parameter in pruner.parameters.values():
        parameter.data = (
            torch.linspace(0.1, 0.6, parameter.numel()).view_as(parameter).round(decimals=1)
        )
    for step in range(1, 4):
        pruner.step(step)
    with pytest.warns(UserWarning, match="asked for 0.2 remaining, but 0.3 remain"):
        pruner.step(4)
    with pytest.raises(UserError, match="from 1, got 0"):
        pruner.step(0)


def test_modalities_of_foreign_layers():
    layers = {"blocks.0.attn.qkv": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
    nn.init.zeros_(layers["head"].weight)
    report = sparsity_report(layers)
    assert report["by_modality"] == {"other": 4 / 12} and report["vision_share_of_pruned"] == 0
    kinds = {"blocks.0.attn.qkv": "vision", "head": "language"}
    assert sparsity_report(layers, kinds)["by_modality"] == {"vision": 0, "language": 4 / 6}
