"""Any model of Hugging Face's: opening it, its inputs, and which of its layers see what."""

import inspect
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import compat  # noqa: F401

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from data.image_dataset import BadImageError, open_image
from utils import UserError

TRIAL_SECONDS = 10  # that the hub has for its first answer
PARTS = {  # of a config, by what they see; other parts see both or something else
    "vision_config": "vision",
    "image_config": "vision",
    "text_config": "language",
}


class HubModel(NamedTuple):
    """A model with what prepares its inputs.

    Attributes:
        model: in float32 and eval mode, on the CPU.
        processor: of images, texts, or both, as Hugging Face's.
        untrained: layers whose weights the checkpoint lacks: poolers, that other models do without.
    """

    model: nn.Module
    processor: object
    untrained: list[str]

    @property
    def sees_images(self) -> bool:
        """Whether the model's `forward` takes images."""
        return _takes(self.model, "pixel_values")

    @property
    def sees_texts(self) -> bool:
        """Whether the model's `forward` takes token ids."""
        return _takes(self.model, "input_ids")


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whatever kind a damaged or contradictory folder makes
        raise UserError(
            f"--hf {name}: transformers cannot load it: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def open_hub_model(name: str) -> HubModel:
    """Opens a local folder, or a model of the hub, which is downloaded if it is not there yet.

    Args:
        name: of the folder or on the hub.

    Raises:
        UserError: it is not there, is no model that transformers can load, lacks weights or what
            prepares its inputs, or takes neither images nor texts.
    """
    if not Path(name).is_dir():
        _require_reachable(name)
    with _loading(name):
        model, report = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    if not _takes(model, "pixel_values") and not _takes(model, "input_ids"):
        raise UserError(f"--hf {name} takes neither images nor texts, but {model.main_input_name}")
    with _loading(name):
        processor = AutoProcessor.from_pretrained(name)
    missing = sorted(report["missing_keys"])
    needed = [key for key in missing if "pooler" not in key]
    if needed:
        raise UserError(
            f"--hf {name}: {len(needed)} weights are missing, for instance {needed[0]}; the folder "
            "must hold the whole model"
        )
    untrained = sorted({key.rpartition(".")[0] for key in missing})
    return HubModel(model.eval(), processor, untrained)


def _require_reachable(name: str) -> None:
    """Tries once, and not for long, whether a model is in the hub's cache or the hub answers.

    Raises:
        UserError: neither, or the name is none of the hub's.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--hf {name}: there is no such folder") from None
    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
        return
    except (OSError, ValueError):
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
    """The lines of a file.

    Raises:
        UserError: it cannot be read, or a line is empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--texts: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"--texts: line {number} of {path} is empty; every line is a text")
    return lines


class HubInputs:
    """Batches of pictures, texts or pairs of them, as the model's processor makes them."""

    def __init__(
        self,
        hub: HubModel,
        name: str,
        images: list[Path] | None,
        texts: list[str] | None,
        batch_size: int,
    ):
        """Checks that the model takes what is given; reads no picture yet.

        Args:
            hub: the model.
            name: of it, for messages.
            images: files.
            texts: one for each picture, if the model takes both.
            batch_size: in samples.

        Raises:
            UserError: something the model needs is missing, or it does not take what is given.
        """
        self.processor = processor = hub.processor
        kinds = BaseImageProcessor, PreTrainedTokenizerBase
        both = processor, getattr(processor, "image_processor", None)
        has_images = any(isinstance(part, kinds[0]) for part in both)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        _require(hub.sees_images, images is not None, has_images, name, "images", "--images FOLDER")
        has_texts = isinstance(self.tokenizer, kinds[1])
        _require(hub.sees_texts, texts is not None, has_texts, name, "texts", "--texts FILE")
        if images is not None and texts is not None and len(images) != len(texts):
            raise UserError(
                f"--texts has {len(texts)} lines, --images {len(images)} pictures: give a text for "
                "each picture, in the order of the pictures' names"
            )
        self.images, self.texts, self.batch_size = images, texts, batch_size
        self.lengths: list[int] = []  # of the texts, in tokens
        if texts is not None:
            self._prepare_texts(hub.model, name)

    def _prepare_texts(self, model: nn.Module, name: str) -> None:
        """Padding at the end, so that equal places of two texts are compared.

        All texts are padded to the longest one, so that nothing depends on the batch: a model that
        joins image and text also gives outputs for the padding. Where a prompt says where its
        picture goes, the processor makes it longer, and pads a batch to its longest.

        Raises:
            UserError: the tokenizer knows no word.
        """
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        mark = getattr(self.processor, "image_token", None) if self.images else None
        mark = None if mark is None else str(mark)  # BLIP-2's is no string
        self.prompts = mark is not None
        if self.prompts:
            self.texts = [x if mark in x else f"{mark}\n{x}" for x in self.texts]
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)
        limit = {} if self.prompts else {"truncation": True, "max_length": longest}
        ids = self.tokenizer(self.texts, **limit)["input_ids"]
        if set().union(*ids) <= set(self.tokenizer.all_special_ids):
            files = ", ".join(self.tokenizer.vocab_files_names.values())
            raise UserError(
                f"--hf {name}: the tokenizer, of {len(self.tokenizer)} tokens, knows no word of "
                f"--texts; see whether its files are there ({files})"
            )
        self.lengths = list(map(len, ids))

    def samples(self) -> int:
        """How many there are."""
        return len(self.texts if self.images is None else self.images)

    def take(self, chosen: list[int]) -> None:
        """Keeps some samples only, in this order."""
        if self.images is not None:
            self.images = [self.images[i] for i in chosen]
        if self.texts is not None:
            self.texts = [self.texts[i] for i in chosen]
            self.lengths = [self.lengths[i] for i in chosen]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.samples() // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, in order."""
        for start in range(0, self.samples(), self.batch_size):
            yield self.batch(range(start, min(start + self.batch_size, self.samples())))

    def batch(self, rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """What the processor makes of some samples."""
        inputs = {}
        if self.images is not None:
            inputs["images"] = [open_image(str(self.images[i])) for i in rows]
        if self.texts is not None:
            inputs |= {"text": [self.texts[i] for i in rows], "padding": True}
            if not self.prompts:
                most = max(self.lengths)
                inputs |= {"padding": "max_length", "max_length": most, "truncation": True}
        return dict(self.processor(**inputs, return_tensors="pt"))


def _require(takes: bool, given: bool, prepares: bool, name: str, what: str, flag: str) -> None:
    """Compares what a model takes with what is given.

    Raises:
        UserError: they differ, or nothing prepares it.
    """
    if given and not takes:
        raise UserError(f"--hf {name} takes no {what}: leave {flag} out")
    if takes and not given:
        raise UserError(f"--hf {name} takes {what}: give {flag}")
    if takes and not prepares:
        made = "image processor (preprocessor_config.json)" if what == "images" else "tokenizer"
        raise UserError(f"--hf {name} takes {what}, but comes without {made}")


def check_forward(hub: HubModel, inputs: HubInputs, name: str) -> None:
    """Runs one sample, of those with texts the longest.

    Raises:
        UserError: its picture cannot be read, or the model does not take what its processor makes
            of the sample.
    """
    lengths, made = inputs.lengths or [0], {}
    try:
        made = inputs.batch([lengths.index(max(lengths))])
        with torch.no_grad():
            hub.model(**made)
    except BadImageError:
        raise
    except Exception as error:  # of whatever kind a model or processor finds
        text = f", whose text of {max(lengths)} tokens is the longest" if inputs.lengths else ""
        raise UserError(
            f"--hf {name}: the model does not take what its processor makes of a sample{text} "
            f"({', '.join(made) or 'nothing'}): {_first_line(error)}"
        ) from error


def layer_kinds(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Which layers are "vision", which "language", and which "other": fusing both, or heads.

    A config's parts tell: a layer belongs to the innermost module around it that has a config of
    its own. A model whose config has no such parts is of the kind of its main input.

    Args:
        model: of Hugging Face's transformers.
        names: of its layers.
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
