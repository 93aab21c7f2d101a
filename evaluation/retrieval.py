"""Retrieval between images and texts: features of a whole split, and recalls."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.loading import EvalOptions
from engine.processes import gather_from_processes

RANKS = (1, 5, 10)


@torch.no_grad()
def evaluate_retrieval(
    model: nn.Module, dataset: Dataset, split: str, options: EvalOptions
) -> dict:
    """Recalls among all images of a split and all its `dataset.texts`, the same on every process.

    Every process calls it, with CLIP in eval mode.
    """
    with options.autocast():
        images = _features(model.encode_image, options.batches(dataset, "images"))
        texts = _features(
            lambda texts: model.encode_text(model.tokenize(texts)[0].to(options.device)),
            options.batches(dataset.texts, "texts"),
        )
    return {"scores": recalls(images @ texts.T, dataset.image_of_text)}


def _features(encode: Callable, batches: Iterable[tuple]) -> Tensor:
    """Normalised float32 features (N, D) of all processes' (inputs, places), in order of place."""
    own = [(F.normalize(encode(inputs).float(), dim=-1).cpu(), n.cpu()) for inputs, n in batches]
    shares = gather_from_processes(own)
    features, numbers = zip(*(batch for share in shares for batch in share), strict=True)
    numbers = torch.cat(numbers)
    assert torch.equal(numbers.sort().values, torch.arange(len(numbers)))
    return torch.cat(features)[numbers.argsort()]


def recalls(similarities: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recalls in percent: `txt_r1`, `txt_r5`, `txt_r10`, their mean `txt_r_mean`; `img`; `r_mean`.

    Text recall is the share of images with one of their own texts among the k most similar texts;
    image recall is the share of texts with their image among the k most similar images. Ties and
    NaN count against the model: if all similarities are equal, it finds nothing.

    Args:
        similarities: (I, T), of every image to every text.
        image_of_text: (T,) the row of each text's image; every image has a text.
    """
    similarities, image_of_text = torch.as_tensor(similarities), torch.as_tensor(image_of_text)
    images, texts = similarities.shape
    rows = torch.arange(images, device=similarities.device)
    right = image_of_text.to(rows.device) == rows[:, None]  # (I, T)
    assert image_of_text.shape == (texts,) and right.any(dim=1).all() and right.any(dim=0).all()
    own = similarities.masked_fill(~right | similarities.isnan(), -torch.inf)
    result = {}
    for name, dim in (("txt", 1), ("img", 0)):
        best = own.amax(dim, keepdim=True)  # (I, 1): an image's nearest own text; (1, T)
        before = (~(similarities < best) & ~right).sum(dim)  # wrong ones at least as near
        shares = {f"{name}_r{k}": 100 * int((before < k).sum()) / len(before) for k in RANKS}
        result |= shares | {f"{name}_r_mean": sum(shares.values()) / len(RANKS)}
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2}
