"""Measuring the intrinsic dimension (ID) of what layers represent."""
