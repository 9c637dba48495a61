"""Numbers of the training steps, read from the device a few times an epoch instead of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.distributed import sum_over_ranks
from mdistiller.registry import UserError


class NonFiniteLossError(UserError):
    """A term of the loss, or a gradient, became infinite or NaN.

    Args:
        ago: how many steps before the last one of which numbers were given.
    """

    def __init__(self, text: str, ago: int = 0):
        super().__init__(text)
        self.ago = ago


class AverageMeter:
    """A running weighted mean. Attributes: `val` (last value), `sum`, `count`, `avg`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = 0.0
        self.sum = 0.0
        self.count = 0.0

    def update(self, val: float, n: float = 1) -> None:
        """Add `val`, the mean over `n` items."""
        self.val = float(val)
        self.sum += self.val * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.sum / self.count if self.count else 0.0


def correct_counts(logits: Tensor, target: Tensor, topk: Sequence[int] = (1, 5)) -> Tensor:
    """How many samples have their class among the k largest logits, for each k.

    A k above the number of classes counts as that number.

    Args:
        logits: [N, C].
        target: [N] class indices, or [N, C] class probabilities, whose largest is taken.

    Returns:
        [len(topk)] float32 counts, on the device of `logits`.
    """
    if target.is_floating_point():
        target = target.argmax(dim=1)
    largest = min(max(topk), logits.shape[1])
    ranked = logits.detach().topk(largest, dim=1).indices
    hits = (ranked == target[:, None]).float()
    return torch.stack([hits[:, :k].sum() for k in topk])


def count_cells(cells: Tensor, logits: Tensor, target: Tensor) -> None:
    """Add a batch to a confusion matrix, flat: [C * C], of floats, whose sums every device has."""
    cell = target * logits.shape[1] + logits.argmax(dim=1)
    cells.index_add_(0, cell, torch.ones_like(cell, dtype=cells.dtype))


MOST_CLASSES = 5000
"""Confusions among more are not counted: 100 MB."""


def class_scores(confusion: Tensor) -> Tensor:
    """Precision, recall and F1 of each class in percent, [3, C]; NaN for a class without images.

    Precision is 0 for a class that no image was assigned to.

    Args:
        confusion: images by true class (row) and predicted class (column), [C, C].
    """
    right, images, said = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    parts = torch.stack([right / said, right / images, 2 * right / (said + images)])
    scores = 100 * parts.nan_to_num(posinf=0.0)
    return scores.masked_fill(images == 0, math.nan)


def macro_scores(confusion: Tensor) -> Tensor:
    """Means of :func:`class_scores` over the classes that have images, [3].

    The mean recall is the balanced accuracy.
    """
    return class_scores(confusion).nanmean(dim=1)


SELECT_BY = {
    "top1": "test_acc",
    "balanced_accuracy": "test_balanced_acc",
    "macro_f1": "test_macro_f1",
    "loss": "test_loss",
}
"""Values of LOG.SELECT_BY, and the number of an epoch's record that each goes by."""


def score_of(record: Mapping[str, float], by: str, prefix: str = "") -> float:
    """The number of an epoch that LOG.SELECT_BY names; the best is the largest.

    Args:
        prefix: of the record's keys: "ema_" for the moving average.

    Raises:
        UserError: the evaluation did not give it.
    """
    key = prefix + SELECT_BY[by]
    if key not in record:
        raise UserError(
            f"LOG.SELECT_BY {by}: the evaluation has no {key} (there are more than {MOST_CLASSES} "
            "classes, or a trainer's own evaluation leaves it out); set it to top1"
        )
    value = -record[key] if by == "loss" else record[key]
    return -math.inf if math.isnan(value) else value


@dataclass
class _Step:
    """One step's scalars, still on the device."""

    label: str
    batch_size: int
    names: list[str]
    num_terms: int  # the first of the names are terms of the loss
    values: Tensor


def show_terms(terms: Mapping[str, float]) -> str:
    """Terms of a loss for an error."""
    return ", ".join(f"{name}={value:g}" for name, value in terms.items())


class Meters(dict[str, AverageMeter]):
    """Running means by name, each made on first use.

    Args:
        interval: after how many steps :meth:`add` reads what waits on the device; 1 where reading
            costs nothing.
        tolerant: steps with a term that is not finite are left out of the means.
    """

    def __init__(self, interval: int = 1, tolerant: bool = False):
        super().__init__()
        self.interval, self.tolerant = interval, tolerant
        self._waiting: list[_Step] = []

    def __missing__(self, name: str) -> AverageMeter:
        self[name] = AverageMeter()
        return self[name]

    def add(
        self, label: str, terms: Mapping[str, Tensor], others: Mapping[str, Tensor], batch_size: int
    ) -> None:
        """Queue the numbers of a step.

        Args:
            label: what to call the step in an error.
            terms: the terms of the loss, which must be finite; means over the batch.
            others: anything else to average, means over the batch.
        """
        values = []
        for value in (*terms.values(), *others.values()):
            number = value.detach().float()
            values.append(number.mean() if number.ndim else number)
        step = _Step(label, batch_size, [*terms, *others], len(terms), torch.stack(values))
        self._waiting.append(step)
        if len(self._waiting) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Read the queued steps into the meters; `losses` is the sum of the terms.

        Raises:
            NonFiniteLossError: names the first step with a term that is not finite, and its terms;
                not if it is `tolerant`.
        """
        steps, self._waiting = self._waiting, []
        if not steps:
            return
        numbers = iter(torch.cat([step.values for step in steps]).tolist())
        for ago, step in zip(reversed(range(len(steps))), steps, strict=True):
            row = {name: next(numbers) for name in step.names}
            terms = dict(list(row.items())[: step.num_terms])
            if not all(map(math.isfinite, terms.values())):
                if self.tolerant:
                    continue
                text = f"non-finite loss in {step.label}: {show_terms(terms)}"
                raise NonFiniteLossError(text, ago)
            for name, value in row.items():
                self[name].update(value, step.batch_size)
            self["losses"].update(sum(terms.values()), step.batch_size)

    @property
    def loss(self) -> float:
        """The mean of the summed terms so far; 0 before any were read."""
        return self["losses"].avg

    def sums(self) -> dict[str, list[float]]:
        """Last value, sum and count of every mean, by name: what :meth:`restore` takes."""
        return {name: [meter.val, float(meter.sum), meter.count] for name, meter in self.items()}

    def restore(self, parts: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Go on from one or several :meth:`sums`, added up."""
        for part in parts:
            for name, (value, total, count) in part.items():
                meter = self[name]
                meter.val, meter.sum, meter.count = value, meter.sum + total, meter.count + count

    def averages(self, device: torch.device) -> dict[str, float]:
        """Means over all processes, by name."""
        self.flush()
        if not math.isfinite(self["losses"].avg):  # of a trainer that keeps its own meters
            raise NonFiniteLossError("non-finite loss: the epoch's mean loss is NaN or infinite")
        names = sorted(self)
        sums = [[self[name].sum, self[name].count] for name in names]
        totals = sum_over_ranks(torch.tensor(sums, device=device).reshape(-1, 2)).tolist()
        return {
            name: total / count if count else 0.0
            for name, (total, count) in zip(names, totals, strict=True)
        }
