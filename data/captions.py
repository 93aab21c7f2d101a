"""Words of COCO captions and NLVR2 statements."""

import re

OTHER_SIDE = {"left": "right", "right": "left"}


def normalize_caption(text: str, max_words: int) -> str:
    """Lower-cases a caption, drops punctuation that carries no meaning, and shortens it.

    Args:
        text: A caption or statement as annotated.
        max_words: Words to keep, counted by single spaces.

    Returns:
        The text as BLIP trains on it (Li et al., ICML 2022).
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
