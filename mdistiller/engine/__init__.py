"""The engine: the training loop, hooks, optimizers, metrics, checkpoints. Its trainers are imported
when they are asked for: reading a config does without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdistiller.engine.deepkd import DeepKDTrainer
    from mdistiller.engine.dot import DOTTrainer
    from mdistiller.engine.trainer import BaseTrainer, trainer_dict

__all__ = ["BaseTrainer", "DOTTrainer", "DeepKDTrainer", "trainer_dict"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdistiller.engine import deepkd, dot, trainer

    for module in (trainer, dot, deepkd):
        globals().update({key: vars(module)[key] for key in __all__ if key in vars(module)})
    return globals()[name]
