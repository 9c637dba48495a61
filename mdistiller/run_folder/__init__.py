"""The folder of a run: its name, lock, config and record, and what a continued run may change."""
