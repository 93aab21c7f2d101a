"""Scores of captions: BLEU, ROUGE-L, CIDEr, METEOR and, on request, SPICE."""

from pathlib import Path


def score_captions(
    results: list[dict], gt_path: str | Path, spice: bool = False, timeout_s: float = 900.0
) -> dict:
    """Scores captions against COCO references; what cannot be computed is said, never raised.

    Only the main process calls it.

    Args:
        results: `{"image_id": int, "caption": str}` an image; exactly the images of `gt_path`.
        gt_path: references in COCO's annotation format.
        spice: also compute SPICE, which downloads about 400 MB of models on first use.
        timeout_s: time limit of each metric, in seconds.

    Returns:
        `scores` {metric: float}, `left_out` {metric: sentence}, `tokenizer` (sentence) and
        `images`, a list of `{"image_id", "caption", "CIDEr", "references"}`.

    Raises:
        ValueError: results and references are not of the same images.
    """
    raise NotImplementedError


def score_results(
    results_path: str | Path, gt_path: str | Path, spice: bool = False, timeout_s: float = 900.0
) -> dict:
    """Scores a results file and writes what it finds beside it.

    `NAME.json` gives `NAME_scores.json` (`scores`, `left_out`, `tokenizer`) and
    `NAME_images.json` (caption, CIDEr and references of each image). Only the main process
    calls it.

    Args:
        results_path: file that `caption_split` wrote.
        gt_path, spice, timeout_s: as in `score_captions`.

    Returns:
        `scores`, `left_out` and `tokenizer` as in `score_captions`.
    """
    raise NotImplementedError
