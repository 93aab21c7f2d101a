"""Measuring the intrinsic dimension (ID) of what layers represent."""

from utils import lazy_names

__getattr__ = lazy_names({"measure": "dimension.any_model"})
