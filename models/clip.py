"""CLIP for retrieval: open_clip's model with ALBEF's contrastive loss.

Sources: Radford et al., CLIP, ICML 2021 (the model); Li et al., ALBEF, NeurIPS 2021, section 3.2
(momentum copy, queues, soft targets), as UPop (Shi et al., ICML 2023) applies them to CLIP.
"""

from copy import deepcopy

import compat  # noqa: F401

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from torch import Tensor, nn

from models.checkpoint import Weights, replace_all
from models.sizes import choose_sizes
from models.stages import Stage, resblock_stages
from models.text import load_tokenizer
from utils import UserError

SIZES = {
    "large": {
        "embed_dim": 768,
        "patch_size": 14,
        "vision_width": 1024,
        "vision_layers": 24,
        "vision_heads": 16,
        "context_length": 77,
        "vocab_size": 49408,
        "text_width": 768,
        "text_heads": 12,
        "text_layers": 12,
    },
}
OPENAI_TOKENIZER = "clip"  # the config's name for the vocabulary that CLIP was trained with
MAX_LOGIT_SCALE = 4.6052  # log 100
NO_IMAGE = -100  # id of a queue's columns that no batch has filled; datasets count from 0

_HUGGING_FACE = {  # its names of CLIP's parameters: OpenAI's
    "vision_model.": "visual.",
    "text_model.": "",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",  # the class's and the tokens'
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


class WordPieces:
    """BERT's tokenizer in CLIP's manner: the end token has the highest id, padding is 0."""

    def __init__(self, name: str):
        self.tokenizer = load_tokenizer(name)
        self.vocab_size = len(self.tokenizer)

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        """Ids (B, context_length): [DEC], the words, [ENC], padding; longer texts are cut."""
        limit = {"padding": "max_length", "truncation": True, "max_length": context_length}
        tokens = self.tokenizer(texts, **limit, return_tensors="pt")
        ids, end = tokens.input_ids, self.tokenizer.convert_tokens_to_ids("[ENC]")
        assert end == self.vocab_size - 1
        ids[:, 0] = self.tokenizer.bos_token_id
        return ids.masked_fill(ids == self.tokenizer.sep_token_id, end) * tokens.attention_mask


class ClipRetrieval(CLIP):
    """CLIP, trained to give an image and its captions similar features; names are OpenAI's.

    Momentum copy and queues are buffers: checkpoints hold them, optimizer and pruner see none.
    """

    size_keys = "`clip`"  # of the config

    @staticmethod
    def official_name(name: str) -> str:
        """OpenAI's name of a parameter that may have Hugging Face's."""
        theirs = name.startswith(("vision_model.", "text_model."))
        return replace_all(name, _HUGGING_FACE.items()) if theirs else name

    def __init__(self, config: dict):
        """Makes random weights. Raises a UserError if a value cannot be.

        Args:
            config: `clip` ("large" or a mapping with its keys), `image_size` in pixels, and
                optionally `queue_size` (57600), `momentum` of the copy (0.995 a step), `alpha`, the
                weight of the soft targets (0.4), and `tokenizer`: "clip" for OpenAI's vocabulary,
                else a BERT tokenizer's. A smaller model without it takes token ids only.
        """
        heads = {"vision_width": "vision_heads", "text_width": "text_heads"}
        sizes = choose_sizes(config, "clip", SIZES, heads)
        tokenizer = choose_tokenizer(config.get("tokenizer"), sizes["vocab_size"])
        vision = {key: sizes[f"vision_{key}"] for key in ("width", "layers")}
        vision |= {"image_size": config["image_size"], "patch_size": sizes["patch_size"]}
        vision["head_width"] = sizes["vision_width"] // sizes["vision_heads"]
        text = {key: sizes[key] for key in ("context_length", "vocab_size")}
        text |= {key: sizes[f"text_{key}"] for key in ("width", "heads", "layers")}
        super().__init__(sizes["embed_dim"], vision, text, quick_gelu=True)
        self.momentum_copy = as_buffers(deepcopy(self))  # its weights follow slowly
        self.tokenizer, self.max_tokens = tokenizer, self.context_length
        self.momentum, self.alpha = config.get("momentum", 0.995), config.get("alpha", 0.4)
        self.queue_size = config.get("queue_size", 57600)
        self.ramp = 1.0  # of alpha
        columns = sizes["embed_dim"], self.queue_size  # (D, Q): features of the last pairs
        self.register_buffer("image_queue", F.normalize(torch.randn(columns), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(columns), dim=0))
        self.register_buffer("id_queue", torch.full(columns[1:], NO_IMAGE))  # of their images
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))  # the oldest
        # an optimizer step that has begun, of N pairs in all processes
        self.slow: list[Tensor] = []  # momentum features (B, 2, D) of the parts still to come
        self.seen: list[Tensor] = []  # the model's own features (B, 2, D) of the other parts
        self.keys: tuple[Tensor, ...] = ()  # texts, images (D, N + Q) and their ids (N + Q,)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids, and a mask up to the end token, both (B, context_length); it has the highest id."""
        if self.tokenizer is None:
            raise UserError("tokenizer: the config names none that fits the vocabulary of `clip`")
        ids = self.tokenizer(texts, self.context_length)
        ends = ids.argmax(dim=1, keepdim=True)
        return ids, (torch.arange(ids.shape[1]) <= ends).long()

    def count_cut(self, texts: list[str]) -> int:
        """Number of texts that `max_tokens` cuts."""
        return int((self.tokenizer(texts, self.max_tokens + 1)[:, -1] != 0).sum())

    def prepare(self, image, captions, image_ids) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """The tensors of `forward`, and the number of pairs."""
        return (image, self.tokenize(captions)[0], image_ids), len(captions)

    def stages(self) -> list[Stage]:
        """The two towers over "image" and "input_ids" (B, context_length), for profiling."""
        visual, words, places = self.visual, self.token_embedding, self.positional_embedding
        return [
            Stage("tokens: patch embedding", visual._embeds, ("image",), "tokens"),
            *resblock_stages(visual.transformer.resblocks, "tokens"),
            Stage("tokens: norm", visual.ln_post, ("tokens",), "tokens"),
            Stage("text: embedding", lambda ids: words(ids) + places, ("input_ids",), "text"),
            *resblock_stages(self.transformer.resblocks, "text", self.attn_mask),
            Stage("text: norm", self.ln_final, ("text",), "text"),
        ]

    def logits_from_ids(self, image: Tensor, ids: Tensor) -> Tensor:
        """Similarities (B, B) of images (B, 3, S, S) and token ids (B, context_length), scaled."""
        images, texts = _unit_features(self, image, ids).unbind(1)
        return self.logit_scale.exp() * images @ texts.T

    @torch.no_grad()
    def on_step(self, epochs: float, parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Begins an optimizer step: moves the momentum copy, and takes its features of all parts.

        So the loss does not depend on how the pairs of a step are spread over parts and processes.
        Without it, a call of `forward` is a step of one part.

        Args:
            epochs: done before the step, a fraction too; alpha ramps from 0 over the first.
            parts: arguments of the calls of `forward` that follow in this process.
        """
        self.ramp = min(1.0, epochs)
        image_ids = gather(torch.cat([image_ids for *_, image_ids in parts]))
        self.check_batch(len(image_ids))
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self._move_momentum_copy(self.momentum)
        self.slow = [_unit_features(self.momentum_copy, image, ids) for image, ids, _ in parts]
        self.seen = []
        images, texts = gather(torch.cat(self.slow)).unbind(1)
        texts, images = (texts.T, self.text_queue), (images.T, self.image_queue)
        self.keys = tuple(torch.cat(x, dim=-1) for x in (texts, images, (image_ids, self.id_queue)))

    def forward(self, image: Tensor, ids: Tensor, image_ids: Tensor) -> Tensor:
        """ALBEF's contrastive loss, a mean over B pairs; the last part of a step fills the queues.

        As in UPop, and unlike ALBEF, the queues hold features of the model itself and not of the
        momentum copy. Unlike in UPop, the keys are momentum features of all processes.

        Args:
            image: (B, 3, S, S), normalised.
            ids: (B, context_length) token ids, padded with 0; the end token has the highest.
            image_ids: (B,) int64, at least 0; equal for captions of the same image.
        """
        if not self.slow:
            self.on_step(self.ramp, [(image, ids, image_ids)])
        *keys, key_ids = self.keys
        own, slow = _unit_features(self, image, ids), self.slow.pop(0)
        same = image_ids[:, None] == key_ids  # (B, N + Q)
        hard, alpha = same / same.sum(dim=1, keepdim=True), self.alpha * self.ramp
        loss = 0
        with torch.autocast(image.device.type, enabled=False):  # logits reach 100: not in bfloat16
            scale = self.logit_scale.exp()
            for side in range(2):  # images to texts, texts to images
                soft = (scale.detach() * slow[:, side] @ keys[side]).softmax(dim=1)
                target = alpha * soft + (1 - alpha) * hard
                loss = loss + F.cross_entropy(scale * own[:, side] @ keys[side], target) / 2
        self.seen.append(own.detach())
        if not self.slow:
            self._enqueue()
        return loss

    def check_batch(self, pairs: int) -> None:
        """Checks that the pairs of an optimizer step, of all processes, fill the queues evenly."""
        if self.queue_size % pairs:
            raise UserError(
                f"queue_size {self.queue_size} is no multiple of the {pairs} samples of a step "
                "(batch_size x processes x gradient_accumulation_steps): change one of them"
            )

    @torch.no_grad()
    def _move_momentum_copy(self, momentum: float) -> None:
        """Moves m <- momentum * m + (1 - momentum) * p; the final text norm m <- p, as in UPop."""
        for name, parameter in self.named_parameters():
            weight = 1.0 if name.startswith("ln_final.") else 1 - momentum
            self.momentum_copy.get_buffer(name).lerp_(parameter, weight)

    @torch.no_grad()
    def _enqueue(self) -> None:
        """Ends a step: its pairs replace the oldest columns of the queues."""
        images, texts = gather(torch.cat(self.seen)).unbind(1)
        pairs, ids = len(images), self.keys[2]
        columns = (self.queue_pointer + torch.arange(pairs, device=ids.device)) % self.queue_size
        self.image_queue.index_copy_(1, columns, images.T)
        self.text_queue.index_copy_(1, columns, texts.T)
        self.id_queue.index_copy_(0, columns, ids[:pairs])
        self.queue_pointer.copy_((self.queue_pointer + pairs) % self.queue_size)
        self.seen, self.keys = [], ()

    def adapt_weights(self, weights: Weights) -> tuple[Weights, set[str]]:
        """Transposes Hugging Face's projections and joins its q, k, v; drops training state."""
        own = {name for name, _ in self.named_buffers()}  # which a resumed run restores by itself
        weights = {name: value for name, value in weights.items() if name not in own}
        for tower, openai in (("visual", "visual.proj"), ("text", "text_projection")):
            if (theirs := f"{tower}_projection.weight") in weights:
                weights[openai] = weights.pop(theirs).T
        for name in [name for name in weights if ".attn.q_proj." in name]:
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if all(part in weights for part in parts):
                joined = name.replace(".q_proj.", ".in_proj_")
                weights[joined] = torch.cat([weights.pop(part) for part in parts])
        return weights, set()

    def weights_loaded(self) -> None:
        """The momentum copy starts from the weights."""
        self._move_momentum_copy(0.0)


build_clip = ClipRetrieval


def choose_tokenizer(name: str | None, vocab_size: int) -> SimpleTokenizer | WordPieces | None:
    """The tokenizer that a config names for a model with so many words."""
    if name is None and vocab_size != SIZES["large"]["vocab_size"]:
        return None
    tokenizer = SimpleTokenizer() if name in (None, OPENAI_TOKENIZER) else WordPieces(name)
    if tokenizer.vocab_size > vocab_size:
        tokens = f"{tokenizer.vocab_size} tokens of tokenizer {name!r}"
        raise UserError(f"clip: vocab_size {vocab_size} is below the {tokens}")
    return tokenizer


def as_buffers(model: nn.Module) -> nn.Module:
    """The model, whose parameters become buffers of the same names, in place."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return model


def gather(tensor: Tensor) -> Tensor:
    """The tensors (B, ...) of all W processes as one (W * B, ...), in the order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _unit_features(model: CLIP, image: Tensor, ids: Tensor) -> Tensor:
    """Unit vectors (B, 2, D) of images and texts, of the weights' type even under autocast."""
    features = torch.stack([model.encode_image(image), model.encode_text(ids)], dim=1)
    return F.normalize(features.to(model.logit_scale.dtype), dim=-1)
