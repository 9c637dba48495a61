"""Runs that differ only in the seed, and how the groups of them differ."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from mdistiller.config.tasks import TASKS, task_of
from mdistiller.config.values import flatten, lookup
from mdistiller.engine.cfg import CFG
from mdistiller.registry import UserError, suggest
from mdistiller.report.runs import Run
from mdistiller.run_folder.naming import folder_word

# Keys of places and logging, which make no difference to the result (SELECT_BY: to `best`).
_PLACES = (
    *("EXPERIMENT.NAME", "EXPERIMENT.PROJECT", "EXPERIMENT.TAG", "EXPERIMENT.SEED", "LOG."),
    *("IMPORTS", "DEVICE", "DATASET.NUM_WORKERS", "DATASET.MAX_MEMORY_GB", "DATASET.TEST."),
    *("DATASET.WORKER_TIMEOUT", "SOLVER.RANK_TIMEOUT", "SOLVER.FIND_UNUSED_PARAMETERS"),
)
_WEIGHTS = ("DISTILLER.STUDENT_CKPT", "DISTILLER.TEACHER_CKPT", "DISTILLER.TEACHER_CFG")
_PATHS = ("DATASET.ROOT", *_WEIGHTS)
_FILES = ("CKPT", "CFG")  # of an entry of DISTILLER.TEACHERS
_ONE_TEACHER = re.compile(r"DISTILLER\.TEACHER(_(CKPT|CFG|ARGS|NORM))?(\.|$)")
"""Keys whose place DISTILLER.TEACHERS takes."""
# The network and the images that accuracies belong to.
_SUBJECT = (
    *("DISTILLER.STUDENT", "DATASET.TYPE", "DATASET.ROOT", "DATASET.LABELS"),
    *("DATASET.IMAGE_SIZE", "DATASET.FRACTION", "DATASET.VAL_SPLIT", "DATASET.VAL_SEED"),
)
_SEED = re.compile(r"[,-]?(EXPERIMENT\.SEED|\bseed)[:=]\d+")


@dataclass
class Group:
    """Runs with one config and different seeds."""

    name: str
    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def processes(self) -> int:
        """That trained a run last."""
        starts = self.runs[0].record.get("starts") or [{}]
        return int(starts[-1].get("processes", 1))

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def by_seed(self, number: Callable[[Run], float | None]) -> dict[int, float]:
        """A number of the finished runs by seed; the mean of runs that share a seed."""
        values_of = defaultdict(list)
        for run in self.finished:
            value = number(run)
            if value is not None:
                values_of[run.seed].append(value)
        return {seed: fmean(values) for seed, values in values_of.items()}

    def facts(self, key: str) -> list[Any]:
        """The values of a key in the summaries of the finished runs, each once."""
        values = [run.summary[key] for run in self.finished if run.summary.get(key) is not None]
        return list(dict.fromkeys(values))

    def repeated_seeds(self) -> list[int]:
        """Seeds that several finished runs have."""
        return [s for s, count in Counter(run.seed for run in self.finished).items() if count > 1]

    def curve(self, key: str) -> list[list[float]]:
        """By epoch, a number of the finished runs, or of all runs while none has finished.

        It ends before an epoch that one of the runs lacks; where the epochs between have no such
        number (LOG.PROBE_FREQ), it is NaN.
        """
        runs = [run for run in self.finished or self.runs if run.epochs]
        curves = [{row["epoch"]: row.get(key, math.nan) for row in run.epochs} for run in runs]
        ends = [max((row["epoch"] for row in run.epochs if key in row), default=0) for run in runs]
        values: Iterator[list[Any]]
        values = ([each.get(n) for each in curves] for n in range(1, min(ends, default=0) + 1))
        return list(itertools.takewhile(lambda epoch: None not in epoch, values))


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    members_of: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        config = run.config or {"folder": str(run.folder)}
        members_of[tuple(sorted((k, str(v)) for k, v in _whole(config).items()))].append(run)
    groups = [Group(_common_name(members), members) for members in members_of.values()]
    for name, count in Counter(g.name for g in groups).items():
        alike = [g for g in groups if g.name == name]
        varying = varying_keys(alike) if count > 1 else {}
        for number, one in enumerate(alike):
            shown = ", ".join(f"{k.rpartition('.')[2]}={v[number]}" for k, v in varying.items())
            one.name = f"{name} ({shown[:80]})" if varying else name
    for name, count in Counter(g.name for g in groups).items():
        for number, one in enumerate([g for g in groups if g.name == name] if count > 1 else []):
            one.name = f"{name} #{number + 1}"
    return groups


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that makes a group; a key newer than the run has its default.

    A file is the same however it is spelled. A teacher or start in a folder with the run's own seed
    is that of the seed: runs that have one each are a group.
    """
    sections = {key.partition(".")[0] for key in config}
    defaults = {k: v for k, v in _defaults().items() if k.partition(".")[0] in sections}
    whole = {**defaults, **config}
    for key in (*_PATHS, *(key for task in TASKS.values() for key in task.paths)):
        if whole.get(key):
            whole[key] = str(Path(whole[key]).resolve())
    seed = config.get("EXPERIMENT.SEED", 0)
    own_seed = re.compile(rf"seed([:=_-]?){seed}(?!\d)")
    for key in _WEIGHTS:
        if whole.get(key):
            whole[key] = own_seed.sub(r"seed\1*", whole[key])
    several = whole.get("DISTILLER.TEACHERS")
    if several:
        whole["DISTILLER.TEACHERS"] = [
            {
                key: own_seed.sub(r"seed\1*", str(Path(v).resolve())) if key in _FILES else v
                for key, v in entry.items()
            }
            for entry in several
        ]
    return {
        k: v
        for k, v in whole.items()
        if (k == "LOG.SELECT_BY" or not k.startswith(_PLACES))
        and not (several and _ONE_TEACHER.match(k))
    }


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    values = ((key, lookup(CFG, key)) for key in flatten(CFG))
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values}


def _common_name(runs: Sequence[Run]) -> str:
    names = [_SEED.sub("", run.folder.name).strip(",-") or run.folder.name for run in runs]
    alike = itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False))
    return "".join(signs[0] for signs in alike).rstrip(" ,-_:=") or names[0]


def varying_keys(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Config keys that differ between groups, with the value of each group."""
    wholes = [_whole(g.config) for g in groups]
    keys = dict.fromkeys(key for whole in wholes for key in whole)
    values = {key: [whole.get(key) for whole in wholes] for key in keys}
    return {key: v for key, v in values.items() if len(set(map(str, v))) > 1 and key != "folder"}


def find_baselines(groups: Sequence[Group], name: str | None) -> list[Group]:
    """The groups that others are compared with; no two of them are comparable.

    Args:
        name: of a group, or of a sweep's row, whose folders may be written otherwise. None: plain
            training of each student, where exactly one group is that.

    Raises:
        UserError: no group has the name.
    """
    if name is not None:
        named = {g.name: g for g in groups}
        base = named.get(name) or named.get(folder_word(name))
        if base is None:
            names = ", ".join(named)
            raise UserError(f"--baseline {name!r}{suggest(name, named)}: the groups are {names}")
        return [base]
    distilled = [g for g in groups if g.config.get("DISTILLER.TYPE", "NONE") != "NONE"]
    plain = [g for g in groups if g.config.get("DISTILLER.TYPE") == "NONE"]
    plain = [g for g in plain if any(comparable(g, d) for d in distilled)]
    return [g for g in plain if sum(comparable(g, other) for other in plain) == 1]


def comparable_groups(groups: Sequence[Group], base: Group | None) -> list[Group]:
    """The groups that compare with a baseline; all of them without one."""
    return [g for g in groups if base is None or comparable(g, base)]


def measure(groups: Sequence[Group]) -> str:
    """What their accuracy is."""
    return " or ".join(dict.fromkeys(_measure(run) for g in groups for run in g.runs))


def _measure(run: Run) -> str:
    task = task_of(run.config)
    if task is not None:
        return task.score_name
    return "k-NN" if "last_knn" in run.summary and "last_acc" not in run.summary else "top-1"


def comparable(first: Group, second: Group) -> bool:
    """Whether a difference in accuracy means anything: one student, data set and split."""
    ours, theirs = _whole(first.config), _whole(second.config)
    subject = {*_SUBJECT, *(key for task in TASKS.values() for key in task.subject)}
    network = {k for k in {**ours, **theirs} if k.startswith("DISTILLER.STUDENT_ARGS.")}
    return all(ours.get(key) == theirs.get(key) for key in subject | network)


def otherwise(first: Group, second: Group) -> list[tuple[str, Any, Any]]:
    """Settings of steps and images that two groups differ in: key, the first's, the second's."""
    ours, theirs = _whole(first.config), _whole(second.config)
    keys = [key for key in ours if key.startswith(("SOLVER.", "DATASET.")) and key not in _SUBJECT]
    return [(key, ours[key], theirs.get(key)) for key in keys if ours[key] != theirs.get(key)]


@dataclass
class Grid:
    """Groups that fill a table of two config keys and agree in all others.

    Attributes:
        keys: of the rows and of the columns.
        axes: their values.
        cells: groups by pair of values; some may be missing.
        fixed: values that these groups share and others do not.
    """

    keys: tuple[str, str]
    axes: tuple[list[Any], list[Any]]
    cells: dict[tuple[str, str], Group]
    fixed: dict[str, Any]


def grids(groups: Sequence[Group]) -> list[Grid]:
    """Grids of at least 2 x 2 with more than half their cells filled, the largest first."""
    varying = _apart(varying_keys(groups))
    candidates = []
    for pair in itertools.combinations(varying, 2):
        rest = [key for key in varying if key not in pair]
        buckets: dict[Any, list[int]] = defaultdict(list)
        for number in range(len(groups)):
            buckets[tuple(str(varying[key][number]) for key in rest)].append(number)
        for members in buckets.values():
            axes = tuple(
                _sorted({str(varying[k][n]): varying[k][n] for n in members}) for k in pair
            )
            size = len(axes[0]) * len(axes[1])
            if min(map(len, axes)) < 2 or len(members) * 2 <= size or len(members) < 4:
                continue
            first, second = (varying[key] for key in pair)
            cells = {(str(first[n]), str(second[n])): groups[n] for n in members}
            fixed = {key: varying[key][members[0]] for key in rest}
            candidates.append(Grid(pair, (axes[0], axes[1]), cells, fixed))
    candidates.sort(key=lambda grid: -len(grid.cells))
    kept: list[Grid] = []
    for grid in candidates:  # each group in one
        taken = {id(g) for other in kept for g in other.cells.values()}
        if not taken & {id(g) for g in grid.cells.values()}:
            kept.append(grid)
    return kept


def _apart(varying: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Of keys that always change together, the first."""
    patterns: dict[tuple[int, ...], str] = {}
    for key, values in varying.items():
        texts = list(map(str, values))
        patterns.setdefault(tuple(texts.index(text) for text in texts), key)
    return {key: list(varying[key]) for key in patterns.values()}


def _sorted(values: Mapping[str, Any]) -> list[Any]:
    try:
        return sorted(values.values())
    except TypeError:
        return list(values.values())
