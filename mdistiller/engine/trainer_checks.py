"""Settings that a trainer, or so short an epoch, cannot follow."""

from __future__ import annotations

from typing import Any

from mdistiller.engine.optim.schedules import by_step
from mdistiller.frozen_teacher.cacheable import is_wanted
from mdistiller.registry import UserError


def check_trainer_settings(trainer: Any, cfg: Any, train_loader: Any = None) -> None:
    """Refuse settings without effect on the steps, inputs or scores of a trainer's class.

    Args:
        trainer: the class, a BaseTrainer.
        train_loader: to compare the length of an epoch with SOLVER.ACCUMULATE.
    """
    solver = cfg.SOLVER
    wanted = [key for key in ("EMA", "SKIP_NONFINITE") if solver[key]]
    wanted += ["ACCUMULATE"] if solver.ACCUMULATE > 1 else []
    wanted += ["SCHEDULE_BY"] if by_step(solver) else []
    if trainer.own_steps and wanted:
        raise UserError(
            f"SOLVER.{wanted[-1]} has no effect on SOLVER.TRAINER {solver.TRAINER}, which "
            f"makes its steps itself: leave it out, or set {trainer.__name__}.own_steps = False if "
            "it calls super()"
        )
    if is_wanted(cfg) and (trainer.own_steps or trainer.own_inputs):
        part, flag = ("steps", "own_steps") if trainer.own_steps else ("inputs", "own_inputs")
        raise UserError(
            f"DISTILLER.TEACHER_CACHE {cfg.DISTILLER.TEACHER_CACHE}: SOLVER.TRAINER "
            f"{solver.TRAINER} makes its {part} itself; set it to none, or "
            f"{trainer.__name__}.{flag} = False if that only adds to what it inherits"
        )
    if trainer.selects != "test_acc" and cfg.LOG.get("SELECT_BY", "top1") != "top1":
        raise UserError(
            f"LOG.SELECT_BY {cfg.LOG.SELECT_BY} has no effect on SOLVER.TRAINER "
            f"{solver.TRAINER}, which selects by {trainer.selects}: set it to top1"
        )
    if solver.ACCUMULATE > 1 and train_loader is not None:
        batches = len(train_loader)
        if batches < solver.ACCUMULATE:
            raise UserError(
                f"SOLVER.ACCUMULATE {solver.ACCUMULATE} is more than the {batches} batches of "
                f"an epoch (SOLVER.BATCH_SIZE {solver.BATCH_SIZE} a process); lower it"
            )
