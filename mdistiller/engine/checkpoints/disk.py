"""Whether the checkpoints that a run is going to keep fit on its disk."""

from __future__ import annotations

import shutil

from mdistiller.engine.hooks import Trainer
from mdistiller.engine.utils import print_log

_SLOTS = {"SGD": 1, "Adam": 2, "AdamW": 2}
"""Values that an optimizer keeps for each weight; 2 for any other."""


def checkpoint_bytes(trainer: Trainer) -> int:
    """What a checkpoint is going to take: networks, optimizer, moving average."""
    weights = sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
    student = sum(p.numel() * p.element_size() for p in trainer.model.student.parameters())
    groups = trainer.optimizer.param_groups
    trained = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
    slots = _SLOTS.get(type(trainer.optimizer).__name__, 2)
    return weights + slots * trained + (student if trainer.cfg.SOLVER.EMA else 0)


def warn_of_low_disk(trainer: Trainer) -> None:
    """Print a warning if the run folder's disk has less space than the remaining checkpoints need.

    They are `latest`, `previous`, `best`, the numbered ones, and one that is being written.
    """
    log = trainer.cfg.LOG
    numbered = trainer.cfg.SOLVER.EPOCHS // log.SAVE_CHECKPOINT_FREQ
    numbered = min(numbered, log.KEEP_CHECKPOINTS or numbered)
    there = [trainer.log_path / name for name in ("latest", "previous", "best")]
    there += trainer.log_path.glob("epoch_*")
    count = 4 + numbered - sum(path.is_file() for path in there)
    wanted = max(count, 1) * checkpoint_bytes(trainer)
    free = shutil.disk_usage(trainer.log_path).free
    if free < wanted:
        print_log(
            f"low disk: {trainer.log_path} has {free / 1e6:.0f} MB left, and about {count} "
            f"checkpoints still to come take {wanted / 1e6:.0f} MB (LOG.SAVE_CHECKPOINT_FREQ "
            "and KEEP_CHECKPOINTS make them fewer)"
        )
