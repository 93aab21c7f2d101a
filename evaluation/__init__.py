"""Captions, judgements and retrieval of a whole split, their scores, tables and figures."""
