"""Words of COCO captions and NLVR2 statements."""

import re

OTHER_SIDE = {"left": "right", "right": "left"}


def normalize_caption(text: str, max_words: int) -> str:
    """Lower-cases a caption as BLIP does, drops punctuation, and keeps the first words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def prompted(prompt: str, caption: str, max_words: int) -> str:
    """The text whose tokens are predicted: prompt and normalised caption, parted by a space."""
    space = " " * (prompt != "" and not prompt[-1].isspace())
    return prompt + space + normalize_caption(caption, max_words)
