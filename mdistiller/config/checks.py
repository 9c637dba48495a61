"""Refusal of values that have the right type and no meaning."""

from __future__ import annotations

from yacs.config import CfgNode

from mdistiller.config.safe_yaml import shown
from mdistiller.config.values import flatten, lookup
from mdistiller.registry import Registry, UserError

AT_LEAST = {
    "SOLVER.BATCH_SIZE": 1,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.EPOCHS": 1,
    "SOLVER.WARMUP_EPOCHS": 0,
    "SOLVER.PATIENCE": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.CLIP_GRAD_NORM": 0,
    "SOLVER.EMA": 0,
    "SOLVER.QAT_EPOCHS": 0,
    "SOLVER.MIN_LR": 0,
    "SOLVER.SKIP_NONFINITE": 0,
    "SOLVER.LABEL_SMOOTHING": 0,
    "DATASET.TEST.BATCH_SIZE": 1,
    "DATASET.VAL_SPLIT": 0,
    "LOG.TENSORBOARD_FREQ": 1,
    "LOG.SAVE_CHECKPOINT_FREQ": 1,
    "LOG.PROBE_FREQ": 1,
    "LOG.KEEP_CHECKPOINTS": 0,
    "LOG.SAVE_EVERY_MINUTES": 0,
    "LOG.MISTAKES": 0,
    "EXPERIMENT.SEED": 0,
    "LSKD.EPS": 0,
}
POSITIVE = ("SOLVER.LR", "SOLVER.RANK_TIMEOUT", "DISTILLER.TEACHER_CACHE_GB")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SCHEDULES = Registry("schedule (SOLVER.SCHEDULE)")
"""Filled by `engine/optim/schedules.py`, which imports torch, and by users."""
_BUILT_IN_SCHEDULES = ("multistep", "cosine", "plateau", "constant")
ONE_OF = {
    "SOLVER.AMP": ("none", "bf16", "fp16"),
    "DISTILLER.TEACHER_DTYPE": ("auto", "fp32", "bf16", "fp16"),
    "DISTILLER.TEACHER_CACHE": ("none", "memory", "disk"),
    "DISTILLER.COMBINE": ("losses", "ensemble", "confidence"),
    "LOG.SELECT_BY": ("top1", "balanced_accuracy", "macro_f1", "loss"),
    "SOLVER.SCHEDULE_BY": ("epoch", "step"),
    "SOLVER.COMPILE": (True, False, *COMPILE_MODES),
}


def check_values(cfg: CfgNode) -> None:
    """Refuse values that have the right type and no meaning. A kind of run may lack some keys."""
    values = {name: lookup(cfg, name) for name in flatten(cfg)}
    for name, low in AT_LEAST.items():
        if values.get(name, low) < low:
            raise UserError(f"{name} must be at least {low}, got {values[name]}")
    for name in POSITIVE:
        if values.get(name, 1.0) <= 0:
            raise UserError(f"{name} must be positive, got {values[name]}")
    schedules = tuple(dict.fromkeys((*_BUILT_IN_SCHEDULES, *SCHEDULES)))
    for name, allowed in {**ONE_OF, "SOLVER.SCHEDULE": schedules}.items():
        if values.get(name, allowed[0]) not in allowed:
            choices = ", ".join(map(str, allowed))
            raise UserError(f"{name} must be one of {choices}, got {shown(values[name])}")
    for name in ("DATASET.MEAN", "DATASET.STD"):
        if any(type(item) not in (int, float) for item in values.get(name, ())):
            raise UserError(f"{name} must be numbers, got {shown(values[name])}")
    _check_solver(cfg.SOLVER)


def _check_solver(solver: CfgNode) -> None:
    if solver.NESTEROV and not solver.MOMENTUM:
        raise UserError("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if solver.EMA >= 1:
        raise UserError(f"SOLVER.EMA must be below 1 (0.999, say; 0: none), got {solver.EMA}")
    if solver.get("QAT_EPOCHS", 0) > solver.EPOCHS:
        raise UserError(
            f"SOLVER.QAT_EPOCHS {solver.QAT_EPOCHS} are the last of SOLVER.EPOCHS {solver.EPOCHS}, "
            "and cannot be more"
        )
    if solver.get("QAT_EPOCHS", 0) and (solver.COMPILE or solver.get("CUDA_GRAPHS")):
        raise UserError(
            "SOLVER.QAT_EPOCHS changes the student's layers in training: set SOLVER.COMPILE and "
            "SOLVER.CUDA_GRAPHS False"
        )
    if solver.get("LABEL_SMOOTHING", 0.0) >= 1:
        raise UserError(f"SOLVER.LABEL_SMOOTHING must be below 1, got {solver.LABEL_SMOOTHING}")
    if not 0 < solver.get("LAYER_DECAY", 1.0) <= 1:
        raise UserError(
            f"SOLVER.LAYER_DECAY must be above 0 and at most 1, got {solver.LAYER_DECAY}"
        )
    if solver.SCHEDULE != "plateau":
        return
    if solver.get("WARMUP_EPOCHS"):
        raise UserError("SOLVER.SCHEDULE plateau has no warm-up: set SOLVER.WARMUP_EPOCHS 0")
    if solver.get("SCHEDULE_BY") == "step":
        raise UserError("SOLVER.SCHEDULE plateau needs SOLVER.SCHEDULE_BY epoch")
    if not 0 < solver.LR_DECAY_RATE < 1:
        raise UserError(
            "SOLVER.SCHEDULE plateau needs a SOLVER.LR_DECAY_RATE between 0 and 1, got "
            f"{solver.LR_DECAY_RATE}"
        )
