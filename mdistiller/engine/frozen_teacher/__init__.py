"""The frozen teacher: folded, fused, cached."""
