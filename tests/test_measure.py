"""IDs of models that are not ours, against plain hooks and the block analysis."""

import subprocess
import sys
import textwrap
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

import dimension.budget as planning
from dimension import measure
from dimension.any_model import ForwardCapture
from dimension.figures import plot_comparison, plot_depth, plot_scale
from dimension.profile import IDProfile, block_permutations, load_kinds, measure_layer
from dimension.twonn import pairwise_distances
from pruners import Pruner
from utils import UserError

N = 45
GB = 10**9
# What is kept is rounded to float32, by 2^-24 of itself, of the order of its distance to its
# neighbours. Those errors average out over the hundreds of elements of a distance and over the
# points of a fit, so that an ID moves by far less than this, which is what is promised.
PROMISED = 1e-6
TRACES = 2  # forwards before the first pass; with texts one more
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
WIDTH |= {"num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}


def texts(ids_from=3, vocabulary=40, longest=9):
    """Token ids and mask, (N, longest), of texts of five to nine tokens."""
    lengths = torch.randint(5, longest + 1, (N, 1))
    lengths[-1] = longest  # so that the first batch is not the longest
    lengths[:8] = 6
    mask = (torch.arange(longest) < lengths).long()
    return torch.randint(ids_from, vocabulary, mask.shape) * mask, mask


def pixels():
    return torch.randn(N, 3, 16, 16)


def clip():
    text = WIDTH | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39}
    config = transformers.CLIPConfig(text_config=text, vision_config=WIDTH | IMAGES)
    ids, mask = texts(vocabulary=39)
    ids[torch.arange(N), mask.sum(1) - 1] = 39
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels()}
    return transformers.CLIPModel(config), inputs


def flava():
    config = transformers.FlavaConfig(
        image_config=WIDTH | IMAGES,
        text_config=WIDTH | {"vocab_size": 40},
        multimodal_config=WIDTH,
        hidden_size=16,
        projection_dim=8,
    )
    ids, mask = texts()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels()}
    return transformers.FlavaModel(config), inputs


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**WIDTH, **IMAGES),
        text_config=transformers.LlamaConfig(**WIDTH, vocab_size=40, num_key_value_heads=2),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    ids, mask = texts()
    image = torch.full((N, 4), 2)  # 16 / 8 squared tokens stand for a picture
    inputs = {
        "input_ids": torch.cat([image, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": pixels(),
    }
    return transformers.LlavaModel(config), inputs


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**WIDTH, **IMAGES)), {
        "pixel_values": pixels()
    }


def bert():
    ids, mask = texts()
    model = transformers.BertModel(transformers.BertConfig(**WIDTH, vocab_size=40))
    return model, {"input_ids": ids, "attention_mask": mask}


FOREIGN = {kind.__name__: kind for kind in (clip, flava, llava, vit, bert)}


def foreign(kind):
    """A model with weights so large that samples differ in all layers, and its inputs."""
    model, inputs = FOREIGN[kind]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, inputs


def in_batches(inputs, size=8):
    """Mappings as processors return them, padded to a batch's longest text."""
    batches = []
    for start in range(0, N, size):
        batch = {name: values[start : start + size] for name, values in inputs.items()}
        if "attention_mask" in batch:
            longest = int(batch["attention_mask"].sum(1).max())
            for name in ("input_ids", "attention_mask"):
                batch[name] = batch[name][:, :longest]
        batches.append(batch)
    return batches


def hooked(model, batches, mask=None):
    """Outputs (n, L, D) of all linear layers, over batches; with a mask, padding is zero."""
    kept = {}
    hooks = [
        module.register_forward_hook(
            lambda m, a, output, name=name: kept.setdefault(name, []).append(output)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    joined = {}
    for name, outputs in kept.items():
        outputs = [x if x.dim() > 2 else x[:, None] for x in outputs]
        longest = max(x.shape[1] for x in outputs)
        padded = [nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in outputs]
        joined[name] = torch.cat(padded)
        if mask is not None and "vision" not in name and longest == mask.shape[1]:
            joined[name] = joined[name] * mask[..., None]
    return joined


def expected_ids(outputs):
    permutations = block_permutations(N, 0)
    return {
        name: measure_layer(name, 0, pairwise_distances(x.flatten(1)), 1.0, permutations).id
        for name, x in outputs.items()
    }


def ids(profile):
    return {name: layer.id for name, layer in profile.layers.items()}


@pytest.fixture
def nothing_fixed(monkeypatch):
    """Small segments, and nothing but outputs in the budget."""
    monkeypatch.setattr(planning, "SEGMENT_ELEMENTS", 3000)
    for name in ("WORKSPACE", "MATRICES", "BATCH_OUTPUTS"):
        monkeypatch.setattr(planning, name, 0)


def count_passes(model):
    """A list that grows by one whenever the model runs."""
    runs = []
    model.register_forward_pre_hook(lambda module, args: runs.append(1))
    return runs


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("share", [1, 0.4, 0.15])
def test_equals_plain_hooks(kind, share, nothing_fixed):
    """Under any budget, in as many passes as its share of all outputs makes necessary."""
    model, inputs = foreign(kind)
    batches = in_batches(inputs)
    outputs = hooked(model, batches, inputs.get("attention_mask"))
    room = lambda x: 16 * -(-x.shape[1] * x.shape[2] // 16)  # noqa: E731
    elements = sum(room(x) for x in outputs.values())
    expected = expected_ids(outputs)
    runs = count_passes(model)
    profile = measure(model, batches, memory_gb=share * (N + 1) * elements * 4 * 1.02 / GB)
    assert set(profile.layers) == set(expected)
    assert ids(profile) == pytest.approx(expected, rel=PROMISED)
    passes = (len(runs) - TRACES - ("attention_mask" in inputs)) / len(batches)
    assert passes == 1 if share == 1 else 1 / share <= passes <= 1.5 / share + 1
    features = {name: x[0].numel() for name, x in outputs.items()}
    assert {name: layer.features for name, layer in profile.layers.items()} == features


class Chain(nn.Module):
    """Five linear layers of the same size over tokens; an unused one, and more on demand."""

    def __init__(self, width=16):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(width, width) for _ in range(5))
        self.unused = nn.Linear(width, width)

    def forward(self, x, scale=None):
        for step in self.steps:
            x = torch.tanh(step(x))
        return x


def chain_inputs():
    return list(torch.randn(N, 6, 16).split(8))


def layer_bytes(layers, tokens=6, width=16):
    return layers * tokens * width * (N + 1) * 4


def test_passes_and_where_they_stop(nothing_fixed, capsys):
    """Room for two of five layers: three passes, that call 5, 3 and 1 layers."""
    model, batches = Chain(), chain_inputs()
    calls = dict.fromkeys(range(5), 0)
    for number, step in enumerate(model.steps):

        def count(module, args, output, number=number):
            calls[number] += 1

        step.register_forward_hook(count)
    measure(model, batches, memory_gb=layer_bytes(2) / GB)
    per_pass = len(batches)
    assert list(calls.values()) == [TRACES + per_pass * passes for passes in (3, 2, 2, 1, 1)]
    out = capsys.readouterr().out
    assert "45 samples, 5 layers" in out
    assert "forward work 1.80 plain forwards" in out  # (5 + 3 + 1) / 5


def test_too_small_a_budget(nothing_fixed):
    with pytest.raises(UserError, match=r"--memory_gb 1e-06 is too little: the model needs"):
        measure(Chain(), chain_inputs(), memory_gb=1e-6)


def test_a_layer_that_never_runs_is_named():
    profile = measure(Chain(), chain_inputs())
    assert "unused" not in profile.layers
    assert "left out, for they did not run in the first batch: unused" in profile.remarks
    with pytest.raises(UserError, match="no layer is left.*did not run in the first batch: unused"):
        measure(Chain(), chain_inputs(), layers="unused")


class Twice(nn.Module):
    """Calls one layer for the input and, in the end, for its first four tokens."""

    def __init__(self):
        super().__init__()
        self.shared, self.between = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.shared(torch.tanh(self.between(self.shared(x)))[:, :4])


@pytest.mark.parametrize("layers", [10, 1])
def test_calls_of_one_layer_are_one_representation(nothing_fixed, layers):
    """So that an ID belongs to a name that a pruner finds; in one pass or in two."""
    model, batches = Twice(), chain_inputs()
    runs = count_passes(model)
    profile = measure(model, batches, memory_gb=layer_bytes(layers) / GB)
    assert len(runs) == TRACES + len(batches) * (1 if layers == 10 else 3)
    with torch.no_grad():
        x = torch.cat(batches)
        once = model.shared(x)
        between = model.between(once)
        again = model.shared(torch.tanh(between)[:, :4])
    both = torch.cat([once, again], 1)
    assert ids(profile) == pytest.approx(
        expected_ids({"shared": both, "between": between}), rel=PROMISED
    )
    assert profile.layers["shared"].features == (6 + 4) * 16
    assert list(profile.layers) == ["between", "shared"]  # in forward order


@dataclass
class Answer:
    label: str
    states: tuple


class Returns(nn.Module):
    """Gives its input in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


FORMS = {
    "tuple": lambda x: (None, x, -x),
    "dataclass": lambda x: Answer("states", (x, -x)),
    "mapping": lambda x: {"states": x},
}


@pytest.mark.parametrize("form", FORMS)
def test_takes_the_first_tensor_of_an_output(form):
    model = nn.Sequential(nn.Linear(16, 16), Returns(FORMS[form]))
    batches = chain_inputs()
    profile = measure(model, batches, layers=["0", "1"])
    assert profile.layers["0"] == profile.layers["1"]


class Odd(nn.Module):
    """Parts whose outputs are no representations of samples."""

    def __init__(self):
        super().__init__()
        self.line, self.total = nn.Linear(16, 16), Returns(lambda x: x.sum((1, 2)))
        self.table, self.index = nn.Linear(16, 16), Returns(lambda x: x.argmax(-1))
        self.nothing = Returns(lambda x: None)

    def forward(self, x):
        for part in (self.total, self.index, self.nothing):
            part(x)
        self.table(x[0, :5])
        return self.line(x)


def test_outputs_that_are_no_representations_are_named():
    profile = measure(Odd(), chain_inputs(), layers=["*", "total", "index", "nothing"])
    assert list(profile.layers) == ["line"]
    text = "\n".join(profile.remarks)
    assert "total, for its output (8,) has fewer than two dimensions" in text
    assert "index, for its output is of int64" in text
    assert "nothing, for its output holds no tensor" in text
    assert "table, for its output (5, 16) does not divide into 8 samples" in text


def test_windows_in_the_first_dimension_belong_to_their_samples():
    batches = chain_inputs()
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(16, 16))  # (B * 6, 16)
    whole = nn.Sequential(nn.Identity(), flat[1])
    expected = measure(whole, batches).layers["1"].id
    assert measure(flat, batches).layers["1"].id == pytest.approx(expected, rel=PROMISED)


class Gate(nn.Module):
    """Sees samples, and one of three prompts with each."""

    def __init__(self):
        super().__init__()
        self.sample, self.prompt = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, prompt):
        return self.sample(x) + self.prompt(prompt)


def test_a_layer_in_which_few_samples_differ_is_left_out():
    x, prompts = torch.randn(N, 16), torch.randn(3, 16)[torch.arange(N) % 3]
    batches = list(zip(x.split(8), prompts.split(8), strict=True))
    profile = measure(Gate(), batches)
    assert list(profile.layers) == ["sample"]
    message = (
        "layer prompt: 0 of 45 samples have two neighbours at different distances (45 are "
        "duplicates), and three are needed; take more different samples"
    )
    assert f"left out: {message}" in profile.remarks
    with pytest.raises(UserError, match="no layer is left to measure.*layer prompt: 0 of 45"):
        measure(Gate(), batches, layers="prompt")


@pytest.mark.parametrize("n", [0, -3, 1, 2])
def test_too_few_samples_for_an_id(n):
    with pytest.raises(UserError, match=f"an ID needs 3 samples at least, not {n}"):
        measure(Chain(), chain_inputs(), n=n)
    with pytest.raises(UserError, match="an ID needs 3 samples at least, not 2"):
        measure(Chain(), [torch.randn(2, 6, 16)])


@pytest.mark.parametrize("fraction", [0.0, -1.0, 2.0, float("nan")])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match=f"fraction {fraction} is not in"):
        measure(Chain(), chain_inputs(), fraction=fraction)


def test_the_linear_layers_of_gpt2(nothing_fixed):
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=20)
    model, (tokens, mask) = transformers.GPT2Model(config), texts()
    profile = measure(model, [{"input_ids": tokens, "attention_mask": mask}])
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(profile.layers) == [f"h.0.{name}" for name in names]
    with torch.no_grad():
        embedded = model.wte(tokens) + model.wpe(torch.arange(9))
        queries = model.h[0].attn.c_attn(model.h[0].ln_1(embedded)) * mask[..., None]
    expected = expected_ids({"c_attn": queries})["c_attn"]
    assert profile.layers["h.0.attn.c_attn"].id == pytest.approx(expected, rel=PROMISED)


def test_an_attention_elsewhere_does_not_matter():
    assert list(measure(TokensFirst(), chain_inputs(), layers="before").layers) == ["before"]


class TokensFirst(nn.Module):
    """Works in (L, B, D), as XLNet and torch's attention by default, between two that do not."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.after = (nn.Linear(16, 16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        x = self.inside(self.before(x).transpose(0, 1))
        return self.after(self.attention(x, x, x)[0].transpose(0, 1))


@pytest.mark.parametrize("tokens, size", [(8, 8), (16, 8), (2, 2), (3, 3), (7, 8)])
def test_rows_that_are_no_samples_are_left_out(tokens, size):
    """Also where they are as many as samples, or a multiple."""
    model, x = TokensFirst(), torch.randn(N, tokens, 16)
    profile = measure(model, x.split(size))
    assert list(profile.layers) == ["before", "after"]
    left_out = [x for x in profile.remarks if "left out" in x]
    assert [x.split(",")[0] for x in left_out] == [
        "left out: inside",
        "left out: attention.out_proj",
    ]
    if tokens == 16:
        assert "(16, 8, 16) for 8 samples is (16, 2, 16) for 2, so its rows" in left_out[0]
        assert "give batches of one sample" in left_out[0]


def test_every_row_of_a_batch_of_one_sample_is_its_own(nothing_fixed):
    model, x = TokensFirst().eval(), torch.randn(N, 16, 16)
    profile = measure(model, x.split(1))
    with torch.no_grad():
        inside = model.inside(model.before(x))
    expected = expected_ids({"inside": inside})["inside"]
    assert profile.layers["inside"].id == pytest.approx(expected, rel=PROMISED)
    assert list(profile.layers) == ["before", "inside", "attention.out_proj", "after"]
    with pytest.raises(UserError, match="batch 1 has 44 samples and the first only one"):
        measure(model, x.split([1, 44]))


class Packed(nn.Module):
    """Pictures of different sizes, whose patches follow each other, beside their titles."""

    def __init__(self):
        super().__init__()
        self.patch, self.title = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, titles, patches, sizes=None):
        if sizes is not None:
            assert len(patches) == sum(sizes)
        return self.patch(patches), self.title(titles)


def test_packed_patches_are_no_samples():
    """16 rows of two samples are not eight each."""
    batches = [(torch.randn(2, 4, 16), torch.randn(16, 16)) for _ in range(20)]
    profile = measure(Packed(), batches)
    assert list(profile.layers) == ["title"]
    assert any(
        "patch, for its output (16, 16) for 2 samples is (16, 16)" in x for x in profile.remarks
    )
    sized = [(*batch, [4, 12]) for batch in batches]
    with pytest.raises(
        UserError, match="take 1 of the first batch's 2 samples alone .AssertionErr"
    ):
        measure(Packed(), sized)
    single = [(x[:1], y[: 4 + i % 9], [4 + i % 9]) for i, (x, y) in enumerate(batches)]
    assert measure(Packed(), single).layers["patch"].features == 12 * 16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value):
    model = Chain()
    model.steps[2].weight.data[3, 3] = value
    with pytest.raises(UserError, match="layer steps.2: values are NaN, infinite"):
        measure(model, chain_inputs())


def test_a_generator_serves_one_pass(nothing_fixed):
    model, batches = Chain(), chain_inputs()
    found = measure(model, iter(batches), n=N)
    assert found.layers == measure(model, batches).layers
    with pytest.raises(UserError, match="only once, but 3 passes are needed"):
        measure(model, iter(batches), n=N, memory_gb=layer_bytes(2) / GB)


def test_a_generator_whose_batches_grow_beyond_one_pass(nothing_fixed):
    batches = [*torch.randn(40, 6, 16).split(8), torch.randn(5, 9, 16)]
    with pytest.raises(UserError, match="only once, but 2 passes are needed"):
        measure(Chain(), iter(batches), n=N, memory_gb=layer_bytes(6) / GB)


def test_batches_must_stay_the_same(nothing_fixed):
    loader = DataLoader(torch.randn(N, 6, 16), batch_size=8, shuffle=True)
    measure(Chain(), loader)  # one pass
    with pytest.raises(UserError, match="batch 0 is not what it was in the first pass"):
        measure(Chain(), loader, memory_gb=layer_bytes(2) / GB)

    class Shrinking:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            yield from self.batches
            self.batches.pop()

    with pytest.raises(UserError, match="45 samples in the first pass and now 40"):
        measure(Chain(), Shrinking(chain_inputs()), n=N, memory_gb=layer_bytes(2) / GB)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "there are none"),
        (["text"], "str is no batch"),
        ([torch.zeros(0, 6, 16)], "Tensor is no batch; give tensors"),
        (torch.zeros(N, 6, 16), "a Tensor is one batch"),
        ({"x": torch.zeros(8, 6, 16)}, "a dict is one batch"),
    ],
)
def test_what_is_no_batches(batches, message):
    with pytest.raises(UserError, match=message):
        measure(Chain(), batches)


def test_batches_of_all_forms_and_the_first_n(nothing_fixed):
    model, values = Chain(), torch.cat(chain_inputs())
    expected = ids(measure(model, [values[:30]]))
    forms = [
        values.split(8),
        [(x, None) for x in values.split(8)],
        [{"x": x, "scale": 2.0} for x in values.split(8)],
        DataLoader(torch.utils.data.TensorDataset(values), batch_size=8),
    ]
    for batches in forms:
        profile = measure(model, batches, n=30)
        assert profile.settings["nsamples"] == 30
        assert ids(profile) == pytest.approx(expected, rel=PROMISED)


def test_later_batches_must_not_be_larger_unless_counted(nothing_fixed):
    class Sized:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter(self.batches)

    batches = [torch.randn(4, 6, 16), torch.randn(41, 6, 16)]
    assert measure(Chain(), batches).settings["nsamples"] == N
    with pytest.raises(UserError, match="batch 1 is larger than the first"):
        measure(Chain(), Sized(batches))


@pytest.mark.parametrize("kind", ["bert", "clip"])
@pytest.mark.parametrize("share", [1, 0.2])
def test_padding_does_not_count(kind, share, nothing_fixed):
    """Batches padded each to its longest text give what one padded batch gives.

    In float64, where the batch does not move the roundings that are kept.
    """
    model, inputs = foreign(kind)
    model = model.double()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    whole = measure(model, [inputs], memory_gb=1)
    elements = sum(layer.features for layer in whole.layers.values())
    parts = measure(
        model, in_batches(inputs, 7), memory_gb=share * (N + 1) * elements * 4 * 1.1 / GB
    )
    assert ids(parts) == pytest.approx(ids(whole), rel=PROMISED)
    assert {n: x.features for n, x in parts.layers.items()} == {
        n: x.features for n, x in whole.layers.items()
    }


class Alike(nn.Module):
    """Words, regions of an image and learnt queries, all nine of them, that see the words."""

    def __init__(self):
        super().__init__()
        self.table, self.asked = nn.Embedding(40, 16), nn.Parameter(torch.randn(9, 16))
        self.words, self.regions, self.queries = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, attention_mask, features, input_ids=None, boxes=None, inputs_embeds=None):
        embedded = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        words = self.words(embedded if boxes is None else embedded + boxes.repeat(1, 1, 4))
        mean = (words * attention_mask[..., None]).mean(1, keepdim=True)
        self.regions(features + mean)
        self.queries(self.asked + mean)


@pytest.mark.parametrize("form", ["ids", "boxes", "embedded"])
@pytest.mark.parametrize("size", [8, 1])
def test_only_what_is_as_long_as_the_texts_has_their_padding(form, size, nothing_fixed):
    model, (tokens, mask) = Alike(), texts()
    inputs = {"attention_mask": mask, "features": torch.randn(N, 9, 16), "input_ids": tokens}
    if form == "boxes":
        inputs["boxes"] = torch.randint(0, 9, (N, 9, 4))
    if form == "embedded":
        inputs["inputs_embeds"] = model.table(inputs.pop("input_ids")).detach()
    batches = [
        dict(zip(inputs, x, strict=True))
        for x in zip(*(x.split(size) for x in inputs.values()), strict=True)
    ]
    outputs = hooked(model, batches)
    outputs["words"] = outputs["words"] * mask[..., None]
    assert ids(measure(model, batches)) == pytest.approx(expected_ids(outputs), rel=PROMISED)


def test_an_image_with_as_many_tokens_as_the_texts(nothing_fixed):
    model, inputs = foreign("clip")
    whole = inputs["attention_mask"][:, :5]
    inputs |= {"input_ids": inputs["input_ids"][:, :5], "attention_mask": whole.clone()}
    inputs["attention_mask"][::2, 3:] = 0
    batches = [{k: x[i : i + 8] for k, x in inputs.items()} for i in range(0, N, 8)]
    expected = expected_ids(hooked(model, batches, inputs["attention_mask"]))
    assert ids(measure(model, batches)) == pytest.approx(expected, rel=PROMISED)


def test_a_model_of_one_length_of_texts_is_masked_by_length(nothing_fixed):
    class OneLength(Alike):
        def forward(self, attention_mask, **inputs):
            assert attention_mask.shape[1] == 9, "nine words"
            super().forward(attention_mask, **inputs)

    model, (tokens, mask) = OneLength(), texts()
    batch = {"attention_mask": mask, "features": torch.randn(N, 9, 16), "input_ids": tokens}
    profile = measure(model, [batch])
    masked = {name: x * mask[..., None] for name, x in hooked(model, [batch]).items()}
    assert ids(profile) == pytest.approx(expected_ids(masked), rel=PROMISED)
    assert any("not take shorter texts (AssertionError: nine words" in x for x in profile.remarks)


def test_shorter_batches_end_in_zeros(nothing_fixed):
    """Without a mask: outputs of a shorter batch are padded, not its inputs."""
    model = Chain()
    batches = [torch.randn(20, 4, 16), torch.randn(20, 7, 16), torch.randn(5, 3, 16)]
    outputs = hooked(model, [{"x": x} for x in batches])
    found = ids(measure(model, batches, memory_gb=layer_bytes(2, tokens=7) / GB))
    assert found == pytest.approx(expected_ids(outputs), rel=PROMISED)


def test_held_outputs_stay_within_the_budget(nothing_fixed, monkeypatch):
    """Also where batches grow longer in the midst of a pass."""
    batches = [torch.randn(9, tokens, 16) for tokens in (2, 5, 3, 8, 9)]
    held, hold = [], ForwardCapture._hold

    def spy(self, make):
        hold(self, make)
        held.append(sum(values.nbytes for values in self.held.values()))

    monkeypatch.setattr(ForwardCapture, "_hold", spy)
    budget = layer_bytes(2, tokens=9)
    model = Chain()
    found = ids(measure(model, batches, memory_gb=budget / GB))
    assert 0.8 * budget < max(held) <= budget
    outputs = hooked(model, [{"x": x} for x in batches])
    assert found == pytest.approx(expected_ids(outputs), rel=PROMISED)


def test_a_layer_that_stops_running_is_named():
    class Moody(Chain):
        def forward(self, x):
            return super().forward(x) if len(x) != 5 else self.steps[0](x)

    names = ", ".join(f"steps.{i}" for i in range(1, 5))
    with pytest.raises(UserError, match=f"layers {names}: not called as often in batch 5"):
        measure(Moody(), chain_inputs())


class Noisy(Chain):
    """Draws in eval mode, too."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_a_model_that_draws_gives_the_same_in_each_pass_and_run(nothing_fixed):
    model, batches = Noisy(), chain_inputs()
    before = torch.get_rng_state()
    once = measure(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    thrice = measure(model, batches, memory_gb=layer_bytes(2) / GB)
    assert ids(thrice) == pytest.approx(ids(once), rel=PROMISED)
    other = measure(model, batches, seed=1)
    assert all(abs(ids(other)[name] / ids(once)[name] - 1) > 1e-3 for name in ids(once))
    repeated = measure(model, [batches[0]] * 5)  # what is drawn differs between batches
    assert all(layer.duplicates == 0 for layer in repeated.layers.values())


class Cell(nn.Module):
    """Calls one layer for each token, and others before and after."""

    def __init__(self):
        super().__init__()
        self.before, self.cell, self.after = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.before(x)
        state = torch.zeros_like(x[:, 0])
        for token in x.unbind(1):
            state = torch.tanh(self.cell(state + token))
        return self.after(state)


@pytest.mark.parametrize("lengths, layers", [((3, 9), ["cell"]), ((9, 3), None), ((3, 9), None)])
def test_layers_called_another_number_of_times_are_named(nothing_fixed, lengths, layers):
    """Also after the last output that is kept, and in the first of several passes."""
    model = Cell()
    batches = [torch.randn(n, x, 16) for n, x in zip((23, 22), lengths, strict=True)]
    runs = count_passes(model)
    with pytest.raises(UserError, match="layers cell: not called as often in batch 1 as in"):
        measure(model, batches, layers, memory_gb=layer_bytes(9) / GB)
    assert len(runs) == TRACES + 2
    whole = ids(measure(model, batches, ["before", "after"]))
    kept = hooked(model, [{"x": x} for x in batches])
    expected = expected_ids({name: kept[name] for name in whole})
    assert whole == pytest.approx(expected, rel=PROMISED)


class Experts(nn.Module):
    """The first token of a sample says which expert its tokens go to."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        self.router(x)
        for number, expert in enumerate(self.experts):
            chosen = x[x[:, 0, 0] == number]
            if len(chosen):
                expert(chosen.flatten(0, 1))


def test_layers_that_see_some_samples_only():
    """In proportion in the first batch, another number of rows later."""
    x = torch.randn(N, 6, 16)
    x[:, 0, 0] = 1
    x[:8:2, 0, 0] = x[9:16, 0, 0] = 0  # experts 0 and 1 get 24 rows each of the first batch
    with pytest.raises(
        UserError, match=r"experts.0: its output \(42, 16\) .*leave it out \(layers"
    ):
        measure(Experts(), x.split(8))
    x[:2, 0, 0] = 2
    profile = measure(Experts(), x.split(8))
    assert list(profile.layers) == ["router"]
    text = "\n".join(profile.remarks)
    assert "experts.0, for its output (18, 16) does not divide" in text
    assert "experts.2, for its output (12, 16) does not divide" in text


def test_a_layer_of_changing_width_is_named():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(16, 16)

        def forward(self, x):  # (B, L, H, 16)
            return self.step(x)

    batches = [torch.randn(8, 2, height, 16) for height in (3, 4)]
    with pytest.raises(UserError, match="layer step: 64 values .* another batch has 48"):
        measure(Wide(), batches)


def test_modes_gradients_and_hooks_are_restored():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    model[1].eval()
    model[2].weight.data[0, 0] = float("nan")
    modes = [module.training for module in model.modules()]
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    for layers in ("0", "*"):
        with pytest.raises(UserError) if layers == "*" else nullcontext():
            measure(model, chain_inputs(), layers=layers)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
        assert not model[0]._forward_hooks and not model[2]._forward_hooks
    assert not any(seen)
    assert model(chain_inputs()[0]).requires_grad


def test_names_and_patterns():
    model, batches = Chain(), chain_inputs()
    assert list(measure(model, batches, layers="steps.[13]").layers) == ["steps.1", "steps.3"]
    assert list(measure(model, batches, layers=["", "steps.4"]).layers) == ["steps.4", ""]
    with pytest.raises(UserError, match="'head.*' fits no layer, such as steps.0, steps.1"):
        measure(model, batches, layers="head.*")


def test_attention_stands_for_its_out_proj():
    """torch's encoder, whose fused form would call no layer, and never calls out_proj."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, batches = nn.TransformerEncoder(layer, 2), chain_inputs()
    profile = measure(model, batches)
    names = ["self_attn.out_proj", "linear1", "linear2"]
    assert list(profile.layers) == [f"layers.{i}.{name}" for i in range(2) for name in names]
    with torch.no_grad():
        x = torch.cat(batches)
        attended = model.layers[0].eval().self_attn(x, x, x)[0]
    name = "layers.0.self_attn.out_proj"
    expected = expected_ids({name: attended})[name]
    assert profile.layers[name].id == pytest.approx(expected, rel=PROMISED)
    masked = [(x, None, torch.arange(6).expand(len(x), 6) > 3) for x in batches]
    assert list(measure(model, masked, layers="*linear2").layers) == [
        f"layers.{i}.linear2" for i in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_prunes_a_model_that_is_not_ours(kind):
    """Measured IDs weight the scores of `Pruner` by name; layers of high ID keep more."""
    model, inputs = foreign(kind)
    profile = measure(model, in_batches(inputs), layers="encoder.*" if kind == "bert" else None)
    layer_id = ids(profile)
    highest = max(layer_id, key=layer_id.get)
    remaining = {}
    for weights in (None, layer_id | {highest: 1e9}):
        copy = deepcopy(model)
        pruner = Pruner(
            copy,
            layers=profile.layers,
            method="Magnitude",
            total_steps=4,
            delta_t=1,
            final_threshold=0.5,
            initial_warmup=0,
            final_warmup=1,
            warmup_steps=1,
            layer_id=weights,
        )
        for step in range(1, 5):
            pruner.step(step)
        zeros = sum(int((x == 0).sum()) for x in pruner.parameters.values())
        assert abs(zeros / pruner.numel - 0.5) < 0.1  # biases begin as zeros
        remaining[weights is None] = (copy.get_submodule(highest).weight != 0).float().mean()
    assert remaining[False] == 1 > remaining[True]


def test_profile_files_keep_the_kind(tmp_path):
    profile = measure(Chain(), chain_inputs())
    profile.write(tmp_path)
    assert IDProfile.read(tmp_path) == profile
    assert load_kinds(tmp_path) == dict.fromkeys(profile.layers, "other")
    assert load_kinds("configs/id/blip_coco.json") == {}
    axes = plot_depth(profile).axes[0]
    assert [x.get_label() for x in axes.containers] == ["other"]
    both = {"ours": {"visual_encoder.blocks.0.attn.qkv": 5.0}, "theirs": ids(profile)}
    figure = plot_comparison(both, {"theirs": profile.kinds()})
    points = {x.get_label(): x for x in figure.axes[0].lines}
    assert {"vision", "language", "other"} <= set(points)
    assert len(plot_scale(profile).axes[0].lines) == 5


def test_the_readmes_example_runs_in_a_process_of_its_own(tmp_path):
    lines = Path("README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "from dimension import measure" in line)
    stop = next(i for i in range(start, len(lines)) if lines[i].startswith("`measure` takes"))
    code = textwrap.dedent("\n".join(lines[start:stop]))
    for written, smaller in (
        ("vit_base_patch16_224", "test_vit"),
        ("pretrained=True", "pretrained=False"),
        ("ID/vit", str(tmp_path / "ID")),
        ("n=2000", "n=40"),
    ):
        assert code.count(written) == 1
        code = code.replace(written, smaller)
    pictures = "import torch; pictures = torch.rand(40, 3, 160, 160)"
    code = f"{pictures}\n{code}\nprint(sorted(pruner.layers) == sorted(profile.layers))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    assert (tmp_path / "ID/profile.json").exists()
