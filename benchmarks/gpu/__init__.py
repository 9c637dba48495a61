"""Everything that needs a GPU, checked and timed in one go: `python tools/gpu_check.py`."""
