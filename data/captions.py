"""Words of COCO captions and NLVR2 statements."""

import re

OTHER_SIDE = {"left": "right", "right": "left"}


def normalize_caption(text: str, max_words: int) -> str:
    """Lower-cases a caption as BLIP does, drops punctuation, and keeps the first words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
