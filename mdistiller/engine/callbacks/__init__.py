"""The hooks of a run: evaluation, logs, checkpoints, moving average, guards, signals."""
