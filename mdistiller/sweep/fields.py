"""Keys and values of a sweep file, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.config.early import check_early
from mdistiller.config.files import find_config, overlay, read_yaml, resolve_teachers
from mdistiller.config.values import as_read, coerce, flatten, literal, lookup
from mdistiller.registry import UserError, suggest

if TYPE_CHECKING:
    from mdistiller.engine.cfg import Config

# In a run's summary; with held-out images the first two are measured on those.
ACCURACIES = ("last_acc", "best_acc", "test_acc_last", "test_acc_best")
"""Metrics that every table shows."""
METRICS = (
    *ACCURACIES,
    *("last_balanced_acc", "best_balanced_acc", "last_macro_f1", "best_macro_f1"),
    *("last_knn", "best_knn"),  # of LOG.PROBE
)
DEFAULTS: dict[str, Any] = {
    "SWEEP": "",
    "CONFIG": "",
    "OVERRIDES": {},
    "VARIANTS": [],
    "GRID": {},
    "SPACE": {},
    "TRIALS": 0,
    "PRUNE": 0,
    "SEEDS": 1,
    "METRIC": "last_acc",
    "LOSS_FALLS": False,
    "TOGETHER": "auto",
}
_VARIANT: dict[str, Any] = {"NAME": "", "CONFIG": "", "OVERRIDES": {}, "GRID": {}, "TEACHER": ""}
SEED = "{seed}"  # in a value: the run's
# Config keys that a sweep sets for each run, and where they come from.
_SET_BY_SWEEP = {"EXPERIMENT.SEED": "SEEDS", "EXPERIMENT.NAME": "the trial", "LOG.PREFIX": "--out"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False


Axis = Range | tuple[Any, ...]


def check_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file's table with its defaults; keys and types of values are checked."""
    table = _checked(table, DEFAULTS, "")
    if not table["SWEEP"]:
        raise UserError("SWEEP must be the name of the study")
    if table["METRIC"] not in METRICS:
        raise UserError(
            f"METRIC {table['METRIC']!r} must be one of {', '.join(METRICS)}"
            f"{suggest(table['METRIC'], METRICS)}"
        )
    for key in ("TRIALS", "PRUNE"):
        if table[key] < 0:
            raise UserError(f"{key} must not be negative, got {table[key]}")
        if table[key] and not table["SPACE"]:
            raise UserError(f"{key} belongs to a search: add SPACE")
    if table["SPACE"]:
        for key in ("VARIANTS", "GRID"):
            if table[key]:
                raise UserError(f"SPACE and {key} exclude each other: search, or try all")
        if not table["TRIALS"]:
            raise UserError("SPACE needs TRIALS, the number of points to try")
        if table["METRIC"].startswith("test_"):
            raise UserError(
                f"METRIC {table['METRIC']}: a search must not select on the test set of a run that "
                "holds out images for that; use last_acc or best_acc"
            )
    table["SEEDS"] = _seeds(table["SEEDS"])
    together = as_read(table["TOGETHER"], None, "TOGETHER")
    table["TOGETHER"] = together = "off" if together is False else together  # YAML's off
    if together not in ("auto", "off") and not (type(together) is int and together > 0):
        raise UserError(
            f"TOGETHER {together!r} must be auto, off, or how many runs train in lock-step at most"
        )
    table["VARIANTS"] = [_variant(given) for given in table["VARIANTS"]] or [dict(_VARIANT)]
    return table


def check_file(path: str | Path, overrides: Sequence[str], imports: Sequence[str]) -> None:
    """Refuse wrong keys of a sweep file and of its configs, before torch is imported.

    Raises:
        UserError: as `read_plan` raises it.
    """
    file = find_config(path)
    table = check_table(read_yaml(file))
    seed = table["SEEDS"][0]
    for variant in table["VARIANTS"]:
        config = variant["CONFIG"] or table["CONFIG"]
        beside = file.parent / config
        config = beside if config and beside.is_file() else config
        both = words(overlay(nested(table["OVERRIDES"]), nested(variant["OVERRIDES"])))
        axes = {**table["GRID"], **variant["GRID"]}.items()
        first = [
            word
            for key, values in axes
            if isinstance(values, list) and values
            for word in (key, values[0])
        ]
        try:
            check_early(config, with_seed([*both, *first, *overrides], seed), imports)
        except UserError as error:
            name = variant["NAME"]
            raise UserError(f"{name}: {error}" if name else str(error)) from None


def _variant(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not given.get("NAME"):
        raise UserError(f"VARIANTS: each needs a NAME, got {given!r}")
    return _checked(given, _VARIANT, f"variant {given['NAME']}: ")


def _checked(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` over `defaults`."""
    table = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            near = suggest(key, defaults) or f" (keys: {', '.join(defaults)})"
            raise UserError(f"{where}unknown sweep key {key}{near}")
        if value is None or key in ("SEEDS", "TOGETHER"):
            pass
        elif isinstance(defaults[key], dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}{key} must be config keys with values, got {value!r}")
        elif isinstance(defaults[key], list):
            if not isinstance(value, list):
                raise UserError(f"{where}{key} must be a list, got {value!r}")
        else:
            value = coerce(value, defaults[key], f"{where}{key}")
        table[key] = defaults[key] if value is None else value
    return table


def _seeds(value: Any) -> list[int]:
    value = as_read(value, None, "SEEDS")
    seeds = list(range(value)) if type(value) is int else value
    if not isinstance(seeds, list) or not seeds or {type(seed) for seed in seeds} != {int}:
        raise UserError(f"SEEDS must be their number or a list of whole numbers, got {value!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"SEEDS {seeds} has one twice")
    return seeds


def nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as sections: `SOLVER: {LR: 1}` is kept, `SOLVER.LR: 1` becomes that."""
    sections: dict[str, Any] = {}
    for key, value in table.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        sections = overlay(sections, value)
    return sections


def words(sections: Mapping[str, Any]) -> list[Any]:
    """Sections as `[key, value, ...]`."""
    return [word for key in flatten(sections) for word in (key, lookup(sections, key))]


def with_seed(pairs: Sequence[Any], seed: int) -> list[Any]:
    """`[key, value, ...]` with the run's seed for `{seed}`."""
    return [_with_seed(word, str(seed)) for word in pairs]


def _with_seed(value: Any, seed: str) -> Any:
    if isinstance(value, str):
        return value.replace(SEED, seed)
    if isinstance(value, Mapping):
        return {key: _with_seed(part, seed) for key, part in value.items()}
    return [_with_seed(part, seed) for part in value] if isinstance(value, list) else value


def resolved(pairs: Sequence[Any], folder: Path) -> list[Any]:
    """`[key, value, ...]` of a file in `folder`, teachers' configs relative to it made absolute."""
    absolute = []
    for key, value in zip(pairs[0::2], pairs[1::2], strict=True):
        sections = nested({key: value})
        resolve_teachers(sections.get("DISTILLER"), folder)
        absolute += [key, lookup(sections, key)]
    return absolute


def as_settled(pairs: Sequence[Any], cfg: Config) -> list[Any]:
    """`[key, value, ...]` of a file with the values that `cfg`, or one like it, takes from it."""
    kinds = {key: lookup(cfg, key) for key in flatten(cfg)}
    settled = []
    for key, value in zip(pairs[0::2], pairs[1::2], strict=True):
        settled += [key, as_read(value, kinds.get(key), key)]
    return settled


def _choices(where: str, key: str, given: Sequence[Any], cfg: Config) -> list[Any]:
    """Values of an axis that is a list.

    Raises:
        UserError: two are equal, however they are written.
    """
    kind = lookup(cfg, key) if key in flatten(cfg) else None
    values: list[Any] = []
    for item in given:
        value = as_read(item, kind, key)
        value = value if isinstance(kind, str) else literal(value)
        for other, before in zip(given, values, strict=False):
            if value == before and isinstance(value, bool) == isinstance(before, bool):
                raise UserError(
                    f"{where}: {key}: {other} and {item} are the same value; leave one out"
                )
        values.append(value)
    return values


def refuse_set_keys(overrides: Sequence[Any], axes: Mapping[str, Any], where: str) -> None:
    """Refuse overrides of what differs between the trials."""
    for key in overrides[0::2]:
        if key in _SET_BY_SWEEP:
            raise UserError(f"{where} {key}: in a sweep that comes from {_SET_BY_SWEEP[key]}")
        if key in axes:
            raise UserError(f"{where} {key}: that is an axis of the sweep")


def grid_axes(grid: Mapping[str, Any], cfg: Config) -> dict[str, list[Any]]:
    """The axes of a grid, each a list; `DISTILLER.TYPE: all` becomes every registered method.

    Args:
        cfg: a config of the grid; text is kept as it is written for the keys that hold text in it.
    """
    axes = {}
    for key, values in grid.items():
        if key == "DISTILLER.TYPE" and values == "all":
            from mdistiller.distillers import distiller_dict

            values = sorted(distiller_dict, key=str.casefold)
        if not isinstance(values, list) or not values:
            raise UserError(f"GRID: {key} must be a list of values, got {values!r}")
        axes[key] = _choices("GRID", key, values, cfg)
    return axes


def label(chosen: Mapping[str, Any]) -> list[str]:
    """Short words for a point of a grid: a text stands for itself, a number gets its key's end."""
    short = [key.rpartition(".")[2] for key in chosen]
    parts = []
    for (key, value), name in zip(chosen.items(), short, strict=True):
        name = name if short.count(name) == 1 else key
        parts.append(value if isinstance(value, str) else f"{name}={value}")
    return parts


def space_axis(key: str, given: Any, cfg: Config) -> Axis:
    """An axis of a search; whole numbers where the config key `key` holds one."""
    if isinstance(given, list) and given:
        values = _choices("SPACE", key, given, cfg)
        return tuple(v if isinstance(v, (str, int, float, bool)) else str(v) for v in values)
    if not isinstance(given, Mapping) or not {"LOW", "HIGH"} <= set(given):
        raise UserError(f"SPACE: {key} must be a list of values or LOW and HIGH, got {given!r}")
    where = f"SPACE: {key}: "
    whole = type(lookup(cfg, key)) is int
    number = 1 if whole else 1.0
    kinds = {"LOW": number, "HIGH": number, "LOG": False, "STEP": number}
    axis = _checked(given, kinds, where)
    step = axis["STEP"] if "STEP" in given else None
    if axis["LOW"] >= axis["HIGH"]:
        raise UserError(f"{where}LOW {axis['LOW']} is not below HIGH {axis['HIGH']}")
    if axis["LOG"] and (step is not None or axis["LOW"] <= 0):
        raise UserError(f"{where}LOG needs a LOW above 0 and no STEP")
    if step is not None and step <= 0:
        raise UserError(f"{where}STEP must be positive, got {step}")
    return Range(axis["LOW"], axis["HIGH"], axis["LOG"], step, whole)


def ends(axis: Axis) -> tuple[Any, ...]:
    """Values of an axis to check a config with: all that are listed, or the two ends."""
    return (axis.low, axis.high) if isinstance(axis, Range) else axis
