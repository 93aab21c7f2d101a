"""Capture: equal to hooks on the model's own forward, within any budget, on several processes.

Where two ways to the same outputs are compared, the model runs in float64, because in float32 the
rounding of its products depends on the batch size and the processor.
"""

import pytest
import torch

from dimension import budget as planning
from dimension.budget import LayerShape, StageShape, plan_capture, share_layers
from dimension.capture import Accumulator, Capture, Samples, counted_positions, trace_stages
from dimension.twonn import pairwise_distances
from models import build_captioner, build_clip, build_nlvr, prunable_layers
from models.layers import sees_image
from models.stages import Stage
from tests.runs import outputs_of
from tests.test_clip import CONFIG, TINY
from tests.test_model_classes import far_apart

N, LENGTH = 50, 11
CPU = torch.device("cpu")
ROUNDING32 = 2.0**-24  # at most, relative to the result of an operation
GB = 10**9


@pytest.fixture
def captioner(caption_tiny_config):
    return far_apart(build_captioner(caption_tiny_config))


@pytest.fixture
def nlvr(nlvr_tiny_config):
    """Layers that average and, from the seventh on, layers that merge what they saw."""
    sizes = nlvr_tiny_config["med_config"] | {"num_hidden_layers": 7}
    return far_apart(build_nlvr(nlvr_tiny_config | {"med_config": sizes}))


@pytest.fixture
def clip():
    """So narrow that its widest representation has fewer than `PRODUCT_FEATURES`, in float64."""
    sizes = TINY | {"context_length": LENGTH, "vision_width": 64}
    return far_apart(build_clip(CONFIG | {"clip": sizes}))


def make_samples(model, batch_size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(104, 158, (N, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (N, 1), generator=generator)
    lengths[5] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    names = ["image0", "image1"] if hasattr(model, "cls_head") else ["image"]
    images = [torch.randn(N, 3, 32, 32, generator=generator).to(dtype) for _ in names]
    return Samples(
        tensors={"input_ids": ids * mask, "attention_mask": mask},
        images=dict(zip(names, map(list, images), strict=True)),
        text=mask.bool(),
        batch_size=batch_size,
    )


def run_model(model, samples):
    """The model's own forward over all samples."""
    images = [torch.stack(column) for column in samples.images.values()]
    ids, mask = samples.tensors["input_ids"], samples.tensors["attention_mask"]
    if hasattr(model, "text_decoder"):
        embeds = model.encode_image(*images)
        model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=embeds)
    elif len(images) == 1:
        model.logits_from_ids(*images, ids)
    else:
        model.logits_from_ids(*images, ids, mask)


def hooked_outputs(model, samples):
    """Outputs (n, L, width) of all layers in a plain forward, for out_proj its attention's."""
    layers = {n: model.get_submodule(n.removesuffix(".out_proj")) for n in prunable_layers(model)}
    for name, (output,) in outputs_of(layers, lambda: run_model(model, samples)).items():
        output = output[0] if name.endswith(".out_proj") else output
        yield name, output[:N]  # one call sees both images of NLVR2


def plan_for(model, samples, budget=GB, layers=None):
    shapes = trace_stages(model.stages(), prunable_layers(model), samples, CPU)
    return plan_capture(shapes, layers or set(prunable_layers(model)), samples, N, budget)


def capture_for(model, samples, plan):
    return Capture(plan, prunable_layers(model), samples, CPU, progress=False)


def measure(model, samples, budget=GB, layers=None):
    capture = capture_for(model, samples, plan_for(model, samples, budget, layers))
    return {name: distances for name, _, distances in capture}


@pytest.mark.parametrize("kind", ["captioner", "nlvr", "clip"])
def test_stages_equal_the_models_forward(kind, request):
    """In batches and with padding that counts as zero; but for a rounding to float32.

    A capture keeps x, an output's difference from a mean of samples: |x| is at most the largest
    distance. Rounding x and y moves their distance by at most `ROUNDING32` (|x| + |y|). All else
    is in float64, whose rounding is 2^-29 of that.
    """
    model = request.getfixturevalue(kind).double()
    samples = make_samples(model, dtype=torch.float64)
    outputs = dict(hooked_outputs(model, samples))
    captured = {x.name: x for x in capture_for(model, samples, plan_for(model, samples))}
    assert set(captured) == set(outputs)
    for name, output in outputs.items():
        if not sees_image(name):
            output = output * samples.tensors["attention_mask"][..., None]
        assert captured[name].features == output[0].numel()
        expected = pairwise_distances(output.flatten(1))
        bound = 2 * ROUNDING32 * expected.max().item() * 1.01
        torch.testing.assert_close(captured[name].distances, expected, rtol=0, atol=bound)


def test_padding_that_is_kept_reaches_to_a_batchs_longest_text():
    mask = (torch.arange(3) < torch.tensor([[1], [2], [3], [1]])).long()
    assert torch.equal(counted_positions(mask, 2, keep_padding=False), mask.bool())
    assert counted_positions(mask, 2, keep_padding=True).sum(1).tolist() == [2, 2, 3, 3]


def test_any_budget_and_share_of_layers_gives_the_same_bits(nlvr, small_segments):
    """Both decide what else a pass keeps, not the size or the alignment of a segment.

    Each layer belongs to one of two processes, and loads are even. Nine samples a batch, as the
    order in which torch sums the first batch's mean depends on a segment's size from eight on.
    """
    samples = make_samples(nlvr, batch_size=9)
    peak = plan_for(nlvr, samples).peak
    plans = [plan_for(nlvr, samples, int(share * peak)) for share in (1, 0.3)]
    passes = [max(len(stage.passes) for stage in plan.stages) for plan in plans]
    assert passes[0] == 1 < passes[1]
    assert plans[0].work == 1 < plans[1].work
    assert all(plan.peak <= plan.budget for plan in plans)
    shapes, names = [stage.shape for stage in plans[0].stages], set(prunable_layers(nlvr))
    shares = share_layers(shapes, names, 2)
    assert shares[0] | shares[1] == names and not shares[0] & shares[1]
    features = {x.name: x.features for shape in shapes for x in shape.layers}
    loads = [sum(features[name] for name in share) for share in shares]
    assert max(loads) < 1.1 * min(loads)

    whole = measure(nlvr, samples)
    for layers in (names, shares[0]):
        part = measure(nlvr, samples, plans[1].budget, layers)
        assert set(part) == layers
        assert all(torch.equal(part[name], whole[name]) for name in layers)


def test_memory_is_what_was_planned(captioner, small_segments, monkeypatch):
    samples = make_samples(captioner)
    budget = int(0.4 * plan_for(captioner, samples).peak)
    plan = plan_for(captioner, samples, budget)
    capture, held, finished = capture_for(captioner, samples, plan), [], Accumulator.finished

    def spy(self, n):
        states = sum(batch.nbytes for state in capture.states.values() for batch in state)
        held.append(self.buffer.nbytes + states)
        return finished(self, n)

    monkeypatch.setattr(Accumulator, "finished", spy)
    list(capture)
    assert 0.8 * budget < max(held) <= plan.peak <= budget


def test_base_model_at_12_gb(golden_tokenizer):
    """BLIP base, 384 px, 2,000 images: at most 1.9 plain forwards of work."""
    config = {"vit": "base", "image_size": 384, "med_config": {}, "tokenizer": golden_tokenizer}
    with torch.device("meta"):  # sizes without weights
        model = build_captioner(config).eval()
        ids, image = torch.ones(1, 40, dtype=torch.long), torch.empty(3, 384, 384)
    samples = Samples({"input_ids": ids, "attention_mask": ids}, {"image": [image]}, ids.bool())
    layers = set(prunable_layers(model))
    shapes = trace_stages(model.stages(), prunable_layers(model), samples, torch.device("meta"))
    # multiply-adds of the layers and of attention, patches included
    layer_flops = 2 * 577 * 768 * (2304 + 768 + 3072 + 3072)
    block_flops = layer_flops + 4 * 577 * 577 * 768
    assert sum(shape.flops for shape in shapes[1:25]) == 12 * block_flops
    plan = plan_capture(shapes, layers, samples, 2000, 12 * GB)
    assert len([x for stage in plan.stages for x in stage.shape.layers]) == 168
    assert 1 < plan.work <= 1.9
    assert plan.peak <= 12 * GB
    assert plan_capture(shapes, layers, samples, 96, 6 * GB).work == 1
    assert "12 x tokens: block *, attention " in str(plan)
    one = plan_capture(shapes, {"visual_encoder.blocks.1.attn.qkv"}, samples, 96, 6 * GB)
    assert one.work < 0.1 and not one.stages[-1].to_the_end  # ends where the layer is


def test_segments_are_aligned_and_centred(monkeypatch):
    """Also after segments of odd sizes: a product's last bits may depend on its alignment.

    The first batch's mean is off by B + 1 roundings of the largest output at most, so is the mean
    of what is kept; what all samples share costs products no digits.
    """
    monkeypatch.setattr(planning, "SEGMENT_ELEMENTS", 3 * 7 * N)
    odd = LayerShape("odd", tokens=5, width=7, flops=1)
    stage = StageShape(Stage("stage", None, ("x",), "x"), (odd,), (5, 7), 1)
    samples = Samples({}, {}, torch.ones(N, 5, dtype=torch.bool))
    plan = plan_capture([stage], {"odd"}, samples, N, GB)
    (kept,) = plan.stages[0].passes
    assert [(segment.start, segment.stop) for segment in kept] == [(0, 3), (3, 5)]
    distances = Accumulator(plan, CPU, None)
    distances.hold(plan.stages[0], kept)
    distances.add(odd, slice(0, 8), torch.randn(8, 5, 7) + 1000, None)
    for _, view in distances.held[odd]:
        assert view.data_ptr() % 64 == 0
        assert view[:8].mean(0).abs().max() <= (8 + 1) * ROUNDING32 * 1010
