"""Linear layers that keep only the nonzeros of their weights and multiply by them."""

from utils import lazy_names

__getattr__ = lazy_names(
    {
        "LayerReport": "sparse.linear",
        "SparseLinear": "sparse.linear",
        "SparsifyReport": "sparse.linear",
        "sparsify_": "sparse.linear",
    }
)
