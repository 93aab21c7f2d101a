"""Captions of a whole split, their scores, and pictures of them."""

from .captions import caption_split, generate_captions
from .figures import contact_sheet
from .scoring import score_captions, score_results

__all__ = [
    "caption_split",
    "contact_sheet",
    "generate_captions",
    "score_captions",
    "score_results",
]
