"""Datasets of captions, statements and pairs for retrieval, and the embedded scenes."""

from data.captions import normalize_caption

__all__ = ["normalize_caption"]
