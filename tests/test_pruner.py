import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from pruners import NonFiniteScores, Pruner, off_target, sparsity_report
from tests.runs import on_two_processes, same
from utils import UserError

GOLDEN_RUN = dict(total_steps=120, final_threshold=0.2, steps_per_epoch=40)
GOLDEN_RUN |= dict(initial_warmup=1, final_warmup=2, warmup_steps=12)
GOLDENS = {
    "platon": dict(method="PLATON"),
    "platon_id": dict(method="PLATON"),
    "platon_dt7_id": dict(method="PLATON", delta_t=7),
    "magnitude_id": dict(method="Magnitude"),
    "taylor": dict(method="Taylor"),
}


def build_model(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Linear layers with these names and (outputs, inputs)."""
    return nn.ModuleDict({name: nn.Linear(i, o) for name, (o, i) in shapes.items()})


class GoldenRun:
    """The golden's model, its pruner, and its steps `p <- p - 0.02 * grad`."""

    def __init__(self, golden_dir, name: str):
        data = np.load(golden_dir / f"{name}.npz")
        self.data = {key.replace(".", "_"): data[key] for key in data}
        layers = [layer.replace(".", "_") for layer in self.data["layer_names"]]
        ids = dict(zip(layers, self.data["layer_id"].tolist(), strict=True))
        model = build_model({layer: self.data[f"init_{layer}_weight"].shape for layer in layers})
        self.parameters = {n.replace(".", "_"): p for n, p in model.named_parameters()}
        self.set({name: torch.from_numpy(self.data[f"init_{name}"]) for name in self.parameters})
        arguments = GOLDEN_RUN | GOLDENS[name] | {"layer_id": ids if "_id" in name else None}
        self.build_pruner = partial(Pruner, model, layers, **arguments)
        self.pruner = self.build_pruner()

    def set(self, values: dict[str, torch.Tensor]):
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def step(self, step: int):
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(self.data[f"grad_{name}"][step - 1])
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
            after = data[f"after_{name}"][step - 1]
            np.testing.assert_array_equal(parameter.detach().numpy() == 0, after == 0)
            np.testing.assert_allclose(parameter.detach().numpy(), after, rtol=1e-5, atol=1e-6)


# Window positions and phases: mid-window, on an epoch's end (which folds), in the final phase.
@pytest.mark.parametrize("saved_at", [13, 40, 103])
def test_resumes_bit_by_bit(golden_run, saved_at, tmp_path):
    for step in range(1, saved_at + 1):
        golden_run.step(step)
    torch.save(golden_run.pruner.state_dict(), tmp_path / "state.pt")
    weights = golden_run.weights()
    expected = [golden_run.step(step) for step in range(saved_at + 1, 121)]
    final = golden_run.weights()
    golden_run.set(weights)
    golden_run.pruner = golden_run.build_pruner()
    golden_run.pruner.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [golden_run.step(step) for step in range(saved_at + 1, 121)] == expected
    assert same(golden_run.weights(), final)


def pruner_of(shapes, final_threshold=0.25, layer_id=None, method="Magnitude", **arguments):
    """A pruner that masks at each of 4 steps, down to the final threshold at once."""
    run = dict(total_steps=4, initial_warmup=0, final_warmup=3, warmup_steps=1, delta_t=1)
    model = build_model(shapes)
    run |= dict(final_threshold=final_threshold, layer_id=layer_id, method=method) | arguments
    return Pruner(model, list(shapes), **run)


@pytest.mark.parametrize(("method", "value"), [("PLATON", math.nan), ("Taylor", math.inf)])
def test_not_a_number_names_its_parameter(method, value):
    pruner = pruner_of({"x": (2, 4), "y": (2, 4)}, method=method)
    for parameter in pruner.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    bias = pruner.parameters["y.bias"]
    bias.grad[1], bias.data[1] = value, 0.0  # infinity times zero
    with pytest.raises(NonFiniteScores, match=r"y\.bias are not numbers.*learning rate"):
        for step in range(1, 4):
            pruner.step(step)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer_id": {"x": 3.0}}, "missing: y"),
        ({"layer_id": {"x": 3.0, "y": 2.0, "z": 1.0}}, "unknown: z"),
        ({"layer_id": {"x": 3.0, "y": math.nan}}, "not positive: y"),
        ({"method": "OBD"}, "PLATON, Taylor, Magnitude"),
        ({"beta1": 0.0}, "0 < beta1 < 1, got 0.0.*all scores are zero"),
        ({"beta2": 2.0}, "0 <= beta2 < 1, got 2.0"),
        ({"delta_t": 5}, "nothing would be pruned.* zero until step 5.*has 4 steps.*lower delta_t"),
        ({"total_steps": 1, "final_warmup": 0}, "zero until step 2.*has 1 steps"),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        pruner_of({"x": (2, 4), "y": (2, 4)}, **({"method": "PLATON"} | arguments))


@pytest.mark.parametrize("delta_t", [1, 2, 7])
def test_the_shortest_run_that_platon_allows_prunes(delta_t):
    run = dict(total_steps=max(delta_t, 2), final_warmup=1, delta_t=delta_t)
    pruner = pruner_of({"x": (8, 8)}, method="PLATON", **run)
    for step in range(1, run["total_steps"] + 1):
        for parameter in pruner.parameters.values():
            parameter.data, parameter.grad = torch.randn(2, *parameter.shape)
        pruner.step(step)
    assert pruner.report()["pruned"] == int(0.75 * 72) - 1
    pruner_of({"x": (2, 4)}, method="Taylor", delta_t=5)  # has scores from the first step


def test_state_of_another_run_is_an_error():
    pruner = pruner_of({"x": (2, 4)}, method="PLATON")
    other = pruner_of({"z": (2, 4)}, method="PLATON")
    with pytest.raises(UserError, match=r"[xz]\.bias"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="method PLATON: resume with it, not with Magnitude"):
        pruner_of({"x": (2, 4)}).load_state_dict(pruner.state_dict())


def test_report_counts_zeros_by_layer_and_modality():
    names = ["visual_encoder.blocks.0.mlp.fc1", "visual_encoder.blocks.1.mlp.fc1"]
    names += ["text_decoder.bert.encoder.layer.0.crossattention.self.key"]
    first, second, text = layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    for layer in layers:
        nn.init.ones_(layer.bias)
    nn.init.zeros_(first.weight)  # 16 zeros of 20
    second.bias.data[:2] = 0  # 2 of 20
    text.weight.data[0] = 0  # 4 of 10
    report = sparsity_report(dict(zip(names, layers, strict=True)))
    assert report["overall"] == 22 / 50 and (report["pruned"], report["prunable"]) == (22, 50)
    assert report["by_modality"] == {"vision": 18 / 40, "language": 0.4}
    assert list(report["by_layer"].values()) == [0.8, 0.1, 0.4]
    assert report["vision_share_of_pruned"] == 18 / 22
    foreign = {"blocks.0.attn.qkv": second, "head": text}
    report = sparsity_report(foreign)
    assert report["by_modality"] == {"other": 6 / 30} and report["vision_share_of_pruned"] == 0
    kinds = {"blocks.0.attn.qkv": "vision", "head": "language"}
    assert sparsity_report(foreign, kinds)["by_modality"] == {"vision": 0.1, "language": 0.4}


def test_tied_scores_are_counted_and_warned_of_at_the_last_step():
    """30 of 60 weights share one magnitude, which is the threshold for any share above a half."""
    pruner = pruner_of({"x": (6, 9)}, 0.2)
    values = torch.cat([torch.linspace(0.1, 0.4, 30), torch.full((30,), 0.5)])
    pruner.parameters["x.weight"].data = values[:54].view(6, 9)
    pruner.parameters["x.bias"].data = values[54:]
    for step in range(1, 4):
        pruner.step(step)
    assert pruner.tied == 30
    resumed = pruner_of({"x": (6, 9)}, 0.2)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.tied == 30
    with pytest.warns(UserWarning, match="asked for 0.2 remaining, but 0.5 remain, because 30 sco"):
        pruner.step(4)
    resumed.load_state_dict({"method": "Magnitude", "score": {}})  # of an earlier version


@pytest.mark.parametrize("steps", [[0], [1, 1], [1, 2, 3, 1]])  # counted anew in each epoch, say
def test_the_steps_of_all_epochs_are_counted(steps):
    pruner = pruner_of({"x": (6, 9)})
    for step in steps[:-1]:
        pruner.step(step)
    with pytest.raises(UserError, match=f"from 1, got {steps[-1]} after {[0, *steps][-2]}"):
        pruner.step(steps[-1])
    pruner.load_state_dict(pruner.state_dict())  # which may be of an earlier step
    pruner.step(1)


@pytest.mark.parametrize(
    "pruned, tied, sentence",
    [
        (79_999, 1, None),  # the k-th smallest stays
        (79_899, 101, "asked for 0.2 remaining, but 0.201 remain, because 101 scores tie"),
        (79_800, 199, "but 0.202 remain; ties at the threshold (scores: 199) do not explain it"),
        (90_000, 20_000, "but 0.1 remain; ties at the threshold (scores: 20,000) do not"),
    ],
)
def test_a_run_that_misses_its_target_says_so(pruned, tied, sentence):
    found = off_target({"prunable": 100_000, "pruned": pruned}, 0.2, tied)
    assert found is None if sentence is None else sentence in found


# --- layers, and loops that would prune nothing ---------------------------------------------------

RUN = dict(total_steps=12, initial_warmup=0, final_warmup=1, warmup_steps=2, delta_t=2)
RUN |= dict(final_threshold=0.2)


def foreign() -> nn.Sequential:
    """Layers "0" and "2" around a ReLU, and a block "3" of a norm and a linear layer "3.1"."""
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), block)


def computed(reparametrize):
    model = foreign()
    reparametrize(model[2])
    return model


@pytest.mark.parametrize(
    "model, layers, message",
    [
        (foreign(), None, r"nothing to prune.*no transformer blocks.*layers=\[...\]"),
        (foreign(), [], "nothing to prune: no layer is named"),
        (foreign(), ["0", "3"], r"'3' is no linear layer \(Sequential\)"),
        (foreign(), ["0", "3.0"], r"'3.0' is no linear layer \(LayerNorm\)"),
        (foreign(), ["0", "7", "x"], "'7' is not a layer of the model, 'x' is not"),
        (foreign(), list("56789"), "'9' is not a layer"),
        (computed(nn.utils.parametrizations.weight_norm), ["2"], "from .*weight.original0"),
        (computed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), ["2"], "weight_orig"),
    ],
)
def test_layers_that_cannot_be_pruned_are_refused(model, layers, message):
    with pytest.raises(UserError, match=message):
        Pruner(model, layers, **RUN)


def test_tied_weights_are_left_out_and_said():
    """A language model whose head has the weights of its word embeddings."""
    model = nn.ModuleDict({"wte": nn.Embedding(50, 8), "c_fc": nn.Linear(8, 8)})
    model["lm_head"] = nn.Linear(8, 50, bias=False)
    model["lm_head"].weight = model["wte"].weight
    ids = {"c_fc": 3.0, "lm_head": 2.0}
    with pytest.warns(UserWarning, match=r"left out: lm_head \(with wte\)"):
        pruner = Pruner(model, ids, layer_id=ids, **RUN)
    train(model, pruner, lambda: model["lm_head"](model["c_fc"](model["wte"](torch.arange(50)))))
    assert model["wte"].weight.all()
    assert int((model["c_fc"].weight == 0).sum()) > 45
    assert pruner.report()["left_out"] == ["lm_head"]
    with pytest.raises(UserError, match=r"nothing to prune.*lm_head \(with wte\)"):
        Pruner(model, ["lm_head"], **RUN)


def train(model, pruner, forward, order="backward optimizer pruner zero", **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    for step in range(1, RUN["total_steps"] + 1):
        actions = {
            "backward": lambda: (forward() - 1).square().mean().backward(),
            "optimizer": optimizer.step,
            "pruner": lambda: pruner.step(step),  # noqa: B023
            "zero": lambda: optimizer.zero_grad(set_to_none=False),
        }
        for action in order.split():
            actions[action]()


BEFORE_OPTIMIZER = "after optimizer.step.. and before zero_grad"
NO_GRADIENT = "^0.weight has no gradient.* after backward.. and before zero"


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": False}])
@pytest.mark.parametrize(
    ("method", "order", "message"),
    [
        ("PLATON", "zero backward pruner optimizer", BEFORE_OPTIMIZER),
        ("Magnitude", "zero backward pruner optimizer", BEFORE_OPTIMIZER),
        ("PLATON", "backward optimizer zero pruner", "after backward.. and before"),
        ("Taylor", "backward optimizer zero pruner", "after backward.. and before"),
        ("PLATON", "pruner backward optimizer", NO_GRADIENT),
        ("PLATON", "backward optimizer pruner zero", None),
        ("PLATON", "zero backward backward optimizer pruner", None),
    ],
)
def test_loops_prune_or_are_refused(method, order, message, options, recwarn):
    model, x = foreign(), torch.randn(32, 8)
    pruner = Pruner(model, ["0", "2"], method, **RUN)
    if message:
        with pytest.raises(UserError, match=message):
            train(model, pruner, lambda: model(x), order, **options)
        return
    train(model, pruner, lambda: model(x), order, **options)
    assert pruner.report()["pruned"] == int(0.8 * pruner.numel) - 1
    assert pruner.note() is None and not recwarn.list


# --- processes ------------------------------------------------------------------------------------


def train_as_one_of_two(rank: int, folder: Path):
    """Trains undisturbed, then with a score that jumps at step 5 on either process."""
    outcomes = []
    for planted_rank in (None, 0, 1):
        torch.manual_seed(0)
        model = DistributedDataParallel(foreign())
        pruner = Pruner(model, ["0", "2"], **RUN)
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(rank))
        if rank == planted_rank:
            pruner.score.state["avg"]["2.weight"].view(-1)[7] = 1e9
        try:
            train(model, pruner, lambda model=model, x=x: model(x))
            ending = "finished"
        except RuntimeError as error:
            ending = str(error)
        outcomes.append(
            (ending, torch.cat([(p == 0).view(-1) for p in pruner.parameters.values()]))
        )
    torch.save(outcomes, folder / f"{rank}.pt")


def test_processes_prune_the_same_weights_or_stop(tmp_path):
    on_two_processes(train_as_one_of_two, tmp_path)
    whole, *planted = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    (first, zeros), (second, other_zeros) = whole
    assert first == second == "finished" and torch.equal(zeros, other_zeros)
    assert int(zeros.sum()) == int(len(zeros) * 0.8) - 1
    for ending, zeros in sum(planted, ()):
        assert ending.startswith("the processes have pruned different weights") and zeros.any()
