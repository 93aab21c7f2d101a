"""Beam search over BLIP's text decoder, by the rule of the published captions.

The beams of an image are query positions of one sequence over one cache of past tokens. A mask
shows a beam its own ancestors only; when beams fork or die, only the mask is reordered. So the
prompt's and the image's keys and values are computed and kept once for an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def generate_ids(
    decoder, embeds, prompt_ids, num_beams, max_length, min_length, eos_id, pad_id, rule="total"
) -> Tensor:
    """Captions a batch of images by beam search.

    Args:
        decoder: a BlipTextLMHeadModel in eval mode.
        embeds: (B, L, D) image tokens.
        prompt_ids: (B, P), the start of every caption.
        num_beams: 1 is greedy decoding.
        max_length: longest caption in tokens, prompt included; more than P.
        min_length: no end token before this length in tokens, prompt included.
        eos_id: end token.
        pad_id: fills the rows of shorter captions.
        rule: "total" or "generated", see `BeamSearch`.

    Returns:
        (B, <= max_length) ids: prompt, caption, end token unless max_length cut it off, padding.
    """
    batch, prompt_length = prompt_ids.shape
    device = prompt_ids.device
    search = BeamSearch(prompt_ids, num_beams, max_length, eos_id, pad_id, rule)
    capacity = prompt_length + num_beams * (max_length - prompt_length)
    cached = CachedDecoder(decoder, embeds, capacity)
    images = torch.arange(batch, device=device)[:, None]
    itself = torch.eye(num_beams, dtype=torch.bool, device=device).expand(batch, -1, -1)

    causal = torch.ones(batch, prompt_length, prompt_length, dtype=torch.bool, device=device).tril()
    hidden = cached.feed(prompt_ids, torch.arange(prompt_length, device=device), causal)
    hidden, visible = hidden[:, -1:], causal[:, -1:]  # the prompt's end is the first, only beam
    for length in range(prompt_length, max_length):
        log_probs = cached.log_probabilities(hidden)  # (B, beams, V)
        if length < min_length:
            log_probs[..., eos_id] = -torch.inf
        parent, token = search.advance(log_probs, length)
        if search.done.all() or length + 1 == max_length:
            break
        visible = torch.cat([visible[images, parent], itself], dim=-1)
        hidden = cached.feed(token, torch.tensor([length], device=device), visible)
    return search.best_captions()


class BeamSearch:
    """The hypotheses of a batch of images; arguments as in `generate_ids`.

    A hypothesis's score is the mean of its log-probabilities. The published rule divides by all
    tokens, prompt included and end token excluded ("total"); today's transformers divides by the
    generated tokens, end token included, which prefers longer captions ("generated").

    A step takes an image's best 2 * num_beams continuations in order. Those of the first num_beams
    that end are finished; the first num_beams that do not end run on. An image is done when it has
    num_beams finished hypotheses, the worst of them as good as a bound: the best continuation over
    the length before it ("total"), or the best running beam over the length after it ("generated").
    At max_length running beams finish too.
    """

    def __init__(self, prompt_ids, num_beams, max_length, eos_id, pad_id, rule):
        batch, self.prompt_length = prompt_ids.shape
        self.num_beams, self.max_length = num_beams, max_length
        self.eos_id, self.pad_id, self.total = eos_id, pad_id, rule == "total"
        padding = max_length - self.prompt_length
        self.tokens = F.pad(prompt_ids, (0, padding), value=pad_id)[:, None]  # (B, beams, length)
        self.sums = torch.zeros(batch, 1, device=prompt_ids.device)  # log-probabilities, (B, beams)
        self.captions = self.tokens[:, 0].clone()  # (B, length), the best finished hypothesis
        self.scores = self.sums.new_full((batch, num_beams), -torch.inf)  # of finished, descending
        self.done = torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device)

    def advance(self, log_probs: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Continues beams of `length` tokens by one, given its log-probabilities (B, beams, V).

        Returns the parent beam and the last token of each new beam, best first; (B, num_beams).
        """
        images = torch.arange(len(log_probs), device=log_probs.device)[:, None]
        sums = (self.sums[..., None] + log_probs).flatten(1)
        sums, index = sums.topk(2 * self.num_beams)  # (B, 2 * num_beams), descending
        parent, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
        tokens = self.tokens[images, parent]
        tokens[:, :, length] = token
        ends = token == self.eos_id
        divisor = length if self.total else length + 1 - self.prompt_length
        self._finish((sums / divisor).masked_fill(~ends, -torch.inf)[:, : self.num_beams], tokens)

        running = ends.int().argsort(dim=1, stable=True)[:, : self.num_beams]
        self.sums, self.tokens = sums[images, running], tokens[images, running]
        bound = sums[:, 0] if self.total else self.sums[:, 0]
        self.done |= self.scores[:, -1] >= bound / divisor
        return parent[images, running], token[images, running]

    def best_captions(self) -> Tensor:
        """(B, <= max_length) ids of the best hypotheses; call it once, at the end."""
        divisor = self.max_length if self.total else self.max_length - self.prompt_length
        self._finish(self.sums / divisor, self.tokens)
        used = (self.captions != self.pad_id).any(dim=0).nonzero()
        return self.captions[:, : used.max() + 1]

    def _finish(self, scores: Tensor, tokens: Tensor) -> None:
        """Adds hypotheses (B, n, max_length) of images not done; a score of -inf adds none."""
        scores = scores.masked_fill(self.done[:, None], -torch.inf)
        best, place = scores.max(dim=1, keepdim=True)
        tokens = tokens.gather(1, place[..., None].expand(-1, -1, self.max_length))[:, 0]
        self.captions = torch.where(best > self.scores[:, :1], tokens, self.captions)
        self.scores = torch.cat([self.scores, scores], dim=1).topk(self.num_beams).values


class CachedDecoder:
    """The text decoder over a batch of images, fed a few tokens at a time.

    It runs the layers itself: the library would copy the image's keys and values for each beam.
    """

    def __init__(self, decoder: nn.Module, image_embeds: Tensor, capacity: int):
        """Projects keys and values of image tokens (B, L, D); makes room for `capacity` tokens."""
        self.decoder = decoder
        self.caches, self.image_caches = [], []  # keys and values of a layer, (B, heads, ., d)
        for layer in decoder.bert.encoder.layer:
            attention = layer.crossattention.self
            projected = attention.key(image_embeds), attention.value(image_embeds)
            self.image_caches.append([self._heads(x).contiguous() for x in projected])
            room = [x.new_zeros(*x.shape[:2], capacity, x.shape[-1]) for x in self.image_caches[-1]]
            self.caches.append(room)
        self.filled = 0

    def feed(self, ids: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        """Hidden states (B, Q, W) of Q new tokens (B, Q) at positions (Q,), or (1,) for all.

        `visible` (B, Q, S) tells which cache entries a token sees; the last Q are the new tokens.
        """
        new = slice(self.filled, self.filled + ids.shape[1])
        self.filled = new.stop
        x = self.decoder.bert.embeddings(ids, position_ids=position)
        for layer, cache, image_cache in zip(
            self.decoder.bert.encoder.layer, self.caches, self.image_caches, strict=True
        ):
            attention = layer.attention.self
            keys, values = (entries[:, :, : self.filled] for entries in cache)
            keys[:, :, new] = self._heads(linear(attention.key, x))
            values[:, :, new] = self._heads(linear(attention.value, x))
            context = self._attend(linear(attention.query, x), keys, values, visible[:, None])
            x = self._residual(layer.attention.output, context, x)
            query = linear(layer.crossattention.self.query, x)
            x = self._residual(layer.crossattention.output, self._attend(query, *image_cache), x)
            hidden = linear(layer.intermediate.dense, x)
            x = self._residual(layer.output, layer.intermediate.intermediate_act_fn(hidden), x)
        return x

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (B, Q, V) of the next token, float32, from hidden states (B, Q, W)."""
        head = self.decoder.cls.predictions
        hidden = head.transform.transform_act_fn(linear(head.transform.dense, hidden))
        return linear(head.decoder, head.transform.LayerNorm(hidden)).float().log_softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.decoder.config.num_attention_heads, -1)).transpose(1, 2)

    def _attend(self, query, keys, values, visible=None) -> Tensor:
        context = F.scaled_dot_product_attention(self._heads(query), keys, values, visible)
        return context.transpose(1, 2).flatten(2)

    def _residual(self, output, update, x) -> Tensor:
        return output.LayerNorm(linear(output.dense, update) + x)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a linear layer, dense or sparse, to few rows; reading the weights takes the time.

    In float32 on a CPU oneDNN is 1.6 times as fast at that as the BLAS behind a dense `layer(x)`.
    """
    float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    dense = isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32
    here = x.device.type == "cpu" and not torch.compiler.is_exporting()
    if float32 and dense and here and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)
