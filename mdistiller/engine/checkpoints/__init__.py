"""Checkpoint files: writing, the files of a run, resuming."""
