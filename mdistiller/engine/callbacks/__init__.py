"""The hooks of a run: evaluation, logs, checkpoints, EMA, NaN guard, signals."""
