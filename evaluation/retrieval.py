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
    """Recalls among all images and all texts of a split. Every process calls it.

    Args:
        model: CLIP in eval mode, not wrapped.
        dataset: the split's images, its `texts` and `image_of_text`; each image and each text is
            encoded by one process.
        split: "val" or "test".
        options: device, batch size and precision.

    Returns:
        `{"scores": ...}` of `recalls`, the same on every process.
    """

    def encode_texts(texts: list[str]) -> Tensor:
        return model.encode_text(model.tokenize(texts)[0].to(options.device))

    with options.autocast():
        images = _features(model.encode_image, options.batches(dataset, "images"))
        texts = _features(encode_texts, options.batches(dataset.texts, "texts"))
    return {"scores": recalls(images @ texts.T, dataset.image_of_text)}


def _features(encode: Callable, batches: Iterable[tuple]) -> Tensor:
    """Normalised features (N, D) float32 on the CPU of all processes' inputs, in their order.

    Batches are of inputs and their numbers (B,) in the split. The result is equal everywhere.
    """
    own = [(F.normalize(encode(inputs).float(), dim=-1).cpu(), n.cpu()) for inputs, n in batches]
    shares = gather_from_processes(own)
    features, numbers = zip(*(batch for share in shares for batch in share), strict=True)
    numbers = torch.cat(numbers)
    assert torch.equal(numbers.sort().values, torch.arange(len(numbers)))
    return torch.cat(features)[numbers.argsort()]


def recalls(similarities: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions.

    Text recall is the share of images with one of their own texts among the k most similar texts;
    image recall the share of texts with their image among the k most similar images. Of equal
    similarities the wrong ones come first, and NaN comes last when it is right and first when it is
    wrong: a model that tells nothing apart finds nothing.

    Args:
        similarities: (I, T), of every image to every text.
        image_of_text: (T,) the row of each text's image; every image has a text.

    Returns:
        `txt_r1`, `txt_r5`, `txt_r10`, their mean `txt_r_mean`, the same of `img`, and `r_mean`, the
        mean of the two means; all in percent.
    """
    similarities, image_of_text = torch.as_tensor(similarities), torch.as_tensor(image_of_text)
    images, texts = similarities.shape
    rows = torch.arange(images, device=similarities.device)
    right = image_of_text.to(rows.device) == rows[:, None]  # (I, T)
    assert image_of_text.shape == (texts,) and right.any(dim=1).all() and right.any(dim=0).all()
    own = similarities.masked_fill(~right | similarities.isnan(), -torch.inf)
    best_text, own_image = own.amax(dim=1, keepdim=True), own.amax(dim=0)  # (I, 1), (T,)
    texts_before = (~(similarities < best_text) & ~right).sum(dim=1)  # (I,)
    images_before = (~(similarities < own_image) & ~right).sum(dim=0)  # (T,)
    result = {}
    for name, before in (("txt", texts_before), ("img", images_before)):
        shares = {f"{name}_r{k}": _percent(before < k) for k in RANKS}
        result |= shares | {f"{name}_r_mean": sum(shares.values()) / len(RANKS)}
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2}


def _percent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)
