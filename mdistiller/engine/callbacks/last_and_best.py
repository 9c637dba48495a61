"""Scores on the test set after the training (DATASET.VAL_SPLIT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mdistiller.engine.checkpoints.write import load_checkpoint
from mdistiller.engine.utils import evaluate


def last_and_best(
    net: nn.Module, file: Path, test: Any, prefix: str = "", model: nn.Module | None = None
) -> dict[str, float]:
    """Accuracies in percent on the test set, under their names in a summary.

    Args:
        net: of the last epoch, and left so.
        file: the checkpoint with its weights of the best epoch.
        test: the loader.
        model: a distiller that evaluates `net`; by default it is one.
    """
    last = {key: value.clone() for key, value in net.state_dict().items()}
    scores: dict[str, float] = {}
    for which in ("last", "best"):
        if which == "best":
            net.load_state_dict(load_checkpoint(file)["model"])
        numbers = evaluate(test, net if model is None else model)
        names = [name for name in ("acc", "balanced_acc", "macro_f1") if name in numbers]
        scores |= {f"{prefix}test_{name}_{which}": numbers[name] for name in names}
    net.load_state_dict(last)
    return scores
