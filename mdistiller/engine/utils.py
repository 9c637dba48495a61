"""Meters, accuracy and validation, under the names that users of the original know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mdistiller.console import log_msg, progress
from mdistiller.distributed import sum_over_ranks, unwrap
from mdistiller.engine.checkpoints.write import load_checkpoint, save_checkpoint
from mdistiller.engine.metrics import (
    MOST_CLASSES,
    AverageMeter,
    correct_counts,
    count_cells,
    macro_scores,
)

__all__ = [
    "AverageMeter",
    "accuracy",
    "adjust_learning_rate",
    "evaluate",
    "load_checkpoint",
    "log_msg",
    "progress",
    "save_checkpoint",
    "validate",
]


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Accuracy in percent over the k largest logits, for each k; each a tensor of shape [1]."""
    counts = correct_counts(output, target, topk)
    return [(100.0 * count / len(output)).reshape(1) for count in counts]


@torch.no_grad()
def validate(
    val_loader: Iterable[Sequence[Tensor]],
    distiller: nn.Module,
    confusion: Tensor | None = None,
) -> tuple[float, float, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, over all processes.

    The distiller is in eval mode afterwards.

    Args:
        confusion: zeros [C, C] on the device, in floats, which become the number of images by class
            (row) and predicted class (column).
    """
    model = unwrap(distiller)
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(4, device=device)  # top-1 hits, top-5 hits, summed loss, samples
    for data in progress(val_loader, "eval"):
        image, target = (item.to(device, non_blocking=True) for item in data[:2])
        logits = model(image=image).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        totals[:2] += correct_counts(logits, target)
        totals[2] += loss
        totals[3] += len(target)
        if confusion is not None:
            count_cells(confusion.view(-1), logits, target)
    top1, top5, loss, samples = sum_over_ranks(totals).tolist()
    if confusion is not None:
        sum_over_ranks(confusion)
    if not samples:
        raise ValueError("the validation loader is empty")
    return 100.0 * top1 / samples, 100.0 * top5 / samples, loss / samples


def evaluate(val_loader: Any, distiller: nn.Module) -> dict[str, float]:
    """`acc`, `acc_top5` and `loss` of :func:`validate`, with `balanced_acc` and `macro_f1`.

    The latter two, in percent, are left out for more than MOST_CLASSES classes, and for a loader
    whose data set does not name its classes.
    """
    classes = len(getattr(getattr(val_loader, "dataset", None), "classes", ()))
    cells = None
    if 0 < classes <= MOST_CLASSES:
        cells = torch.zeros(classes, classes, device=next(distiller.parameters()).device)
    top1, top5, loss = validate(val_loader, distiller, cells)
    numbers = {"acc": top1, "acc_top5": top5, "loss": loss}
    if cells is not None:
        _, numbers["balanced_acc"], numbers["macro_f1"] = macro_scores(cells).tolist()
    return numbers


def last_and_best(
    net: nn.Module, file: Path, test: Any, prefix: str = "", model: nn.Module | None = None
) -> dict[str, float]:
    """Scores on the test set after the training (DATASET.VAL_SPLIT), by their names in a summary.

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


def adjust_learning_rate(epoch: int, cfg: Any, optimizer: Optimizer) -> float:
    """Set and return the multistep rate of an epoch, for trainers that do without the scheduler."""
    passed = sum(epoch > stage for stage in cfg.SOLVER.LR_DECAY_STAGES)
    rate: float = cfg.SOLVER.LR * cfg.SOLVER.LR_DECAY_RATE**passed
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
