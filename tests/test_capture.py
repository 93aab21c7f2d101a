"""Capture: equal to hooks on the model's own forward, within any budget, on several processes.

Where two ways to the same outputs are compared, the model runs in float64, for in float32 the
rounding of its products depends on the batch size and the processor.
"""

import pytest
import torch

from dimension import budget as planning
from dimension import capture as capturing
from dimension.budget import LayerShape, StageShape, plan_capture, share_layers
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.twonn import pairwise_distances
from models import build_captioner, build_nlvr, prunable_layers
from models.layers import sees_image
from models.stages import Stage

N, LENGTH = 50, 11
CPU = torch.device("cpu")
ROUNDING32 = 2.0**-24  # at most, relative to the result of an operation
GB = 10**9


def with_large_weights(model):
    """Samples differ by more than rounding errors at all depths, as in a trained model."""
    for layer in prunable_layers(model).values():
        torch.nn.init.xavier_normal_(layer.weight)
    return model.eval()


@pytest.fixture
def captioner(caption_tiny_config):
    return with_large_weights(build_captioner(caption_tiny_config))


@pytest.fixture
def nlvr(nlvr_tiny_config):
    return with_large_weights(build_nlvr(nlvr_tiny_config))


@pytest.fixture(params=["captioner", "nlvr"])
def model(request):
    return request.getfixturevalue(request.param)


def make_samples(model, batch_size=4, keep_padding=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(104, 158, (N, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (N, 1), generator=generator)
    lengths[5] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    names = ["image"] if hasattr(model, "text_decoder") else ["image0", "image1"]
    return Samples(
        tensors={"input_ids": ids * mask, "attention_mask": mask},
        images={name: list(torch.randn(N, 3, 32, 32, generator=generator)) for name in names},
        counted=counted_positions(mask, batch_size, keep_padding),
        batch_size=batch_size,
    )


def in_float64(samples):
    samples.images = {name: [i.double() for i in images] for name, images in samples.images.items()}
    return samples


def assert_same_but_for_rounding(found, expected, captures=1):
    """Distances of the same outputs, of which some `captures` are rounded to float32 when kept.

    What is kept of an output is x, its difference from a mean of samples, so |x| is at most the
    largest distance. Its rounding moves a distance by at most `ROUNDING32` (|x| + |y|). Float64,
    in which all else is computed, has a rounding 2^-29 of that, and a model this small does not
    make it grow by more.
    """
    bound = captures * 2 * ROUNDING32 * expected.max().item() * 1.01
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def run_model(model, samples, rows, trim=False):
    """The model's own forward over some samples."""
    images = [torch.stack(column[rows]) for column in samples.images.values()]
    ids, mask = samples.tensors["input_ids"][rows], samples.tensors["attention_mask"][rows]
    if trim:
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
    with torch.no_grad():
        if len(images) == 1:
            embeds = model.encode_image(*images)
            model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=embeds)
        else:
            model.logits_from_ids(*images, ids, mask)


def hooked_outputs(model, samples, trim=False):
    """Outputs (n, L, width) of all layers in plain forwards, text padded with zeros to LENGTH."""
    outputs = {name: [] for name in prunable_layers(model)}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: outputs[name].append(out))
        for name, layer in prunable_layers(model).items()
    ]
    for start in range(0, N, samples.batch_size):
        run_model(model, samples, slice(start, start + samples.batch_size), trim)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, parts in outputs.items():
        if not sees_image(name):
            parts = [torch.nn.functional.pad(x, (0, 0, 0, LENGTH - x.shape[1])) for x in parts]
        result[name] = torch.cat(parts)
        if len(samples.images) == 2 and name.startswith("visual_encoder."):
            firsts = [x.chunk(2)[0] for x in parts]  # one call sees both images
            result[name] = torch.cat(firsts)
    return result


def plan_for(model, samples, budget=GB, layers=None):
    shapes = trace_stages(model.stages(), prunable_layers(model), samples, CPU)
    layers = set(prunable_layers(model)) if layers is None else layers
    return plan_capture(shapes, layers, samples.sizes(), N, samples.batch_size, budget)


def measure(model, samples, budget=GB, layers=None):
    plan = plan_for(model, samples, budget, layers)
    capture = Capture(plan, prunable_layers(model), samples, CPU, progress=False)
    return {layer.name: distances for layer, distances in capture}


def test_stages_equal_the_models_forward(model):
    model, samples = model.double(), in_float64(make_samples(model))
    found = measure(model, samples)
    outputs = hooked_outputs(model, samples)
    assert set(found) == set(outputs)
    for name, output in outputs.items():
        if not sees_image(name):
            output = output * samples.tensors["attention_mask"][..., None]
        assert_same_but_for_rounding(found[name], pairwise_distances(output.flatten(1)))


def test_what_all_samples_share_costs_no_digits(captioner, monkeypatch):
    """Products see outputs about the first batch's mean, not about the origin.

    Of B samples, that mean is off by B roundings of the largest output at most, and each difference
    from it by one, so the differences' own mean is zero but for (B + 1) roundings, and B more of
    its own sum.
    """
    seen = []
    monkeypatch.setattr(
        capturing, "squared_distances", lambda x, centred: seen.append(x.clone()) or x @ x.T
    )
    samples = make_samples(captioner)
    name = "visual_encoder.blocks.1.mlp.fc1"
    torch.nn.init.constant_(captioner.get_submodule(name).bias, 5.0)
    largest = hooked_outputs(captioner, samples)[name].abs().max().item()
    measure(captioner, samples, layers={name})
    (differences,) = seen
    bound = (2 * samples.batch_size + 1) * ROUNDING32 * largest
    assert largest > 5
    assert differences[: samples.batch_size].mean(0).abs().max() <= bound * 1.01
    assert differences.abs().max() > 1  # samples differ


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of a token or a few, and nothing but outputs and states in the budget."""
    monkeypatch.setattr(planning, "SEGMENT_ELEMENTS", 3000)
    for name in ("WORKSPACE", "MATRICES", "BATCH_OUTPUTS"):
        monkeypatch.setattr(planning, name, 0)


def test_any_budget_gives_the_same_bits(model, small_segments):
    """Budgets decide what else a pass keeps, not the size or the alignment of a segment.

    Nine samples a batch, as the order in which torch sums the first batch's mean depends on a
    segment's size from eight on.
    """
    samples = make_samples(model, batch_size=9)
    peak = plan_for(model, samples).peak
    plans = [plan_for(model, samples, int(share * peak)) for share in (1, 0.6, 0.3)]
    passes = [max(len(stage.passes) for stage in plan.stages) for plan in plans]
    assert passes[0] == 1 < passes[1] < passes[2]
    assert plans[0].work == 1 < plans[1].work < plans[2].work
    assert all(plan.peak <= plan.budget for plan in plans)
    results = [measure(model, samples, plan.budget) for plan in plans]
    for name, distances in results[0].items():
        assert torch.equal(results[1][name], distances)
        assert torch.equal(results[2][name], distances)


def test_calls_of_each_layer_are_those_planned(captioner, small_segments):
    """A pass stops at the last output it keeps: later layers of the stage are not called."""
    samples = make_samples(captioner)
    plan = plan_for(captioner, samples, int(0.3 * plan_for(captioner, samples).peak))
    calls = dict.fromkeys(prunable_layers(captioner), 0)

    def count(module, args, output, name):
        calls[name] += 1

    batches = -(-N // samples.batch_size)
    for name, layer in prunable_layers(captioner).items():
        layer.register_forward_hook(lambda *call, name=name: count(*call, name=name))
    list(Capture(plan, prunable_layers(captioner), samples, CPU, progress=False))
    for stage in plan.stages:
        names = [layer.name for layer in stage.shape.layers]
        for position, name in enumerate(names):
            reaching = [
                kept for kept in stage.passes if names.index(kept[-1].layer.name) >= position
            ]
            advancing = stage.advances and stage.passes[-1] not in reaching
            assert calls[name] == batches * (len(reaching) + advancing)


def test_buffers_stay_within_the_plan(captioner, small_segments, monkeypatch):
    samples = make_samples(captioner)
    budget = int(0.4 * plan_for(captioner, samples).peak)
    plan = plan_for(captioner, samples, budget)
    capture = Capture(plan, prunable_layers(captioner), samples, CPU, progress=False)
    seen = []
    forward = Capture._forward

    def spy(self, *args):
        forward(self, *args)
        seen.append(
            self.buffer.nbytes
            + sum(batch.nbytes for state in self.states.values() for batch in state)
        )

    monkeypatch.setattr(Capture, "_forward", spy)
    list(capture)
    assert 0.8 * budget < max(seen) <= plan.peak <= budget


def test_base_model_at_12_gb(golden_tokenizer):
    """BLIP base, 384 px, 2,000 images: at most three plain forwards of work."""
    config = {"vit": "base", "image_size": 384, "med_config": {}, "tokenizer": golden_tokenizer}
    with torch.device("meta"):  # sizes without weights
        model = build_captioner(config).eval()
        ids = torch.ones(1, 40, dtype=torch.long)
        image = torch.empty(3, 384, 384)
    tensors = {"input_ids": ids, "attention_mask": ids}
    samples = Samples(tensors, {"image": [image]}, ids.bool())
    layers = prunable_layers(model)
    shapes = trace_stages(model.stages(), layers, samples, torch.device("meta"))
    features = sum(x.features for shape in shapes for x in shape.layers)
    assert features == 12 * (
        577 * (2304 + 768 + 3072 + 768 + 2 * 768) + 40 * (6 * 768 + 3072 + 768)
    )
    # multiply-adds of the layers and of attention, patches included
    layer_flops = 2 * 577 * 768 * (2304 + 768 + 3072 + 3072)
    block_flops = layer_flops + 4 * 577 * 577 * 768
    assert sum(shape.flops for shape in shapes[1:25]) == 12 * block_flops
    plan = plan_capture(shapes, set(layers), samples.sizes(), 2000, 8, 12 * GB)
    assert len([x for stage in plan.stages for x in stage.shape.layers]) == 168
    assert 1 < plan.work <= 3
    assert plan.peak <= 12 * GB
    assert plan_capture(shapes, set(layers), samples.sizes(), 96, 8, 6 * GB).work == 1
    rows = [line[:46].strip() for line in str(plan).splitlines()[1:-1]]
    assert rows.count("12 x tokens: block *, attention") == 1
    kinds = [row.split(" x ")[-1] for row in rows]
    assert len(set(kinds)) == len(kinds) == 8


@pytest.mark.parametrize("batch_size", [1, 7])
def test_padding_does_not_count(model, batch_size):
    model = model.double()
    expected, found = (
        measure(model, in_float64(make_samples(model, size))) for size in (16, batch_size)
    )
    for name, distances in expected.items():
        assert_same_but_for_rounding(found[name], distances, captures=2)


def test_keep_padding_is_the_originals(model):
    """What a batch pads to its longest text is kept; what other batches add, is zero."""
    model, samples = model.double(), in_float64(make_samples(model, keep_padding=True))
    found = measure(model, samples)
    for name, output in hooked_outputs(model, samples, trim=True).items():
        assert_same_but_for_rounding(found[name], pairwise_distances(output.flatten(1)))
    without = measure(model, in_float64(make_samples(model)))
    name = next(name for name in found if name.endswith("layer.0.output.dense"))
    assert not torch.allclose(without[name], found[name])


def test_budget_too_small(captioner, small_segments):
    with pytest.raises(ValueError, match=r"--memory_gb 1e-05 is too little: .* needs 0\.\d+ GB"):
        plan_for(captioner, make_samples(captioner), 10_000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(model, value):
    name = next(name for name in prunable_layers(model) if name.endswith("blocks.1.mlp.fc2"))
    prunable_layers(model)[name].bias.data[3] = value
    with pytest.raises(ValueError, match=f"layer {name}: values are NaN, infinite"):
        measure(model, make_samples(model))


def test_processes_share_the_layers(model, small_segments):
    """Each layer belongs to one process, and loads are even.

    The bits are those of one process, for the reasons of `test_any_budget_gives_the_same_bits`.
    """
    samples = make_samples(model)
    layers = prunable_layers(model)
    shapes = trace_stages(model.stages(), layers, samples, CPU)
    shares = share_layers(shapes, set(layers), 2)
    assert shares[0] | shares[1] == set(layers)
    assert not shares[0] & shares[1]
    features = {x.name: x.features for shape in shapes for x in shape.layers}
    loads = [sum(features[name] for name in share) for share in shares]
    assert max(loads) < 1.1 * min(loads)
    whole = measure(model, samples)
    for share in shares:
        part = measure(model, samples, plan_for(model, samples).peak // 2, share)
        assert set(part) == share
        assert all(torch.equal(part[name], whole[name]) for name in share)


def test_chain_ends_at_the_last_layer_wanted(captioner):
    name = "visual_encoder.blocks.1.attn.qkv"
    samples = make_samples(captioner)
    plan = plan_for(captioner, samples, layers={name})
    assert plan.stages[-1].shape.layers[0].name == name
    assert not plan.stages[-1].advances
    assert list(measure(captioner, samples, layers={name})) == [name]


def test_segments_are_aligned(monkeypatch):
    """Also after segments of odd sizes: a product's last bits may depend on its alignment."""
    monkeypatch.setattr(planning, "SEGMENT_ELEMENTS", 3 * 7 * N)
    odd = LayerShape("odd", tokens=5, width=7, flops=1)
    stage = Stage("stage", None, ("x",), "x")
    plan = plan_capture([StageShape(stage, (odd,), (5, 7), 1)], {"odd"}, {}, N, 4, GB)
    (kept,) = plan.stages[0].passes
    assert [(segment.start, segment.stop) for segment in kept] == [(0, 3), (3, 5)]
    samples = Samples({}, {}, torch.ones(N, 5, dtype=torch.bool))
    capture = Capture(plan, {}, samples, CPU, progress=False)
    capture._make_room(plan.stages[0])
    assert [view.data_ptr() % 64 for _, view in capture._views(kept)] == [0, 0]
