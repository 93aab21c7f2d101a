"""Datasets of captions, statements and pairs for retrieval, and the embedded scenes."""
