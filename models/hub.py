"""Models of Hugging Face: opening one, its inputs, and which of its layers see what."""

import inspect
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import compat  # noqa: F401

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants, snapshot_download
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from data.images import BadImageError, open_image
from utils import UserError

TRIAL_SECONDS = 10  # that the hub has for its first answer
PARTS = {  # of a config, by what they see; other parts see both or something else
    "vision_config": "vision",
    "image_config": "vision",
    "text_config": "language",
}
OTHER_FORMATS = (".bin", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".gguf")  # of weights


class HubModel(NamedTuple):
    """A model, in eval mode on the CPU, with Hugging Face's processor of its inputs.

    `untrained` are layers whose weights the checkpoint lacks: poolers, which others do without.
    """

    name: str
    model: nn.Module
    processor: object
    untrained: list[str]

    def takes(self, argument: str) -> bool:
        """Whether the model's `forward` has such an argument."""
        return argument in inspect.signature(self.model.forward).parameters


def local_folder(name: str) -> Path:
    """A local folder, or that of a model of the hub, downloaded if it is not in the cache."""
    if Path(name).is_dir():
        return Path(name)
    _require_reachable(name)
    with _loading(name):
        return Path(snapshot_download(name, ignore_patterns=[f"*{end}" for end in OTHER_FORMATS]))


def open_hub_model(name: str, dtype: str | torch.dtype = torch.float32) -> HubModel:
    """Opens a local folder, or a model of the hub, downloaded if it is not in the cache.

    Its weights are of `dtype`; "auto" takes the type of the files.
    """
    if not Path(name).is_dir():
        _require_reachable(name)
    with _loading(name):
        named = AutoConfig.from_pretrained(name).architectures or ()
    classes = [AutoModel, *(getattr(transformers, kind, AutoModel) for kind in named)]
    for kind in classes:  # the base model, or where its weights are not there, the config's class
        with _loading(name), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same weights where there are none
            model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
        missing = sorted(report["missing_keys"])
        needed = [key for key in missing if "pooler" not in key]
        if not needed:
            break
    untrained = sorted({key.rpartition(".")[0] for key in missing})
    hub = HubModel(name, model.eval(), None, untrained)
    if not hub.takes("pixel_values") and not hub.takes("input_ids"):
        raise UserError(f"--hf {name} takes neither images nor texts, but {model.main_input_name}")
    with _loading(name):
        processor = AutoProcessor.from_pretrained(name)
    if needed:
        raise UserError(
            f"--hf {name}: {len(needed)} weights are missing, for instance {needed[0]}; the folder "
            "must hold the whole model"
        )
    return hub._replace(processor=processor)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whatever kind a damaged or contradictory folder makes
        raise UserError(
            f"--hf {name}: transformers cannot load it: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def _require_reachable(name: str) -> None:
    """Tries once, and not for long, whether a model is in the hub's cache or the hub answers."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"--hf {name}: there is no such folder")
    with suppress(OSError, ValueError):
        AutoConfig.from_pretrained(name, local_files_only=True)
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
            urllib.request.urlopen(address, timeout=TRIAL_SECONDS).close()
            return
        except HTTPError:  # it answers: transformers will say what is wrong with the name
            return
        except (OSError, ValueError, HTTPException) as error:
            reason = _first_line(error)
    raise UserError(
        f"--hf {name}: there is no such folder, and the hub's models cannot be reached ({reason}). "
        f"Download {constants.ENDPOINT}/{name} elsewhere and give its folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_texts(path: str) -> list[str]:
    """The lines of a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--texts: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"--texts: line {number} of {path} is empty; every line is a text")
    return lines


class HubInputs:
    """Batches of pictures, texts or pairs of them, as the model's processor makes them.

    All texts are padded at their end and to one length, so that equal places of two texts are
    compared and nothing depends on the batch. `runs` takes a batch: it is the model, or `alone` the
    encoder of one whose decoder has no texts.
    """

    def __init__(
        self,
        hub: HubModel,
        images: list[Path] | None,
        texts: list[str] | None,
        batch_size: int,
        decoder_texts: list[str] | None = None,
        alone: bool = False,
    ):
        self.hub, self.processor, self.runs = hub, hub.processor, hub.model
        both = hub.processor, getattr(hub.processor, "image_processor", None)
        has_images = any(isinstance(part, BaseImageProcessor) for part in both)
        self.tokenizer = getattr(hub.processor, "tokenizer", hub.processor)
        has_texts = isinstance(self.tokenizer, PreTrainedTokenizerBase)
        for what, argument, given, prepared, flag, maker in (
            ("images", "pixel_values", images, has_images, "--images FOLDER", "image processor"),
            ("texts", "input_ids", texts, has_texts, "--texts FILE", "tokenizer"),
        ):
            takes = hub.takes(argument)
            if given is not None and not takes:
                raise UserError(f"--hf {hub.name} takes no {what}: leave {flag} out")
            if takes and given is None:
                raise UserError(f"--hf {hub.name} takes {what}: give {flag}")
            if takes and not prepared:
                raise UserError(f"--hf {hub.name} takes {what}, but comes without {maker}")
        if images is not None and texts is not None and len(images) != len(texts):
            raise UserError(
                f"--texts has {len(texts)} lines, --images {len(images)} pictures: give a text for "
                "each picture, in the order of the pictures' names"
            )
        decodes = getattr(hub.model.config, "is_encoder_decoder", False)
        if decoder_texts is not None and not (decodes and len(decoder_texts) == len(texts or [])):
            raise UserError("--decoder_texts are for a decoder, a line for each line of --texts")
        if alone and decodes and decoder_texts is None:
            self.runs = hub.model.get_encoder()
        self.images, self.texts, self.batch_size = images, texts, batch_size
        self.decoder_texts = decoder_texts
        self.decoder: dict[str, torch.Tensor] = {}  # its inputs (n, L), by name
        self.lengths: list[int] = []  # of the texts, in tokens
        self.padded = None  # length to which the processor pads them
        if texts is not None:
            self._prepare_texts()

    def _prepare_texts(self) -> None:
        """Sets the padding, the place of a picture in a prompt, and the texts' lengths."""
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        mark = getattr(self.processor, "image_token", None) if self.images else None
        self.prompts = mark is not None  # which the processor makes longer by the picture's tokens
        if self.prompts and not self._sets_marks(str(mark)):
            self.texts = [x if str(mark) in x else f"{mark}\n{x}" for x in self.texts]
        most = self.tokenizer.model_max_length
        text_config = self.hub.model.config.get_text_config()
        most = min(most, getattr(text_config, "max_position_embeddings", None) or most)
        limit = {} if self.prompts else {"truncation": True, "max_length": most}
        ids = self.tokenizer(self.texts, **limit)["input_ids"]
        if set().union(*ids) <= set(self.tokenizer.all_special_ids):
            files = ", ".join(self.tokenizer.vocab_files_names.values())
            raise UserError(
                f"--hf {self.hub.name}: the tokenizer, of {len(self.tokenizer)} tokens, knows no "
                f"word of --texts; see whether its files are there ({files})"
            )
        self.lengths = list(map(len, ids))

    def _sets_marks(self, mark: str) -> bool:
        """Whether the processor itself puts a picture's tokens into a text."""
        with suppress(Exception):  # of whatever kind a processor finds where the mark is missing
            picture = Image.new("RGB", (64, 64))
            ids = self.processor(images=[picture], text=["a"], return_tensors="pt")["input_ids"]
            return self.tokenizer.convert_tokens_to_ids(mark) in ids
        return False

    def samples(self) -> int:
        """Number of samples."""
        return len(self.texts if self.images is None else self.images)

    def padding(self) -> list[str]:
        """A sentence on the padding, if there is any."""
        longest, total, n = max(self.lengths, default=0), sum(self.lengths), len(self.lengths)
        if total == longest * n:
            return []
        share = (longest * n - total) / (self.padded * n)
        return [
            f"texts have {total / n:.0f} tokens on average and are padded to {longest}: padding "
            f"takes {share:.0%} of the work on texts (--max_tokens N leaves longer ones out)"
        ]

    def take(self, chosen: list[int]) -> None:
        """Keeps these samples, in this order, and runs the model on one with the longest text."""
        if self.images is not None:
            self.images = [self.images[i] for i in chosen]
        if self.texts is not None:
            self.texts = [self.texts[i] for i in chosen]
            self.lengths = [self.lengths[i] for i in chosen]
        if self.decoder_texts is not None:
            texts = [self.decoder_texts[i] for i in chosen]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
            start = self.hub.model.config.decoder_start_token_id  # before each, as in training
            for name, first in (("input_ids", start), ("attention_mask", 1)):
                self.decoder[f"decoder_{name}"] = F.pad(tokens[name], (1, 0), value=first)
        longest, made = max(self.lengths, default=0), {}
        try:
            made = self.batch([self.lengths.index(longest) if self.lengths else 0])
            with torch.no_grad():
                self.runs(**made)
        except BadImageError:
            raise
        except Exception as error:  # of whatever kind a model or processor finds
            text = f", whose text of {longest} tokens is the longest" if longest else ""
            raise UserError(
                f"--hf {self.hub.name}: the model does not take what its processor makes of a "
                f"sample{text} ({', '.join(made) or 'nothing'}): {_first_line(error)}"
            ) from error
        if self.texts is not None:
            self.padded = made["input_ids"].shape[1]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.samples() // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, in order."""
        rows = list(range(self.samples()))
        for start in rows[:: self.batch_size]:
            yield self.batch(rows[start : start + self.batch_size])

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """What the processor makes of some samples."""
        inputs = {}
        if self.images is not None:
            inputs["images"] = [open_image(self.images[i], on_white=True) for i in rows]
        if self.texts is not None:
            most = self.padded or max(self.lengths[i] for i in rows)
            inputs |= {"text": [self.texts[i] for i in rows], "padding": True}
            if self.padded or not self.prompts:
                inputs |= {"padding": "max_length", "max_length": most}
            if not self.prompts:
                inputs["truncation"] = True
        made = dict(self.processor(**inputs, return_tensors="pt"))
        made |= {name: values[rows] for name, values in self.decoder.items()}
        dtype = self.hub.model.dtype
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


def layer_kinds(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Which layers are "vision", which "language", and which "other": fusing both, or heads.

    A layer belongs to the innermost module around it that has a config of its own, such as
    `vision_config`. A model without such parts is of the kind of its main input.
    """
    parts = {key: getattr(model.config, key, None) for key in PARTS}
    kinds = {part.model_type: PARTS[key] for key, part in parts.items() if part is not None}
    if not kinds:
        kind = "vision" if model.main_input_name == "pixel_values" else "language"
        return dict.fromkeys(names, kind)

    def kind(name: str) -> str:
        while name:
            config = getattr(model.get_submodule(name), "config", None)
            if isinstance(config, transformers.PretrainedConfig):
                return kinds.get(config.model_type, "other")
            name = name.rpartition(".")[0]
        return "other"

    return {name: kind(name) for name in names}
