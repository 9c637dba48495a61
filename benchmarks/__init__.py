"""Measured speed of the library, for its developers: `python tools/benchmark.py`."""
