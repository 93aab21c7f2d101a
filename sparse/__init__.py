"""Linear layers that keep only the nonzeros of their weights and multiply by them."""

from utils import lazy_names

_NAMES = ("LayerReport", "SparseLinear", "SparsifyReport", "sparsify_")
__getattr__ = lazy_names(dict.fromkeys(_NAMES, "sparse.linear"))
