"""Datasets of captions, statements and pairs for retrieval, and the embedded scenes."""

from utils import lazy_names

__getattr__ = lazy_names({"normalize_caption": "data.captions"})
