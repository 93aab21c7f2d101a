"""Measuring the intrinsic dimension (ID) of what layers represent."""

from dimension.any_model import measure

__all__ = ["measure"]
