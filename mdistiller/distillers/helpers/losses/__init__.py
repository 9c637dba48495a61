"""Losses that several methods use, and the numerics below them."""
