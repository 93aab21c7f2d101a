"""Writes a model as ONNX files, for other runtimes than torch; docs/onnx.md shows a reader."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import compat  # noqa: F401

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data.transforms import CLIP_MEAN, CLIP_STD
from models.captioner import Captioner
from models.clip import ClipRetrieval, WordPieces
from models.generation import CachedDecoder
from models.nlvr import NlvrClassifier
from models.text import write_vocabulary
from utils import write_json

MOST_APART = 1e-3  # onnxruntime's outputs from torch's, as a share of the largest


class Piece(nn.Module):
    """A part of a model that becomes a file: a function of tensors (B, ...) to others (B, ...)."""

    def __init__(self, model: nn.Module, compute: Callable, inputs: dict, outputs: list, texts=()):
        """`inputs` are examples by name, B = 2; those in `texts` (B, T) may have any T."""
        super().__init__()
        self.model, self.compute = model, compute  # which reads the model's parameters
        self.inputs, self.outputs, self.texts = inputs, outputs, texts

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs."""
        return self.compute(*inputs)

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        """The traced piece, for any number of samples and tokens."""
        batch, length = Dim("batch"), Dim("length", max=self.model.max_tokens)
        dims = [{0: batch} | ({1: length} if n in self.texts else {}) for n in self.inputs]
        return torch.export.export(self, (*self.inputs.values(),), dynamic_shapes=(tuple(dims),))


def pieces(model: nn.Module, image_size: int) -> dict[str, Piece]:
    """The files of a model in eval mode, by name."""
    image, ids = torch.randn(2, 3, image_size, image_size), torch.arange(10).view(2, 5)
    if isinstance(model, NlvrClassifier):
        mask = (ids != 9).long()  # the second text is padded
        inputs = {"image0": image, "image1": -image, "input_ids": ids, "attention_mask": mask}
        texts = "input_ids", "attention_mask"

        def judge(image0: Tensor, image1: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            images = model.visual_encoder(image0), model.visual_encoder(image1)
            return model.cls_head(model.encode_text(images, ids, mask)[:, 0])

        return {"model": Piece(model, judge, inputs, ["logits"], texts)}
    if isinstance(model, ClipRetrieval):
        ids = torch.arange(2 * model.context_length).view(2, -1) % model.vocab_size
        towers = {"vision": (model.encode_image, "image", image)}
        towers["text"] = model.encode_text, "input_ids", ids
        return {
            name: Piece(
                model, lambda x, f=encode: f(x, normalize=True), {n: x}, [f"{name}_features"]
            )
            for name, (encode, n, x) in towers.items()
        }
    assert isinstance(model, Captioner)
    decoder = model.text_decoder

    def vision(image: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder's layers attend to, keys and values (B, layers, heads, L, d)."""
        caches = CachedDecoder(decoder, model.encode_image(image), 1).image_caches
        return tuple(torch.stack(layers, dim=1) for layers in zip(*caches, strict=True))

    def step(ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Log-probabilities (B, V) of the token that follows texts (B, T)."""
        no_image = keys.new_empty(ids.shape[0], 1, decoder.config.encoder_hidden_size)
        cached = CachedDecoder(decoder, no_image, ids.shape[1])
        cached.image_caches = list(zip(keys.unbind(1), values.unbind(1), strict=True))
        causal = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool).tril()
        hidden = cached.feed(ids, torch.arange(ids.shape[1]), causal)
        return cached.log_probabilities(hidden[:, -1:])[:, 0]

    with torch.no_grad():
        attended = dict(zip(("image_keys", "image_values"), vision(image), strict=True))
    inputs = {"input_ids": ids, **attended}
    return {
        "vision": Piece(model, vision, {"image": image}, list(attended)),
        "decoder": Piece(model, step, inputs, ["log_probabilities"], ["input_ids"]),
    }


def write_folder(model: nn.Module, config: dict, folder: Path) -> str:
    """Fills a folder with a file for each piece, `config.json` and the vocabulary.

    Returns:
        What onnxruntime found of it.

    Raises:
        RuntimeError: its outputs are not torch's.
    """
    settings = {"image_size": config["image_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    if isinstance(model, Captioner):
        prompt = model.tokenize([model.prompt])[0][0, : model.prompt_length].tolist()
        settings |= {"prompt_ids": prompt, "end_id": model.tokenizer.sep_token_id}
        settings |= {key: config[key] for key in ("min_length", "max_length")}
    tokenizer = model.tokenizer
    if isinstance(model, ClipRetrieval):
        settings |= {"context_length": model.context_length}
        settings |= {"logit_scale": model.logit_scale.exp().item()}
        tokenizer = tokenizer.tokenizer if isinstance(tokenizer, WordPieces) else None  # OpenAI's
    if tokenizer:
        write_vocabulary(tokenizer, folder)
    write_json(folder / "config.json", settings)
    apart = []
    for name, piece in pieces(model, config["image_size"]).items():
        names = {"input_names": list(piece.inputs), "output_names": piece.outputs}
        written = torch.onnx.export(piece.program(), dynamo=True, verbose=False, **names)
        written.save(folder / f"{name}.onnx")
        if find_spec("onnxruntime"):
            apart.append(difference(piece, folder / f"{name}.onnx"))
    if not apart:
        return "not checked: pip install onnxruntime"
    return f"onnxruntime's outputs are torch's within {max(apart):.1e} of the largest"


@torch.no_grad()
def difference(piece: Piece, file: Path) -> float:
    """The largest difference between onnxruntime's outputs and torch's, by the largest of these."""
    from onnxruntime import InferenceSession  # not among the requirements

    inputs = {name: torch.cat([x, x[:1]]) for name, x in piece.inputs.items()}  # three samples
    inputs |= {name: torch.cat([inputs[name]] * 2, dim=1) for name in piece.texts}
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(piece.outputs, {name: x.numpy() for name, x in inputs.items()})
    expected, apart = piece(*inputs.values()), 0.0
    for a, b in zip(found, [expected] if torch.is_tensor(expected) else expected, strict=True):
        apart = max(apart, ((torch.from_numpy(a) - b).abs().max() / b.abs().max()).item())
    if not apart < MOST_APART:
        raise RuntimeError(f"{file}: onnxruntime's outputs are {apart:.1e} apart from torch's")
    return apart
