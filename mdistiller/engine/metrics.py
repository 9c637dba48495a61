"""Numbers of the training steps, read from the device a few times an epoch instead of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.engine.distributed import sum_over_ranks
from mdistiller.engine.utils import AverageMeter
from mdistiller.registry import UserError


class NonFiniteLossError(UserError):
    """A term of the loss became infinite or NaN."""


@dataclass
class _Step:
    """One step's scalars, still on the device."""

    label: str
    batch_size: int
    names: list[str]
    num_terms: int  # the first of the names are terms of the loss
    values: Tensor


def _scalar(value: Tensor) -> Tensor:
    """The mean of a tensor in full precision; of one number, without an operation."""
    value = value.detach().float()
    return value.mean() if value.ndim else value


class Meters(dict[str, AverageMeter]):
    """Running means by name, each made on first use.

    Args:
        interval: after how many steps :meth:`add` reads what waits on the device; 1 where reading
            costs nothing.
    """

    def __init__(self, interval: int = 1):
        super().__init__()
        self.interval = interval
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
        values = [_scalar(value) for value in (*terms.values(), *others.values())]
        step = _Step(label, batch_size, [*terms, *others], len(terms), torch.stack(values))
        self._waiting.append(step)
        if len(self._waiting) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Read the queued steps into the meters; `losses` is the sum of the terms.

        Raises:
            NonFiniteLossError: names the first step with a term that is not finite, and its terms.
        """
        steps, self._waiting = self._waiting, []
        if not steps:
            return
        numbers = iter(torch.cat([step.values for step in steps]).tolist())
        for step in steps:
            row = {name: next(numbers) for name in step.names}
            terms = dict(list(row.items())[: step.num_terms])
            if not all(map(math.isfinite, terms.values())):
                shown = ", ".join(f"{name}={value:g}" for name, value in terms.items())
                raise NonFiniteLossError(f"non-finite loss in {step.label}: {shown}")
            for name, value in row.items():
                self[name].update(value, step.batch_size)
            self["losses"].update(sum(terms.values()), step.batch_size)

    def averages(self, device: torch.device) -> dict[str, float]:
        """Means over all processes, by name."""
        self.flush()
        if not math.isfinite(self["losses"].avg):  # of a trainer that keeps its own meters
            raise NonFiniteLossError("non-finite loss: the mean over the epoch is no number")
        names = sorted(self)
        sums = [[self[name].sum, self[name].count] for name in names]
        totals = sum_over_ranks(torch.tensor(sums, device=device).reshape(-1, 2)).tolist()
        return {
            name: total / count if count else 0.0
            for name, (total, count) in zip(names, totals, strict=True)
        }
