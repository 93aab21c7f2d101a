"""IDs of models that are not ours, against plain hooks and the block analysis."""

from dataclasses import make_dataclass

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from dimension import measure
from dimension.any_model import choose_layers
from dimension.figures import plot_comparison, plot_depth
from dimension.profile import IDProfile, load_kinds
from tests.runs import ids, outputs_of
from tests.test_model_classes import LENGTH, T5, assert_ids, far_apart, in_batches, texts
from utils import UserError

N = 45
TRACES = 3  # forwards before the first pass and after the last; with texts more


def t5(kind=transformers.T5Model):
    """With two masks of the same shape."""
    model = kind(transformers.T5Config(**T5))
    return model, texts() | texts(prefix="decoder_")


def t5_with_labels():
    """Labels without a mask: of the decoder's tokens all count."""
    model, inputs = t5(transformers.T5ForConditionalGeneration)
    del inputs["decoder_attention_mask"]
    return model, inputs | {"labels": inputs.pop("decoder_input_ids")}


def hooked(model, batches):
    """Outputs (n, L, D) of all linear layers."""
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    outputs = outputs_of(layers, lambda: [model.eval()(**batch) for batch in batches])
    joined = {name: torch.cat(parts) for name, parts in outputs.items()}
    return {name: x if x.dim() > 2 else x[:, None] for name, x in joined.items()}


def left_out(profile):
    return "\n".join(remark for remark in profile.remarks if remark.startswith("left out"))


@pytest.mark.parametrize("make", [t5, t5_with_labels])
def test_padding_counts_as_zero_and_a_decoder_has_its_own_mask(make):
    model, inputs = make()
    far_apart(model)
    outputs = hooked(model, in_batches(inputs, 8))
    for name in outputs:
        if name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            outputs[name] *= inputs["attention_mask"][..., None]
        elif name.startswith("decoder") and "decoder_attention_mask" in inputs:
            outputs[name] *= inputs["decoder_attention_mask"][..., None]
    assert_ids(measure(model, in_batches(inputs, 8)), outputs)


class Chain(nn.Sequential):
    """Five linear layers of the same size over tokens."""

    def __init__(self):
        super().__init__(*(nn.Linear(16, 16) for _ in range(5)))

    def forward(self, x, scale=None):
        return super().forward(x)


def chain_inputs():
    return list(torch.randn(N, 6, 16).split(8))


def room(layers):
    """GB for the outputs of so many layers of these inputs."""
    return layers * 6 * 16 * (N + 1) * 4 / 1e9


def test_passes_and_where_they_stop(small_segments, capsys):
    """Room for two of five layers: three passes, that call 1, 3 and 5 layers."""
    model, batches = Chain(), chain_inputs()
    steps = dict(model.named_children())
    calls = outputs_of(steps, lambda: measure(model, batches, memory_gb=room(2)))
    expected = [TRACES + len(batches) * passes for passes in (3, 2, 2, 1, 1)]
    assert [len(outputs) for outputs in calls.values()] == expected
    out = capsys.readouterr().out
    assert "45 samples, 5 layers" in out
    assert "forward work 1.80 plain forwards" in out  # (5 + 3 + 1) / 5


class Calls(nn.Module):
    """What a function of the model and its inputs gives, with linear layers of some names."""

    def __init__(self, function, layers=""):
        super().__init__()
        self.function = function
        for name in layers.split():
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, *args, **inputs):
        return self.function(self, *args, **inputs)


def twice(model, x):
    """Calls one layer for the input and, in the end, for its first four tokens."""
    return model.shared(torch.tanh(model.between(model.shared(x)))[:, :4])


@pytest.mark.parametrize("layers, passes", [(10, 1), (1, 3)])
def test_calls_of_one_layer_are_one_representation(small_segments, layers, passes):
    model, batches = Calls(twice, "shared between"), chain_inputs()
    calls = outputs_of({"shared": model.shared}, lambda: model(torch.cat(batches)))["shared"]
    outputs = {"shared": torch.cat(calls, 1), "between": model.between(calls[0])}
    runs = []
    model.register_forward_pre_hook(lambda module, args: runs.append(1))
    profile = measure(model, batches, memory_gb=room(layers))
    assert len(runs) == TRACES + len(batches) * passes
    assert_ids(profile, outputs)
    assert profile.layers["shared"].features == (6 + 4) * 16
    assert list(profile.layers) == ["between", "shared"]  # in the order of their last calls


FORMS = {
    "tuple": lambda model, x: (None, x, -x),
    "dataclass": lambda model, x: make_dataclass("Answer", ["label", "states"])("x", (x, -x)),
    "mapping": lambda model, x: {"states": x},
    "rows of tokens": lambda model, x: x.flatten(0, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_representation_is_the_first_tensor_with_rows_for_each_sample(form):
    model = nn.Sequential(nn.Linear(16, 16), Calls(FORMS[form]))
    profile = measure(model, chain_inputs(), layers=["0", "1"])
    assert profile.layers["0"] == profile.layers["1"]


def odd(model, x, prompt):
    """Calls layers whose outputs are no representations of samples, and not the unused one."""
    for layer in (model.total, model.index, model.nothing):
        layer(x)
    model.table(x[0, :5])
    model.prompt(prompt)
    return model.line(x)


def test_layers_without_representations_are_named():
    prompts = torch.randn(3, 16)[torch.arange(N) % 3]
    batches = list(zip(chain_inputs(), prompts.split(8), strict=True))
    model = Calls(odd, "line table prompt unused")
    model.total = Calls(lambda layer, x: x.sum((1, 2)))
    model.index = Calls(lambda layer, x: x.argmax(-1))
    model.nothing = Calls(lambda layer, x: None)
    profile = measure(model, batches, layers=["*", "total", "index", "nothing"])
    assert list(profile.layers) == ["line"]
    for sentence in (
        "total: its output (2,) has fewer than two dimensions",
        "index: its output is of int64",
        "nothing: its output holds no tensor",
        "table: its output (5, 16) does not divide into 2 samples",
        "unused: no call in the first batch",
        "layer prompt: 0 of 45 samples have two neighbours at different distances (45 are dupl",
    ):
        assert sentence in left_out(profile)
    for layer, reason in (("unused", "unused: no call"), ("prompt", "layer prompt: 0 of 45")):
        with pytest.raises(UserError, match=f"no layer is left to measure.*{reason}"):
            measure(model, batches, layers=layer)


def tokens_first(model, x):
    """Between two that do not, it works in (L, B, D), as XLNet and torch's attention do."""
    y = model.inside(x.transpose(0, 1))
    return model.attention(y, y, y)[0].transpose(0, 1)


def experts(model, x):
    """The layer between takes half of all tokens, whosever they are."""
    tokens = model.attention.out_proj(x.flatten(0, 1))
    model.inside(tokens[tokens.sum(1).topk(len(tokens) // 2).indices])
    return x


def remembers(model, x):
    """The layer between sees what it gave in the call before, too."""
    model.state = model.inside(x + model.state).detach()[:1]
    model.attention.out_proj(x + model.state)
    return x


def drifts(model, x):
    """The layer between sees how often the model ran, from the sixth time on."""
    model.state += 1
    inside = model.inside(x + max(0.0, model.state - 5))
    model.attention.out_proj(inside)
    return x


def mixing(way):
    """Two layers that see samples, and what some `way` does between them."""
    model = Calls(lambda model, x: model.after(way(model, model.before(x))), "before inside after")
    model.attention, model.state = nn.MultiheadAttention(16, 2), 0.0
    return model


@pytest.mark.parametrize("way", [tokens_first, experts, remembers, drifts])
@pytest.mark.parametrize("tokens, size", [(8, 8), (16, 8), (2, 2), (6, 8)])
def test_rows_that_are_no_samples_are_left_out(way, tokens, size):
    """Also where they are as many as samples, or a multiple: a sample's row depends on others."""
    profile = measure(mixing(way), torch.randn(N, tokens, 16).split(size))
    assert list(profile.layers) == ["before", "after"]
    assert "inside" in left_out(profile)
    if way is tokens_first and size == 8:
        assert "its rows are not the samples" in left_out(profile)
        assert "give batches of one sample" in left_out(profile)


def test_every_row_of_a_batch_of_one_sample_is_its_own(small_segments):
    model, x = mixing(tokens_first).eval(), torch.randn(N, 16, 16)
    assert list(measure(mixing(drifts), x.split(1)).layers) == ["before", "after"]
    profile = measure(model, x.split(1))
    assert_ids(profile, {"inside": model.inside(model.before(x))})
    assert list(profile.layers) == ["before", "inside", "attention.out_proj", "after"]


def test_batches_must_stay_the_same(small_segments):
    loader = DataLoader(torch.randn(N, 6, 16), batch_size=8, shuffle=True)
    measure(Chain(), loader)  # one pass
    with pytest.raises(UserError, match="batch 0 is not what it was in the first pass"):
        measure(Chain(), loader, memory_gb=room(2))


@pytest.mark.parametrize(
    "batches, message",
    [
        (torch.randn(N, 6, 16), "a Tensor is one batch; give a list"),
        ({"x": torch.randn(N, 6, 16)}, "a dict is one batch"),
        ([], "there are none"),
        (iter(torch.randn(N, 6, 16).split(8)), "a generator is read only once"),
        (["text"], "str is no batch"),
        ([torch.zeros(0, 16)] * 4, "Tensor is no batch"),
        ([torch.randn(4, 6, 16), torch.randn(41, 6, 16)], "batch 1 has 41 samples and the first"),
        ([torch.randn(9, 6, 16).to_sparse()] * 5, "a tensor is sparse"),
        ([torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])] * 5, "sparse or nested"),
        ([(torch.randn(6, 9, 16), torch.randn(5, 9, 16))] * 5, r"here are \(6, 9, 16\), \(5, 9"),
        # of pictures and labels
        ([(torch.randn(9, 6, 16), torch.randn(9), torch.zeros(9))] * 5, "does not take 2 of"),
        ([torch.randn(2, 6, 16)], "an ID needs 3 samples at least, not 2"),
    ],
)
def test_what_is_no_list_of_batches(batches, message):
    with pytest.raises(UserError, match=message):
        measure(Chain(), batches)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (Chain(), {"n": 0}, "an ID needs 3 samples at least, not 0"),
        (Chain(), {"fraction": 0.0}, "fraction 0.0 is not in"),
        (Chain(), {"fraction": float("nan")}, "fraction nan is not in"),
        (Chain(), {"layers": "head.*"}, "'head.*' fits no layer, such as 0, 1"),
        (Chain(), {"memory_gb": 1e-6}, r"--memory_gb 1e-06 is too little: .* needs \d+\.\d+ GB"),
        (Chain().to("meta"), {}, "does not take 2 of the first"),
        (nn.Sequential(nn.Tanh()), {}, "it has no linear layer"),
        (torch.jit.trace(nn.Linear(16, 8), torch.ones(8, 16)), {}, "TorchScript"),
    ],
)
def test_models_that_show_no_layers_and_arguments_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        measure(model, chain_inputs(), **options)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: [(part, None) for part in x.split(8)],
        lambda x: [[part] for part in x.split(8)],
        lambda x: [{"x": part, "scale": 2} for part in x.split(8)],
        lambda x: DataLoader(x, batch_size=8),
    ],
)
def test_batches_of_any_usual_form(form):
    model, x = Chain(), torch.randn(N, 6, 16)
    profile = measure(model, form(x), n=30)
    assert profile.settings["nsamples"] == 30
    assert profile.layers == measure(model, list(x[:30].split(8))).layers


def alike(model, attention_mask, features, input_ids=None, boxes=None, inputs_embeds=None):
    """Sees words, regions of an image and learnt queries, eight of each, that all see the words."""
    assert attention_mask.shape[1] in model.lengths
    embedded = model.table(input_ids) if inputs_embeds is None else inputs_embeds
    words = model.words(embedded if boxes is None else embedded + boxes.repeat(1, 1, 4))
    mean = (words * attention_mask[..., None]).mean(1, keepdim=True)
    model.regions(features + mean)
    model.ask(model.asked)  # a learned query, which no sample changes
    model.queries(model.asked + mean)


def alike_model(lengths=range(LENGTH + 1)):
    model = Calls(alike, "words regions queries ask")
    model.table, model.asked = nn.Embedding(40, 16), nn.Parameter(torch.randn(1, LENGTH, 16))
    model.lengths, inputs = lengths, texts()
    return model, inputs | {"features": torch.randn(*inputs["input_ids"].shape, 16)}


@pytest.mark.parametrize("form", ["ids", "boxes", "embedded"])
@pytest.mark.parametrize("size", [8, 1])
def test_only_what_is_as_long_as_the_texts_has_their_padding(form, size, small_segments):
    model, inputs = alike_model()
    if form == "boxes":
        inputs["boxes"] = torch.randint(0, 9, (*inputs["input_ids"].shape, 4))
    if form == "embedded":
        inputs["inputs_embeds"] = model.table(inputs.pop("input_ids")).detach()
    batches = in_batches(inputs, size)
    outputs = hooked(model, batches)
    del outputs["ask"]
    outputs["words"] *= inputs["attention_mask"][..., None]
    assert_ids(measure(model, batches, ["words", "regions", "queries"]), outputs)
    if size == 8:
        assert "ask: its output (1, 8, 16) does not divide" in left_out(measure(model, batches))


def test_a_model_of_one_length_of_texts_is_masked_by_length(small_segments):
    model, inputs = alike_model(lengths=[LENGTH])
    profile = measure(model, [inputs], ["words", "regions"])
    outputs = hooked(model, [inputs])
    assert_ids(profile, {k: outputs[k] * inputs["attention_mask"][..., None] for k in ids(profile)})
    assert any("not take shorter texts" in x for x in profile.remarks)


def uneven(model, picture, words):
    """Calls a layer for pictures, one for words but of nine, one twice in small batches."""
    for _ in range(1 + (len(words) == 5)):
        model.again(picture)
    if words.shape[1] < 9:
        model.word(words)
    return model.picture(picture)


@pytest.mark.parametrize(
    "length, message",
    [
        (6, "word: its output has (6, 16) values a sample in batch 2 and (4"),
        (9, "word: called 0 times in batch 2, 1 in the first"),
    ],
)
@pytest.mark.parametrize("layers", [10, 1])
def test_layers_that_differ_between_batches_are_left_out(small_segments, length, message, layers):
    words = [torch.randn(8, n, 16) for n in (4, 4, length, 4, 4)] + [torch.randn(5, 4, 16)]
    batches = list(zip(chain_inputs(), words, strict=True))
    profile = measure(
        Calls(uneven, "picture word again"), batches, memory_gb=room(layers)
    )  # of one pass, or of several
    assert list(profile.layers) == ["picture"]
    assert message in left_out(profile)
    assert "again: called 2 times in batch 5, 1 in the first" in left_out(profile)


def test_a_model_that_draws_gives_the_same_in_each_pass_and_run(small_segments):
    model, batches = Chain(), chain_inputs()
    model.register_forward_pre_hook(lambda model, x: (x[0] + torch.randn_like(x[0]),))
    before = torch.get_rng_state()
    once = measure(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert measure(model, batches, memory_gb=room(2)).layers == once.layers
    other = ids(measure(model, batches, seed=1))
    assert all(abs(other[name] / dimension - 1) > 1e-3 for name, dimension in ids(once).items())
    repeated = measure(model, [batches[0]] * 5)  # what is drawn differs between batches
    assert all(layer.duplicates == 0 for layer in repeated.layers.values())


def test_modes_gradients_and_hooks_are_restored_also_after_values_that_are_not_finite():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[2].weight.data[0, 0] = float("nan")

    def state():
        modes = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        learned = [parameter.requires_grad for parameter in model.parameters()]
        return modes, learned, torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()

    before = state()
    measure(model, chain_inputs(), layers="0")
    assert state() == before
    with pytest.raises(UserError, match="layer 2: values are NaN, infinite"):
        measure(model, chain_inputs())
    assert state() == before


def test_layers_are_linear_ones_or_those_named():
    script = torch.jit.trace(nn.Linear(16, 16), torch.ones(8, 16))
    quantised = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), Conv1D(16, 16), script, quantised)
    assert list(choose_layers(model)) == ["0", "1"]
    remarks = measure(model, chain_inputs()).remarks
    assert "not looked at: 2: TorchScript shows no layer's output" in remarks
    assert "not looked at: 3: quantised layers are no nn.Linear" in remarks
    assert list(choose_layers(model, "[1-9]")) == ["1"]
    assert list(choose_layers(model, ["", "2"])) == ["", "2"]


def test_attention_stands_for_its_out_proj():
    """torch's encoder, whose fused form would call no layer, and never calls out_proj."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(N, 6, 16)
    profile = measure(model, x.split(8))
    name, *others = [f"layers.0.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")]
    assert list(profile.layers) == [name, *others]
    assert_ids(profile, {name: model.layers[0].self_attn(x, x, x)[0]})


def test_files_and_figures_know_the_kind_of_foreign_layers(tmp_path):
    profile = measure(Chain(), chain_inputs())
    profile.write(tmp_path)
    assert IDProfile.read(tmp_path) == profile
    assert load_kinds(tmp_path) == dict.fromkeys(profile.layers, "other")
    assert load_kinds("configs/id/blip_coco.json") == {}
    assert [x.get_label() for x in plot_depth(profile).axes[0].containers] == ["other"]
    both = {"ours": {"visual_encoder.blocks.0.attn.qkv": 5.0}, "theirs": ids(profile)}
    lines = plot_comparison(both, {"theirs": profile.kinds()}).axes[0].lines
    assert {"vision", "language", "other"} <= {line.get_label() for line in lines}
