"""IDs of models that are not ours, against plain hooks and the block analysis."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

import dimension.budget as planning
from dimension import measure
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
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
WIDTH |= {"num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}


def texts(vocabulary=40, longest=9):
    """Token ids and mask, (N, longest), of texts of five to nine tokens."""
    lengths = torch.randint(5, longest + 1, (N, 1))
    mask = (torch.arange(longest) < lengths).long()
    return torch.randint(3, vocabulary, mask.shape) * mask, mask


def pixels():
    return torch.randn(N, 3, 16, 16)


def clip():
    text = WIDTH | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39}
    config = transformers.CLIPConfig(text_config=text, vision_config=WIDTH | IMAGES)
    ids, mask = texts(vocabulary=39)
    ids[torch.arange(N), mask.sum(1) - 1] = 39
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels()}
    return transformers.CLIPModel(config), inputs


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


def t5(given="decoder_input_ids"):
    """Padded texts and whole ones of the same length, or labels, for the decoder."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=40, decoder_start_token_id=0)
    ids, mask = texts()
    inputs = {"input_ids": ids, "attention_mask": mask, given: torch.randint(3, 40, ids.shape)}
    kind = transformers.T5ForConditionalGeneration if given == "labels" else transformers.T5Model
    return kind(config), inputs


def t5_with_labels():
    return t5("labels")


FOREIGN = {kind.__name__: kind for kind in (clip, llava, vit, bert, t5, t5_with_labels)}


def foreign(kind):
    """A model with weights so large that samples differ in all layers, and its inputs."""
    model, inputs = FOREIGN[kind]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, inputs


def in_batches(inputs, size=8):
    """Mappings, as processors return them."""
    return [{k: x[i : i + size] for k, x in inputs.items()} for i in range(0, N, size)]


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
    joined = {
        name: torch.cat([x if x.dim() > 2 else x[:, None] for x in kept[name]]) for name in kept
    }
    for name, x in joined.items():
        of_decoder = name.startswith(("decoder", "lm_head")) and "EncDecAttention.k" not in name
        of_decoder &= "EncDecAttention.v" not in name
        if mask is not None and x.shape[1] == mask.shape[1] and not of_decoder:
            joined[name] = x if "vision" in name else x * mask[..., None]
    return joined


def expected_ids(outputs):
    permutations = block_permutations(N, 0)
    return {
        name: measure_layer(name, 0, pairwise_distances(x.flatten(1)), 1.0, permutations).id
        for name, x in outputs.items()
    }


def ids(profile):
    return {name: layer.id for name, layer in profile.layers.items()}


def left_out(profile):
    return "\n".join(remark for remark in profile.remarks if remark.startswith("left out"))


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
def test_equals_plain_hooks(kind, nothing_fixed):
    """The padding of a mask counts as zero where outputs have it; a decoder has its own texts."""
    model, inputs = foreign(kind)
    outputs = hooked(model, in_batches(inputs), inputs.get("attention_mask"))
    profile = measure(model, in_batches(inputs), memory_gb=1)
    assert ids(profile) == pytest.approx(expected_ids(outputs), rel=PROMISED)
    features = {name: x[0].numel() for name, x in outputs.items()}
    assert {name: layer.features for name, layer in profile.layers.items()} == features


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_any_budget_gives_the_same_bits(kind, nothing_fixed):
    """In about as many passes as the budget's share of all outputs makes necessary."""
    model, inputs = foreign(kind)
    batches = in_batches(inputs)
    whole = measure(model, batches, memory_gb=1)
    room = sum(16 * -(-layer.features // 16) for layer in whole.layers.values())
    runs = count_passes(model)
    parts = measure(model, batches, memory_gb=0.3 * (N + 1) * room * 4 / GB)
    assert parts.layers == whole.layers
    assert 4 <= (len(runs) - TRACES - 1) / len(batches) <= 6


def test_the_decoders_own_padding(nothing_fixed):
    model, inputs = foreign("t5")
    mask = inputs["attention_mask"].flip(0)
    profile = measure(model, in_batches(inputs | {"decoder_attention_mask": mask}))
    batches = in_batches(inputs | {"decoder_attention_mask": mask})
    name = "decoder.block.0.layer.0.SelfAttention.q"
    outputs = hooked(model, batches)[name] * mask[..., None]
    assert ids(profile)[name] == pytest.approx(expected_ids({name: outputs})[name], rel=PROMISED)


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
    """Room for two of five layers: three passes, that call 1, 3 and 5 layers."""
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
    with pytest.raises(UserError, match=r"--memory_gb 1e-06 is too little: the model needs"):
        measure(model, batches, memory_gb=1e-6)


def test_a_layer_that_never_runs_is_named():
    profile = measure(Chain(), chain_inputs())
    assert left_out(profile) == "left out: unused: no call in the first batch"
    with pytest.raises(UserError, match="no layer is left.*unused: no call"):
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
    outputs = {"shared": torch.cat([once, again], 1), "between": between}
    assert ids(profile) == pytest.approx(expected_ids(outputs), rel=PROMISED)
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
    profile = measure(model, chain_inputs(), layers=["0", "1"])
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
    text = left_out(profile)
    assert "total: its output (2,) has fewer than two dimensions" in text
    assert "index: its output is of int64" in text
    assert "nothing: its output holds no tensor" in text
    assert "table: its output (5, 16) does not divide into 2 samples" in text


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
    assert message in left_out(profile)
    with pytest.raises(UserError, match="no layer is left to measure.*layer prompt: 0 of 45"):
        measure(Gate(), batches, layers="prompt")


def test_arguments_out_of_range():
    for n in (0, 2):
        with pytest.raises(UserError, match=f"an ID needs 3 samples at least, not {n}"):
            measure(Chain(), chain_inputs(), n=n)
    with pytest.raises(UserError, match="an ID needs 3 samples at least, not 2"):
        measure(Chain(), [torch.randn(2, 6, 16)])
    for fraction in (0.0, 2.0, float("nan")):
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


class TokensFirst(nn.Module):
    """Works in (L, B, D), as XLNet and torch's attention by default, between two that do not."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.after = (nn.Linear(16, 16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        x = self.inside(self.before(x).transpose(0, 1))
        return self.after(self.attention(x, x, x)[0].transpose(0, 1))


class TokensOfAll(TokensFirst):
    """Its rows are the tokens of all samples, tokens first."""

    def forward(self, x):
        y = self.inside(self.before(x).transpose(0, 1).flatten(0, 1))
        self.attention.out_proj(y)  # called by itself, but what stands for it is not
        return self.after(y.unflatten(0, x.shape[1::-1]).transpose(0, 1))


class Experts(TokensFirst):
    """The layer between takes half of all tokens, whosever they are."""

    def forward(self, x):
        tokens = self.before(x).flatten(0, 1)
        chosen = tokens.sum(1).topk(len(tokens) // 2).indices
        self.inside(tokens[chosen])
        self.attention.out_proj(tokens)
        return self.after(x)


class Remembers(TokensFirst):
    """The layer between sees what it gave in the call before, too."""

    state = 0.0

    def forward(self, x):
        y = self.inside(self.before(x) + self.state)
        self.state = y.detach()[:1]
        self.attention.out_proj(y)
        return self.after(x)


@pytest.mark.parametrize("kind", [TokensFirst, TokensOfAll, Experts, Remembers])
@pytest.mark.parametrize("tokens, size", [(8, 8), (16, 8), (2, 2), (6, 8)])
def test_rows_that_are_no_samples_are_left_out(kind, tokens, size):
    """Also where they are as many as samples, or a multiple: a sample's row depends on others."""
    profile = measure(kind(), torch.randn(N, tokens, 16).split(size))
    assert list(profile.layers) == ["before", "after"]
    assert "inside" in left_out(profile)
    if kind is TokensFirst and size == 8:
        assert "its rows are not the samples" in left_out(profile)
        assert "give batches of one sample" in left_out(profile)


def test_every_row_of_a_batch_of_one_sample_is_its_own(nothing_fixed):
    model, x = TokensFirst().eval(), torch.randn(N, 16, 16)
    profile = measure(model, x.split(1))
    with torch.no_grad():
        inside = model.inside(model.before(x))
    expected = expected_ids({"inside": inside})["inside"]
    assert profile.layers["inside"].id == pytest.approx(expected, rel=PROMISED)
    assert list(profile.layers) == ["before", "inside", "attention.out_proj", "after"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value):
    model = Chain()
    model.steps[2].weight.data[3, 3] = value
    with pytest.raises(UserError, match="layer steps.2: values are NaN, infinite"):
        measure(model, chain_inputs())


def test_batches_must_stay_the_same(nothing_fixed):
    loader = DataLoader(torch.randn(N, 6, 16), batch_size=8, shuffle=True)
    measure(Chain(), loader)  # one pass
    with pytest.raises(UserError, match="batch 0 is not what it was in the first pass"):
        measure(Chain(), loader, memory_gb=layer_bytes(2) / GB)

    class Shrinking:
        batches, iterations = chain_inputs(), 0

        def __iter__(self):
            self.iterations += 1  # the first one is for the first batch alone
            return iter(self.batches[: 5 if self.iterations == 3 else 6])

    with pytest.raises(UserError, match="45 samples in the first pass and now 40"):
        measure(Chain(), Shrinking(), n=N, memory_gb=layer_bytes(2) / GB)


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
        ([(torch.randn(6, 9, 16), torch.randn(5, 9, 16))] * 5, r"here are \(6, 9, 16\), \(5, 9"),
        ([(torch.randn(9, 6, 16), torch.randn(9), torch.zeros(9))] * 5, "does not take 2 of"),
    ],
)
def test_what_is_no_list_of_batches(batches, message):
    """The last is what a data set of pictures and labels gives."""
    with pytest.raises(UserError, match=message):
        measure(Chain(), batches)


def test_models_that_show_no_layers():
    batches = list(torch.randn(N, 16).split(8))
    for model, message in (
        (nn.Linear(16, 8).to("meta"), "does not take 2 of the first"),
        (nn.Sequential(nn.Tanh()), "it has no linear layer"),
        (torch.jit.trace(nn.Linear(16, 8), batches[0]), "TorchScript"),
    ):
        with pytest.raises(UserError, match=message):
            measure(model, batches)


@pytest.mark.parametrize("forms", ["tuple", "list", "mapping", "loader"])
def test_batches_of_any_usual_form(forms):
    model, x = Chain(), torch.randn(N, 6, 16)
    parts = x.split(8)
    batches = {
        "tuple": [(part, None) for part in parts],
        "list": [[part] for part in parts],
        "mapping": [{"x": part, "scale": 2} for part in parts],
        "loader": DataLoader(x, batch_size=8),
    }[forms]
    profile = measure(model, batches, n=30)
    assert profile.settings["nsamples"] == 30
    assert profile.layers == measure(model, list(x[:30].split(8))).layers


class Alike(nn.Module):
    """Words, regions of an image and learnt queries, all nine of them, that see the words."""

    def __init__(self):
        super().__init__()
        self.table, self.asked = nn.Embedding(40, 16), nn.Parameter(torch.randn(1, 9, 16))
        self.words, self.regions, self.queries = (nn.Linear(16, 16) for _ in range(3))
        self.ask = nn.Linear(16, 16)

    def forward(self, attention_mask, features, input_ids=None, boxes=None, inputs_embeds=None):
        embedded = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        words = self.words(embedded if boxes is None else embedded + boxes.repeat(1, 1, 4))
        mean = (words * attention_mask[..., None]).mean(1, keepdim=True)
        self.regions(features + mean)
        self.ask(self.asked)  # a learned query, which no sample changes
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
    batches = in_batches(inputs, size)
    outputs = {k: x for k, x in hooked(model, batches).items() if k != "ask"}
    outputs["words"] = outputs["words"] * mask[..., None]
    layers = ["words", "regions", "queries"]
    assert ids(measure(model, batches, layers)) == pytest.approx(
        expected_ids(outputs), rel=PROMISED
    )
    if size == 8:
        assert "ask: its output (1, 9, 16) does not divide" in left_out(measure(model, batches))


def test_a_model_of_one_length_of_texts_is_masked_by_length(nothing_fixed):
    class OneLength(Alike):
        def forward(self, attention_mask, **inputs):
            assert attention_mask.shape[1] == 9, "nine words"
            super().forward(attention_mask, **inputs)

    model, (tokens, mask) = OneLength(), texts()
    batch = {"attention_mask": mask, "features": torch.randn(N, 9, 16), "input_ids": tokens}
    profile = measure(model, [batch], ["words", "regions"])
    masked = {name: x * mask[..., None] for name, x in hooked(model, [batch]).items()}
    expected = expected_ids({name: masked[name] for name in profile.layers})
    assert ids(profile) == pytest.approx(expected, rel=PROMISED)
    assert any("not take shorter texts" in x for x in profile.remarks)


def test_layers_that_differ_between_batches_are_left_out(nothing_fixed):
    """In several passes, too: texts of another length, layers that stop or are called more."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.picture, self.word, self.again = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, picture, words):
            for _ in range(1 + (len(words) == 5)):
                self.again(picture)
            if words.shape[1] < 9:
                self.word(words)
            return self.picture(picture)

    model, picture = Two(), torch.randn(N, 6, 16)
    for lengths, message in (
        ([4, 4, 6, 4, 4, 4], r"word: its output has \(6, 16\) values a sample in batch 2 and \(4"),
        ([4, 4, 9, 4, 4, 4], "word: called 0 times in batch 2, 1 in the first"),
    ):
        words = [torch.randn(len(x), n, 16) for n, x in zip(lengths, picture.split(8), strict=True)]
        batches = list(zip(picture.split(8), words, strict=True))
        for budget in (1, layer_bytes(1) / GB):
            profile = measure(model, batches, memory_gb=budget)
            assert list(profile.layers) == ["picture"]
            assert message.replace("\\", "") in left_out(profile).replace("\\", "")
            assert "again: called 2 times in batch 5, 1 in the first" in left_out(profile)
    alone = measure(model, batches, layers="picture")
    assert alone.layers == profile.layers


class Noisy(Chain):
    """Draws in eval mode, too."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_a_model_that_draws_gives_the_same_in_each_pass_and_run(nothing_fixed):
    model, batches = Noisy(), chain_inputs()
    before = torch.get_rng_state()
    once = measure(model, batches)
    assert torch.equal(torch.get_rng_state(), before) and len(once.layers) == 5
    torch.rand(7)
    thrice = measure(model, batches, memory_gb=layer_bytes(2) / GB)
    assert thrice.layers == once.layers
    other = measure(model, batches, seed=1)
    assert all(abs(ids(other)[name] / ids(once)[name] - 1) > 1e-3 for name in ids(once))
    repeated = measure(model, [batches[0]] * 5)  # what is drawn differs between batches
    assert all(layer.duplicates == 0 for layer in repeated.layers.values())


def test_modes_gradients_and_hooks_are_restored():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[2].weight.data[0, 0] = float("nan")
    modes = [module.training for module in model.modules()]
    learned = [parameter.requires_grad for parameter in model.parameters()]
    for layers in ("0", "*"):
        with pytest.raises(UserError) if layers == "*" else nullcontext():
            measure(model, chain_inputs(), layers=layers)
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == learned
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
        assert not model[0]._forward_hooks and not model[2]._forward_hooks
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
    model, batches = nn.TransformerEncoder(layer, 1), chain_inputs()
    profile = measure(model, batches)
    names = ["self_attn.out_proj", "linear1", "linear2"]
    assert list(profile.layers) == [f"layers.0.{name}" for name in names]
    with torch.no_grad():
        x = torch.cat(batches)
        attended = model.layers[0].eval().self_attn(x, x, x)[0]
    name = "layers.0.self_attn.out_proj"
    expected = expected_ids({name: attended})[name]
    assert profile.layers[name].id == pytest.approx(expected, rel=PROMISED)


def test_prunes_a_model_that_is_not_ours():
    """Measured IDs weight the scores of `Pruner` by name; layers of high ID keep more."""
    model, inputs = foreign("bert")
    profile = measure(model, in_batches(inputs), layers="encoder.*")
    layer_id = ids(profile)
    highest = max(layer_id, key=layer_id.get)
    schedule = {"total_steps": 4, "delta_t": 1, "final_threshold": 0.5}
    schedule |= {"initial_warmup": 0, "final_warmup": 1, "warmup_steps": 1}
    remaining = {}
    for weights in (None, layer_id | {highest: 1e9}):
        copy = deepcopy(model)
        names = list(profile.layers)
        pruner = Pruner(copy, layers=names, method="Magnitude", **schedule, layer_id=weights)
        for step in range(1, 5):
            pruner.step(step)
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
