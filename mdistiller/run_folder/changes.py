"""How a config differs from the one that a run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdistiller.config.tasks import TASKS, task_of
from mdistiller.config.values import flatten
from mdistiller.dataset.settings import unread_keys
from mdistiller.distillers import DISTILLERS, part_names
from mdistiller.distributed import world_size
from mdistiller.engine.cfg import CFG, method_nodes, own_sections
from mdistiller.registry import is_builtin
from mdistiller.run_folder.record import read_record, recorded_settings

_SEEDS = ("EXPERIMENT.SEED", "EXPERIMENT.LOGIT_STAND", "LOG.SELECT_BY", "LOG.PROBE")
_ARGUMENTS = ("DISTILLER.TEACHER_ARGS", "DISTILLER.STUDENT_ARGS", "SOLVER.OPTIMIZER_ARGS")
# Keys of the compared sections that leave the trained weights as they are.
WITHOUT_EFFECT = (
    "DATASET.NUM_WORKERS",
    "DATASET.WORKER_TIMEOUT",
    "DATASET.TEST",
    "DATASET.MAX_MEMORY_GB",
    "DISTILLER.TEACHER_CKPT",
    "DISTILLER.TEACHER_CFG",
    "DISTILLER.TEACHER_CACHE",
    "SOLVER.COMPILE",
    "SOLVER.CHANNELS_LAST",
    "SOLVER.FIND_UNUSED_PARAMETERS",
    "SOLVER.DETERMINISTIC",
    "SOLVER.SKIP_NONFINITE",
    "SOLVER.RANK_TIMEOUT",
)


def changed_settings(folder: Path, cfg: Any, goes_on: bool = False) -> list[str]:
    """The settings that influence weights and differ between a run's recorded config and `cfg`.

    Args:
        goes_on: whether the present processes are to continue the run. Then only the images of an
            optimizer step count, however they are split into micro-batches and processes.

    Returns:
        Texts "KEY was A, is now B".
    """
    recorded = recorded_settings(folder)
    changes = differences(recorded, cfg)
    if not goes_on:
        return changes
    processes = recorded_processes(folder)
    solvers = [(recorded.get("SOLVER", {}), processes), (cfg.SOLVER, world_size())]
    before, now = (
        node.get("BATCH_SIZE", 0) * node.get("ACCUMULATE", 1) * count for node, count in solvers
    )
    if before == now:
        shared = ("SOLVER.BATCH_SIZE ", "SOLVER.ACCUMULATE ")
        return [change for change in changes if not change.startswith(shared)]
    if processes != world_size():
        changes.append(
            f"{processes} processes took {before} images a step, {world_size()} now would take "
            f"{now}: SOLVER.BATCH_SIZE is that of each"
        )
    return changes


def side_settings(folder: Path, cfg: Any) -> list[str]:
    """The settings without influence on weights that differ from a run's recorded config."""
    recorded = recorded_settings(folder)
    names = ("LOG.", "EXPERIMENT.", *keys_without_effect(cfg), "DEVICE")
    keys = [key for key in flatten(cfg) if key.startswith(names) and key != "EXPERIMENT.NAME"]
    pairs = [(key, _get(recorded, key), _get(cfg, key)) for key in keys if key not in _SEEDS]
    return [
        _text(key, before, now)
        for key, before, now in pairs
        if before is not None and before != now
    ]


def _text(key: str, before: Any, now: Any) -> str:
    before, now = ("empty" if value == "" else value for value in (before, now))
    return f"{key} was {before}, is now {now}"


def recorded_processes(folder: Path) -> int:
    """How many processes trained a run last; the present number if it is not recorded."""
    try:
        return int(read_record(folder)["starts"][-1]["processes"])
    except (ValueError, KeyError, IndexError, TypeError):
        return world_size()


def differences(recorded: Mapping[str, Any], cfg: Any) -> list[str]:
    """:func:`changed_settings` for a config that was recorded as a nested mapping."""
    sections = ["DATASET", "DISTILLER", "LSKD", "SOLVER", *method_nodes(cfg)]
    sections += own_sections(cfg)
    keys = [*_SEEDS]
    keys += [f"{name}.{key}" for name in sections if name in cfg for key in flatten(cfg[name])]
    idle = keys_without_effect(cfg)
    keys = [key for key in keys if not key.startswith((*idle, *_ARGUMENTS))]
    changes = []
    # whole: what was given in one of the two only counts as well
    for key in (key for key in _ARGUMENTS if not key.startswith(idle)):
        before, now = (_get(config, key) or {} for config in (recorded, cfg))
        if before != now:
            changes.append(f"{key} was {dict(before)}, is now {dict(now)}")
    for key in keys:
        before, now = _get(recorded, key), _get(cfg, key)
        if before is None:  # a key newer than the run, which therefore ran with its default
            before = _get(CFG, key)
        if key == "DISTILLER.TEACHERS":
            before, now = _without_files(before or []), _without_files(now or [])
        elif key in ("DATASET.ROOT", "DISTILLER.STUDENT_CKPT"):
            before, now = (str(Path(str(value or "")).resolve()) for value in (before, now))
        if None not in (before, now) and before != now:
            changes.append(_text(key, before, now))
    return changes


def _without_files(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in ("CKPT", "CFG")} for entry in entries]


def keys_without_effect(cfg: Any) -> tuple[str, ...]:
    """Beginnings of keys: :data:`WITHOUT_EFFECT`, those of every task, and in classification those
    that the data set, method and trainer of this config do not read."""
    tasks = (key for task in TASKS.values() for key in task.without_effect)
    if task_of(cfg):
        return (*WITHOUT_EFFECT, *tasks)
    data = (f"DATASET.{key}" for key in unread_keys(cfg.DATASET))
    return (*WITHOUT_EFFECT, *tasks, *data, *_unread(cfg))


def _unread(cfg: Any) -> list[str]:
    """Keys outside of DATASET that a run of this config does not read; a method of the user's may
    read any."""
    node, parts = cfg.DISTILLER, [DISTILLERS.get(part) for part in part_names(cfg.DISTILLER.TYPE)]
    if not all(map(is_builtin, parts)):
        return []
    taught = any(getattr(part, "uses_teacher", True) for part in parts)
    plain = cfg.SOLVER.TRAINER in ("base", "crd")
    unread = {
        "LSKD.UNBIASED": not cfg.LSKD.ENABLE and not cfg.EXPERIMENT.LOGIT_STAND,
        "LSKD.EPS": not cfg.LSKD.ENABLE and not cfg.EXPERIMENT.LOGIT_STAND,
        "DISTILLER.TEACHER": not taught,
        "DISTILLER.COMBINE": not taught or not node.TEACHERS,
        "DISTILLER.CE_WEIGHT": len(parts) == 1,
        "SOLVER.DOT.": plain,
        "SOLVER.DEEPKD.": plain,
    }
    return [key for key, idle in unread.items() if idle]


def _get(node: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return list(node) if isinstance(node, tuple) else node
