"""The engine: configuration, building, training, checkpoints."""

from mdistiller.engine.deepkd import DeepKDTrainer
from mdistiller.engine.dot import DOTTrainer
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

__all__ = ["BaseTrainer", "DOTTrainer", "DeepKDTrainer", "trainer_dict"]
