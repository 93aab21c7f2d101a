"""CLIP for retrieval: open_clip's model with ALBEF's contrastive loss.

Sources: Radford et al., CLIP, ICML 2021 (the model); Li et al., ALBEF, NeurIPS 2021, section 3.2
(momentum copy, queues, soft targets), as UPop (Shi et al., ICML 2023) applies them to CLIP.
"""

import re
from copy import deepcopy

import compat  # noqa: F401

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from torch import Tensor, nn

from models.checkpoint import CLIP_POSITION_EMBEDDING
from models.stages import Stage, resblock_stages
from models.text import load_tokenizer, tokenize
from models.weight_files import Entry
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

# Hugging Face's names of CLIP's parameters. Where BLIP has them, too, `models.checkpoint` has given
# them BLIP's own names before.
_HUGGING_FACE = [
    (
        r"^vision_model\.embeddings\.class_embedding$|^visual_encoder\.cls_token$",
        "visual.class_embedding",
    ),
    (
        r"^vision_model\.embeddings\.patch_embedding|^visual_encoder\.patch_embed\.proj",
        "visual.conv1",
    ),
    (
        r"^vision_model\.embeddings\.position_embedding\.weight$|^visual_encoder\.pos_embed\.weight$",
        CLIP_POSITION_EMBEDDING,
    ),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm|^visual_encoder\.norm", "visual.ln_post"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^vision_model\.encoder\.layers|^visual_encoder\.blocks", "visual.transformer.resblocks"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    # inside a block
    (r"(?<=\d)\.(layer_)?norm(?=[12]\.)", ".ln_"),
    (r"(?<=\d)\.self_attn\.", ".attn."),
    (r"(?<=\d)\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"(?<=\d)\.mlp\.fc2\.", ".mlp.c_proj."),
]


class WordPieces:
    """BERT's tokenizer in CLIP's manner: the end token has the highest id, padding is 0."""

    def __init__(self, name: str):
        """Args: name: of the tokenizer, see `models.text.load_tokenizer`."""
        self.tokenizer = load_tokenizer(name)
        self.vocab_size = len(self.tokenizer)

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        """Ids (B, context_length): [DEC], the words, [ENC], padding; longer texts are cut."""
        ids, mask = tokenize(
            self.tokenizer, texts, "[DEC]", padding="max_length", max_tokens=context_length
        )
        end = self.tokenizer.convert_tokens_to_ids("[ENC]")
        assert end == self.vocab_size - 1
        return ids.masked_fill(ids == self.tokenizer.sep_token_id, end) * mask


class ClipRetrieval(CLIP):
    """CLIP, trained to give an image and its captions similar features.

    Parameter names are OpenAI's. What training needs besides is in buffers, so that checkpoints
    hold it while optimizer, pruner and data parallelism see the parameters alone:

    Attributes:
        momentum_copy: a CLIP whose weights follow the parameters slowly.
        image_queue: (D, Q) normalised image features of the last batches, a column each.
        text_queue: (D, Q) features of their captions.
        id_queue: (Q,) int64, their image ids; NO_IMAGE where the column is still random.
        queue_pointer: () int64, the column that the next batch begins to replace.
    """

    size_keys = "`clip`"  # of the config

    def __init__(
        self,
        sizes: dict[str, int],
        image_size: int,
        tokenizer=None,
        queue_size: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
    ):
        """Puts the parts together; `build_clip` makes them from a config."""
        super().__init__(**_open_clip_arguments(sizes, image_size))
        self.momentum_copy = as_buffers(deepcopy(self))
        self.tokenizer, self.momentum, self.alpha = tokenizer, momentum, alpha
        self.queue_size = queue_size
        self.ramp = 1.0  # of alpha, see `on_step`
        columns = sizes["embed_dim"], queue_size
        self.register_buffer("image_queue", F.normalize(torch.randn(columns), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(columns), dim=0))
        self.register_buffer("id_queue", torch.full((queue_size,), NO_IMAGE))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids, and a mask up to the end token, both (B, context_length) on the CPU.

        The end token has the highest id.
        """
        assert self.tokenizer is not None, "the config names no tokenizer"
        ids = self.tokenizer(texts, context_length=self.context_length)
        ends = ids.argmax(dim=1, keepdim=True)
        return ids, (torch.arange(ids.shape[1]) <= ends).long()

    def prepare(
        self, image: Tensor, captions: list[str], image_ids: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        """Tokenizes a batch once.

        Args:
            image: (B, 3, S, S), normalised; handed on.
            captions: B captions.
            image_ids: (B,) int64, equal for captions of the same image; handed on.

        Returns:
            The tensors of `forward`, and the number of pairs, over which its loss is a mean.
        """
        return (image, self.tokenize(captions)[0], image_ids), len(captions)

    def stages(self) -> list[Stage]:
        """The two towers over "image" and "input_ids" (B, context_length), for profiling."""
        return [
            Stage("tokens: patch embedding", self.visual._embeds, ("image",), "tokens"),
            *resblock_stages(self.visual.transformer, "tokens"),
            Stage("tokens: norm", self.visual.ln_post, ("tokens",), "tokens"),
            Stage("text: embedding", self._embed_text, ("input_ids",), "text"),
            *resblock_stages(self.transformer, "text", self.attn_mask),
            Stage("text: norm", self.ln_final, ("text",), "text"),
        ]

    def _embed_text(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding

    def on_step(self, epochs: float) -> None:
        """Ramps alpha from 0 over the first epoch.

        Args:
            epochs: how many are done before the step that comes, whole and in part.
        """
        self.ramp = min(1.0, epochs)

    def forward(self, image: Tensor, ids: Tensor, image_ids: Tensor) -> Tensor:
        """The loss of a batch: `contrastive_loss` with the alpha of this step."""
        return self.contrastive_loss(image, ids, image_ids, self.alpha * self.ramp)

    def logits_from_ids(self, image: Tensor, ids: Tensor) -> Tensor:
        """Similarities (B, B) of images (B, 3, S, S) and token ids (B, context_length), scaled."""
        images, texts = _normalised_features(self, image, ids)
        return self.logit_scale.exp() * images @ texts.T

    def contrastive_loss(
        self, image: Tensor, ids: Tensor, image_ids: Tensor, alpha: float
    ) -> Tensor:
        """ALBEF's contrastive loss; moves the momentum copy and the queues one step.

        As UPop, and unlike ALBEF, it queues the features of the model itself, not those of the
        momentum copy. Unlike UPop it takes as keys the momentum features of all processes, so that
        the mean of the processes' losses does not depend on how a batch is spread over them.

        Args:
            image: (B, 3, S, S), normalised.
            ids: (B, context_length) token ids, padded with 0; the end token has the highest.
            image_ids: (B,) int64, at least 0; equal for captions of the same image.
            alpha: weight of the momentum copy's similarities in the targets, in [0, 1].

        Returns:
            Scalar: the mean over the B pairs of this process.

        Raises:
            UserError: as `check_batch`.
        """
        self.check_batch(len(image) * (dist.get_world_size() if dist.is_initialized() else 1))
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            self._move_momentum_copy()
            slow_images, slow_texts = _normalised_features(self.momentum_copy, image, ids)
        images, texts = _normalised_features(self, image, ids)
        features = torch.cat([slow_images, slow_texts, images, texts], dim=1).detach()
        all_slow_images, all_slow_texts, *all_online = gather(features).chunk(4, dim=1)
        all_image_ids = gather(image_ids)
        same = image_ids[:, None] == torch.cat([all_image_ids, self.id_queue])  # (B, W * B + Q)
        hard = same / same.sum(dim=1, keepdim=True)
        image_keys = torch.cat([all_slow_images.T, self.image_queue], dim=1)  # (D, W * B + Q)
        text_keys = torch.cat([all_slow_texts.T, self.text_queue], dim=1)

        def cross_entropy(features: Tensor, slow_features: Tensor, keys: Tensor) -> Tensor:
            scale = self.logit_scale.exp()
            soft = (scale.detach() * slow_features @ keys).softmax(dim=1)
            return F.cross_entropy(scale * features @ keys, alpha * soft + (1 - alpha) * hard)

        with torch.autocast(image.device.type, enabled=False):  # logits reach 100: not in bfloat16
            loss = cross_entropy(images, slow_images, text_keys)
            loss = (loss + cross_entropy(texts, slow_texts, image_keys)) / 2
        self._enqueue(*all_online, all_image_ids)
        return loss

    def check_batch(self, global_batch: int) -> None:
        """Checks that batches fill the queues evenly. Call it before the first step.

        Args:
            global_batch: pairs of one forward pass, over all processes.

        Raises:
            UserError: the queues' length is no multiple of it.
        """
        if self.queue_size % global_batch:
            raise UserError(
                f"queue_size {self.queue_size} is no multiple of the {global_batch} samples that "
                "all processes see at once (batch_size x processes): change one of them"
            )

    @torch.no_grad()
    def _move_momentum_copy(self) -> None:
        """Moves m <- momentum * m + (1 - momentum) * p; the final text norm m <- p, as in UPop."""
        for name, parameter in self.named_parameters():
            weight = 1.0 if name.startswith("ln_final.") else 1 - self.momentum
            self.momentum_copy.get_buffer(name).lerp_(parameter, weight)

    @torch.no_grad()
    def _enqueue(self, images: Tensor, texts: Tensor, image_ids: Tensor) -> None:
        """Replaces the oldest columns by features (W * B, D) and their ids (W * B,)."""
        count = len(image_ids)
        columns = self.queue_pointer + torch.arange(count, device=image_ids.device)
        columns %= self.queue_size
        self.image_queue.index_copy_(1, columns, images.T)
        self.text_queue.index_copy_(1, columns, texts.T)
        self.id_queue.index_copy_(0, columns, image_ids)
        self.queue_pointer.copy_((self.queue_pointer + count) % self.queue_size)

    def adapt_state_dict(self, entries: dict[str, Entry]) -> tuple[dict[str, Entry], set[str]]:
        """Takes weights under OpenAI's or Hugging Face's names.

        Training starts anew from them: the momentum copy is set to them, and a checkpoint's own
        momentum copy and queues are left out. (A resumed run restores them by `load_state_dict`.)

        Returns:
            Entries for the whole state dict, and no names that may be missing.
        """
        entries = _openai_names(entries)
        own, parameters = self.state_dict(), dict(self.named_parameters())
        start = {f"momentum_copy.{n}": entries[n] for n in parameters if n in entries}
        unchanged = {
            name: Entry(tuple(value.shape), lambda target: None)
            for name, value in own.items()
            if name not in parameters
        }
        return entries | unchanged | start, set()


def build_clip(config: dict) -> ClipRetrieval:
    """Builds a CLIP with random weights.

    Args:
        config: `clip` ("large" or a mapping with the keys of SIZES["large"]), `image_size` in
            pixels; if they are not the defaults, `queue_size`, `momentum` (of the copy, a step),
            `alpha` (weight of the soft targets) and `tokenizer`: "clip" for OpenAI's vocabulary,
            else a name or folder of a BERT tokenizer. Without `tokenizer`, a model whose
            vocabulary has not OpenAI's size takes token ids only.

    Raises:
        UserError: a value that is none of the possible ones, or a tokenizer that cannot be read.
    """
    sizes = _checked_sizes(config["clip"], config["image_size"])
    name = config.get("tokenizer")
    if name is None and sizes["vocab_size"] == SIZES["large"]["vocab_size"]:
        name = OPENAI_TOKENIZER
    tokenizer = None
    if name is not None:
        tokenizer = SimpleTokenizer() if name == OPENAI_TOKENIZER else WordPieces(name)
        if tokenizer.vocab_size > sizes["vocab_size"]:
            raise UserError(
                f"clip: vocab_size {sizes['vocab_size']} is below the {tokenizer.vocab_size} "
                f"tokens of tokenizer {name!r}"
            )
    options = {key: config[key] for key in ("queue_size", "momentum", "alpha") if key in config}
    return ClipRetrieval(sizes, config["image_size"], tokenizer, **options)


def as_buffers(model: nn.Module) -> nn.Module:
    """Turns all parameters into buffers of the same names, in place; returns the model."""
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


def _normalised_features(model: CLIP, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and texts, (B, D) each, in float32 at least."""
    features = model.encode_image(image), model.encode_text(ids)
    exact = torch.promote_types(features[0].dtype, torch.float32)
    return tuple(F.normalize(feature.to(exact), dim=-1) for feature in features)


def _checked_sizes(clip: str | dict, image_size: int) -> dict[str, int]:
    """The sizes that a config's `clip` means.

    Raises:
        UserError: an unknown name or key, a missing one, or sizes that do not fit each other.
    """
    if isinstance(clip, str):
        if clip not in SIZES:
            raise UserError(f"clip: {clip!r} is none of {sorted(SIZES)} and no mapping of sizes")
        clip = SIZES[clip]
    if set(clip) != set(SIZES["large"]):
        raise UserError(f"clip: a mapping needs {sorted(SIZES['large'])}; got {sorted(clip)}")
    for key, size in clip.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"clip: {key} must be a whole number of at least 1, got {size!r}")
    for tower in ("vision", "text"):
        width, heads = clip[f"{tower}_width"], clip[f"{tower}_heads"]
        if width % heads:
            raise UserError(f"clip: {tower}_width {width} is no multiple of {tower}_heads {heads}")
    if image_size % clip["patch_size"]:
        raise UserError(
            f"image_size {image_size} is no multiple of patch_size {clip['patch_size']}"
        )
    return clip


def _open_clip_arguments(sizes: dict[str, int], image_size: int) -> dict:
    return {
        "embed_dim": sizes["embed_dim"],
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": sizes["patch_size"],
            "width": sizes["vision_width"],
            "layers": sizes["vision_layers"],
            "head_width": sizes["vision_width"] // sizes["vision_heads"],
        },
        "text_cfg": {
            "context_length": sizes["context_length"],
            "vocab_size": sizes["vocab_size"],
            "width": sizes["text_width"],
            "heads": sizes["text_heads"],
            "layers": sizes["text_layers"],
        },
        "quick_gelu": True,
    }


def _openai_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries under OpenAI's names; Hugging Face's projections are transposed, q, k, v joined."""
    renamed = {}
    for name, entry in entries.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            entry = _transposed(entry)
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = entry
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in parts):
            joined = name.replace(".q_proj.", ".in_proj_")
            renamed[joined] = _joined([renamed.pop(part) for part in parts])
    return renamed


def _transposed(entry: Entry) -> Entry:
    """An entry of a matrix as one of its transpose."""
    return Entry(entry.shape[::-1], lambda target: entry.read(target.T))


def _joined(entries: list[Entry]) -> Entry:
    """Entries of equal shape as one, along the first dimension."""
    first, *rest = entries[0].shape

    def read(target: Tensor) -> None:
        for entry, part in zip(entries, target.split(first), strict=True):
            entry.read(part)

    return Entry((first * len(entries), *rest), read)
