"""Linear layers that keep only the nonzeros of their weights and multiply by them."""
