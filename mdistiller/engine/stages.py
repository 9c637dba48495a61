"""The stages that a method trains before the main one (docs/extend/method.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mdistiller.distillers import Distiller
from mdistiller.engine.optim.param_groups import without_frozen
from mdistiller.registry import UserError

STRIDE = 10**6
"""Distance of the epoch numbers that the loader gets in one stage and the next."""


@dataclass(frozen=True)
class Stage:
    """An initialisation stage.

    Attributes:
        name: as the method calls it.
        number: its place, from 1.
        groups: the parameter groups that it trains.
        solver: a SOLVER node with the stage's epochs, rate and schedule.
    """

    name: str
    number: int
    groups: list[dict[str, Any]]
    solver: Any


def stages_left(model: Distiller, saved: Mapping[str, Any] | None, solver: Any) -> Iterator[Stage]:
    """The method's stages in order, from the one that `saved` is of; each is on while yielded.

    Args:
        saved: what a checkpoint holds of the stage in which it was written, if any.
        solver: the run's SOLVER node.
    """
    names = list(model.init_stages())
    first = 0
    if saved is not None:
        if saved["stage"] not in names:
            raise UserError(
                f"the checkpoint is of the stage {saved['stage']!r}, which this config does not "
                "have"
            )
        first = names.index(saved["stage"])
    for number, name in enumerate(names[first:], start=first + 1):
        with running(model, name) as groups:
            yield Stage(name, number, groups, stage_solver(model, name, solver))


def stage_solver(model: Distiller, name: str, solver: Any) -> Any:
    """The SOLVER node with a stage's epochs, learning rate and steps of the rate."""
    plan: Any = model.init_stages()[name].init
    node = solver.clone()
    node.defrost()
    node.EPOCHS, node.LR = plan.epochs, plan.lr or node.LR
    node.SCHEDULE, node.WARMUP_EPOCHS, node.SCHEDULE_BY = "multistep", 0, "epoch"
    node.LR_DECAY_STAGES, node.LR_DECAY_RATE = list(plan.decay_stages), plan.decay_rate
    return node


@contextlib.contextmanager
def running(model: Distiller, stage: str) -> Iterator[list[dict[str, Any]]]:
    """`model` in an initialisation stage, whose parameter groups are given.

    Its forward is the stage's, and no other parameters have gradients: they stay as they are to
    the bit. Afterwards the model is as before, without gradients.
    """
    groups = without_frozen(model.init_stages()[stage].init_param_groups(), model.student)
    trained = {id(param) for group in groups for param in group["params"]}
    before = [(param, param.requires_grad) for param in model.parameters()]
    try:
        model.init_stage = stage
        for param, _ in before:
            param.requires_grad_(id(param) in trained)
        yield groups
    finally:
        model.init_stage = ""
        for param, wanted in before:
            param.requires_grad_(wanted)
            param.grad = None
