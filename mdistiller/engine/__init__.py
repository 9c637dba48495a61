"""The engine: configuration, building, training, checkpoints."""

from mdistiller.engine.trainer import trainer_dict

__all__ = ["trainer_dict"]
