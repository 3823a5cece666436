"""Dull float64 twins of every op in plain torch: what the kernels are tested against."""
