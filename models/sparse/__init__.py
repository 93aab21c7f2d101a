"""Linear layers that keep only the nonzeros of their weights and multiply by them."""

from models.sparse.linear import LayerReport, SparseLinear, SparsifyReport, sparsify_

__all__ = ["LayerReport", "SparseLinear", "SparsifyReport", "sparsify_"]
