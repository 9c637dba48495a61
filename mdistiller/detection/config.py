"""The config of a detection run: `load_config`, and defaults that differ from classification.

Sections EXPERIMENT, LOG and SOLVER are those of classification as far as they mean the same;
SOLVER counts iterations (optimizer steps) where classification counts epochs. An "epoch" of logs
and checkpoints has SOLVER.EVAL_PERIOD iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdistiller.config.defaults import ENGINE_CONFIG
from mdistiller.config.values import lookup
from mdistiller.dataset import DATASET_CONFIG
from mdistiller.detection.data import DATA
from mdistiller.detection.methods import DETECTOR_SETTINGS, LEVELS, method_sections
from mdistiller.detection.networks.models import NETWORK
from mdistiller.distillers import DISTILLERS
from mdistiller.engine.cfg import Config
from mdistiller.engine.cfg import load_config as load_any
from mdistiller.registry import UserError

ITERATIONS: dict[str, Any] = {
    "TRAINER": "detection",
    "BATCH_SIZE": 2,  # images per process and micro-batch
    "LR": 0.01,
    "MAX_ITER": 180000,  # in all
    "STEPS": [120000, 160000],  # after which LR is multiplied by LR_DECAY_RATE
    "WARMUP_ITERS": 1000,  # of linear warm-up, from WARMUP_FACTOR * LR
    "WARMUP_FACTOR": 0.001,
    "EVAL_PERIOD": 10000,  # iterations of an epoch, after which the student is evaluated and saved
    "WEIGHT_DECAY_NORM": 0.0,  # weight decay of batch norms and the like
    "EPOCHS": 1,  # follows from the above, not to be set
}
"""Keys of SOLVER that classification does not have, or that differ here."""

_LEFT_OUT = {  # of SOLVER: what counts epochs, or has no meaning here
    *("LR_DECAY_STAGES", "WARMUP_EPOCHS", "PATIENCE", "MIN_LR", "DOT"),
    *("COMPILE", "CUDA_GRAPHS", "CHANNELS_LAST", "LABEL_SMOOTHING", "QAT_EPOCHS"),
    *("FREEZE", "LR_BY_NAME", "LAYER_DECAY", "SCHEDULE_BY", "OPTIMIZER_ARGS"),
}
_CLASSIFIERS = ("SELECT_BY", "MISTAKES", "PROBE", "PROBE_FREQ")  # of LOG

DETECTION: dict[str, Any] = {
    "STUDENT": NETWORK,
    "TEACHER": NETWORK,
    "DATA": DATA,
    "LEVELS": list(LEVELS),  # of the pyramid, for methods that compare maps
    "EVALUATOR": "pycocotools",  # or faster: the same numbers, sooner; needs faster-coco-eval
    "EVALUATE_TEACHER": True,  # before the training
}


def default_config() -> Config:
    """A fresh config that holds every default."""
    solver = {key: value for key, value in ENGINE_CONFIG["SOLVER"].items() if key not in _LEFT_OUT}
    experiment = {k: v for k, v in ENGINE_CONFIG["EXPERIMENT"].items() if k != "LOGIT_STAND"}
    log = {k: v for k, v in ENGINE_CONFIG["LOG"].items() if k not in _CLASSIFIERS}
    shared = ("NUM_WORKERS", "WORKER_TIMEOUT", "SKIP_CORRUPT")
    return Config(
        {
            "EXPERIMENT": {**experiment, "PROJECT": "detection"},
            "DISTILLER": {"TYPE": "NONE"},  # a method (`methods.py`), or several: "DKD+REVIEWKD"
            "DETECTION": {**DETECTION, **{n: s.config for n, s in DETECTOR_SETTINGS.items()}},
            "DATASET": {key: DATASET_CONFIG[key] for key in shared},
            "SOLVER": {**solver, **ITERATIONS},
            "LOG": {**log, "TENSORBOARD_FREQ": 20, "SAVE_EVERY_MINUTES": 15.0},
            "DEVICE": ENGINE_CONFIG["DEVICE"],
            "LSKD": ENGINE_CONFIG["LSKD"],
            "IMPORTS": [],
            "HOOKS": [],
            **method_sections(),
        }
    ).clone()


def load_config(
    path: str | Path | Mapping[str, Any] = "",
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> Config:
    """Defaults, then the file, then `[key, value, ...]`; checked, and frozen.

    Args:
        path: of a YAML file, or what one holds.
        imports: further IMPORTS, relative to the working directory.
    """
    if isinstance(path, Mapping) and "SOLVER" in path:  # a run's, perhaps with another MAX_ITER
        solver = {key: value for key, value in path["SOLVER"].items() if key != "EPOCHS"}
        path = {**path, "SOLVER": solver}
    cfg = load_any(path, overrides, imports, defaults=default_config())
    check(cfg)
    cfg.defrost()
    for name in DETECTOR_SETTINGS.keys() & cfg.keys():  # there because a file was imported
        if cfg[name] != Config(DISTILLERS.config.get(name) or {}):
            raise UserError(f"{name}: set DETECTION.{name}, where this method's settings are")
        del cfg[name]
    epochs = -(-cfg.SOLVER.MAX_ITER // cfg.SOLVER.EVAL_PERIOD)
    if cfg.SOLVER.EPOCHS not in (ITERATIONS["EPOCHS"], epochs):
        raise UserError(
            f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}: detection counts iterations; set SOLVER.MAX_ITER, "
            "and SOLVER.EVAL_PERIOD for the iterations from one evaluation to the next"
        )
    cfg.SOLVER.EPOCHS = epochs
    cfg.freeze()
    return cfg


def check(cfg: Config) -> None:
    """Refuse invalid values of the right type."""
    solver = cfg.SOLVER
    for key, low in {"MAX_ITER": 1, "EVAL_PERIOD": 1, "WARMUP_ITERS": 0}.items():
        if solver[key] < low:
            raise UserError(f"SOLVER.{key} must be at least {low}, got {solver[key]}")
    if solver.WEIGHT_DECAY_NORM < 0:
        raise UserError(
            f"SOLVER.WEIGHT_DECAY_NORM must be at least 0, got {solver.WEIGHT_DECAY_NORM}"
        )
    if not 0 < solver.WARMUP_FACTOR <= 1:
        raise UserError(f"SOLVER.WARMUP_FACTOR must be in (0, 1], got {solver.WARMUP_FACTOR}")
    if any(step < 1 for step in solver.STEPS) or sorted(set(solver.STEPS)) != list(solver.STEPS):
        raise UserError(f"SOLVER.STEPS must be rising iterations from 1 on, got {solver.STEPS}")
    for name, allowed in {
        "SOLVER.SCHEDULE": ("multistep", "cosine", "constant"),
        "SOLVER.EMA": (0.0,),
        "SOLVER.NORM_DECAY": (True,),  # set by WEIGHT_DECAY_NORM
        "DETECTION.EVALUATOR": ("pycocotools", "faster"),
    }.items():
        value = lookup(cfg, name)
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise UserError(f"{name} must be one of {choices} in detection, got {value}")
