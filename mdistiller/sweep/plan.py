"""A sweep file: the trials it asks for, all checked before the first one starts. Its keys:

    SWEEP: NAME            name of the study; marks the file as a sweep
    CONFIG: FILE           the config that trials start from: beside this file, or configs/...
    OVERRIDES: {...}       sections as in a config, laid over every trial; {seed} in a value is the
                           run's seed
    VARIANTS: [...]        each with NAME, and CONFIG, OVERRIDES, GRID of its own as needed;
                           TEACHER: ROW takes the student of a row above, of the same seed
    GRID: {KEY: [...]}     all combinations of the values; DISTILLER.TYPE: all is every method
    SPACE: {KEY: AXIS}     a search instead of a grid: AXIS is a list of values, or
                           {LOW: a, HIGH: b} with LOG: True or STEP: s if wanted
    TRIALS: N              points of the search
    PRUNE: N               of the search: from epoch N on, end trials below the median; 0: never
    SEEDS: N or [...]      0 .. N-1, or the seeds themselves; a searched point trains with each
    METRIC: last_acc       what is searched for, and the table's first column
    LOSS_FALLS: True       report the training loss, and fail where it does not fall
    TOGETHER: auto         runs with the same data and seed train in lock-step, at most N; off: none

`_BASE_` builds on another sweep file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdistiller.config.files import find_config, overlay, read_yaml, resolve_paths
from mdistiller.distillers import get_distiller
from mdistiller.engine.cfg import Config, dump_cfg, load_config
from mdistiller.files.atomic import replacing
from mdistiller.registry import UserError, suggest
from mdistiller.run.checks import check_names
from mdistiller.run.teacher import trained_teachers
from mdistiller.run_folder.naming import experiment_name, folder_word
from mdistiller.sweep import fields


@dataclass(frozen=True)
class Trial:
    """One unit of work: a config trained once, or a point of a search trained with each seed.

    Attributes:
        cell: row of the table; trials of a cell differ by their seed.
        name: of this trial, unique in the sweep.
        changes: what sets the cell apart, as `[key, value, ...]`.
        configs: checked, one for each run.
    """

    cell: str
    name: str
    changes: list[Any]
    configs: tuple[Config, ...]


@dataclass(frozen=True)
class Plan:
    """What a sweep file and a command line ask for."""

    name: str
    out: Path
    metric: str
    loss_falls: bool
    trials: tuple[Trial, ...]
    space: dict[str, fields.Axis] = field(default_factory=dict)
    prune: int = 0
    together: str | int = "auto"
    teachers: dict[str, Trial] = field(default_factory=dict)  # by the file of DISTILLER.TEACHER_CFG

    def write_teachers(self) -> None:
        """Write the configs of the trials that are teachers of others, beside their run folders."""
        for file, trial in self.teachers.items():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(file)) as temporary:
                temporary.write_text(dump_cfg(trial.configs[0]))


def read_plan(
    path: str | Path,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    out: Path | None = None,
) -> Plan:
    """The plan of a sweep file.

    Args:
        overrides: `[key, value, ...]` for every trial, laid over all else.
        imports: further IMPORTS, relative to the working directory.
        out: folder of the results; by default `output/sweeps/NAME`.

    Raises:
        UserError: a key or value of the file, or the config of a trial, cannot be.
    """
    try:
        file = find_config(path)
        table = fields.check_table(read_yaml(file))
        out = out or Path("output/sweeps") / table["SWEEP"]
        reader = _Reader(file.parent, table, list(overrides), list(imports), out)
        space = reader.space()
        trials = tuple(reader.points() if space else reader.cells())
        _refuse_duplicates(trials)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    name, metric, loss_falls = table["SWEEP"], table["METRIC"], table["LOSS_FALLS"]
    rest = (table["PRUNE"], table["TOGETHER"], reader.teachers)
    return Plan(name, out, metric, loss_falls, trials, space, *rest)


@dataclass
class _Reader:
    """A checked table, the folder of its file, and what the command line adds."""

    folder: Path
    table: dict[str, Any]
    overrides: list[str]
    imports: list[str]
    out: Path
    made: dict[str, Trial] = field(default_factory=dict)
    teachers: dict[str, Trial] = field(default_factory=dict)

    def cells(self) -> Iterator[Trial]:
        """The trials of a grid: variants, their axes, seeds."""
        for variant in self.table["VARIANTS"]:
            config = variant["CONFIG"] or self.table["CONFIG"]
            fixed = self.fixed(variant["OVERRIDES"])
            base = self.load(variant["NAME"], config, fixed, whole=False)  # may register methods
            axes = fields.grid_axes({**self.table["GRID"], **variant["GRID"]}, base)
            changed = fields.as_settled(fields.words(fields.nested(variant["OVERRIDES"])), base)
            fields.refuse_set_keys(self.overrides, axes, "command line:")
            for values in itertools.product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                parts = [variant["NAME"], *fields.label(chosen)]
                cell = ",".join(filter(None, parts)) or self.table["SWEEP"]
                pairs = [word for pair in chosen.items() for word in pair]
                row = variant["TEACHER"]
                changes = [*changed, *pairs, *(["TEACHER", row] if row else [])]
                by_seed = row or any(
                    fields.SEED in str(w) for w in [*fixed, *pairs, *self.overrides]
                )
                cfg = None if by_seed else self.load(cell, config, [*fixed, *pairs])
                words = list(filter(None, parts)) or [self.table["SWEEP"]]
                for seed in self.table["SEEDS"]:
                    name = f"{cell},seed:{seed}"
                    more = self.taught(variant, seed)
                    loaded = cfg or self.load(cell, config, [*fixed, *pairs], more, seed=seed)
                    run = self.placed(loaded, name, words, seed)
                    self.made[name] = Trial(cell, name, changes, (run,))
                    yield self.made[name]

    def taught(self, variant: dict[str, Any], seed: int) -> list[Any]:
        """Overrides that make the student of a variant's TEACHER, a row above, its teacher."""
        row = variant["TEACHER"]
        if not row:
            return []
        trial = self.made.get(f"{row},seed:{seed}")
        if trial is None:
            rows = ", ".join(dict.fromkeys(other.cell for other in self.made.values()))
            raise UserError(
                f"variant {variant['NAME']}: TEACHER {row!r} must be a row above it"
                f"{suggest(row, rows.split(', ')) or f' ({rows})'}"
            )
        (cfg,) = trial.configs
        file = str(self.out / f"{experiment_name(cfg)}.yaml")
        self.teachers[file] = trial
        roles = [
            (f"DISTILLER.TEACHER{kind}", cfg.DISTILLER[f"STUDENT{kind}"]) for kind in ("", "_ARGS")
        ]
        roles += [("DISTILLER.TEACHER_NORM", cfg.DISTILLER.STUDENT_NORM)]
        roles += [("DISTILLER.TEACHER_CKPT", ""), ("DISTILLER.TEACHER_CFG", file)]
        roles += [("DISTILLER.TEACHERS", [])]
        return [word for pair in roles for word in pair]

    def points(self) -> Iterator[Trial]:
        """The trials of a search, still without their values."""
        fixed, seeds = self.fixed({}), self.table["SEEDS"]
        configs = {s: self.load("", self.table["CONFIG"], fixed, seed=s) for s in seeds}
        for number in range(self.table["TRIALS"]):
            name = f"trial {number}"
            runs = tuple(
                self.placed(cfg, f"{name},seed:{seed}", [name], seed)
                for seed, cfg in configs.items()
            )
            yield Trial(name, name, [], runs)

    def space(self) -> dict[str, fields.Axis]:
        """The axes of a search, each tried at its ends."""
        given, config = self.table["SPACE"], self.table["CONFIG"]
        fields.refuse_set_keys(self.overrides, given, "command line:")
        axes = {}
        for key, axis in given.items():
            fixed = self.fixed({})
            low = axis.get("LOW") if isinstance(axis, dict) else None
            cfg = self.load(f"SPACE: {key}", config, [*fixed, key, low])
            axes[key] = fields.space_axis(key, axis, cfg)
            for value in fields.ends(axes[key]):
                self.load(f"SPACE: {key}", config, [*fixed, key, value])
        return axes

    def fixed(self, overrides: dict[str, Any]) -> list[Any]:
        """The file's overrides and further ones over them, as `[key, value, ...]`."""
        both = overlay(fields.nested(self.table["OVERRIDES"]), fields.nested(overrides))
        resolve_paths(both, self.folder)
        fixed = fields.words(both)
        fields.refuse_set_keys(fixed, {}, "OVERRIDES:")
        return fixed

    def load(
        self,
        name: str,
        config: str,
        overrides: list[Any],
        more: Sequence[Any] = (),
        *,
        whole: bool = True,
        seed: int | None = None,
    ) -> Config:
        """A trial's config; if it is the `whole` one, checked as far as that goes without data.

        Args:
            overrides: of the file, whose teachers' configs are relative to it.
            more: laid over them.
            seed: of the run; by default the first of SEEDS.
        """
        seed = self.table["SEEDS"][0] if seed is None else seed
        try:
            sibling = self.folder / config
            file = sibling if config and sibling.is_file() else config
            changes = fields.resolved(fields.with_seed(overrides, seed), self.folder)
            changes += fields.with_seed([*more, *self.overrides], seed)
            cfg = load_config(file, changes, self.imports)
            if whole:
                self.check(cfg)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        return cfg

    def check(self, cfg: Config) -> None:
        """Refuse what would fail later."""
        check_names(cfg)
        planned = self.teachers.get(cfg.DISTILLER.TEACHER_CFG)
        if planned is None:
            trained_teachers(cfg)
        elif not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
            raise UserError(f"TEACHER has no effect on DISTILLER.TYPE {cfg.DISTILLER.TYPE}")
        elif cfg.DISTILLER.TEACHERS:
            raise UserError("TEACHER has no effect beside DISTILLER.TEACHERS: leave one out")
        elif planned.configs[0].DATASET != cfg.DATASET:
            raise UserError(f"TEACHER {planned.cell} has other DATASET settings")
        if self.table["METRIC"].startswith("test_") and not cfg.DATASET.VAL_SPLIT:
            raise UserError(
                f"METRIC {self.table['METRIC']} needs held-out images: set DATASET.VAL_SPLIT, "
                "or use last_acc or best_acc"
            )

    def placed(self, cfg: Config, name: str, words: Sequence[str], seed: int) -> Config:
        """`cfg` for one run of the sweep, in a folder of its own.

        Args:
            name: of the run, which was its folder's in earlier versions; it stays there.
            words: for the name of the folder; the seed is added.
        """
        copy: Config = cfg.clone()
        copy.defrost()
        copy.EXPERIMENT.SEED, copy.LOG.PREFIX, copy.EXPERIMENT.NAME = seed, str(self.out), name
        old = self.out / experiment_name(copy)
        if not (old.is_dir() or old.with_name(f"{old.name}.log").is_file()):
            copy.EXPERIMENT.NAME = "-".join(map(folder_word, [*words, f"seed={seed}"]))
        copy.freeze()
        return copy


def _refuse_duplicates(trials: Sequence[Trial]) -> None:
    """Refuse trials or run folders that share a name."""
    names = Counter(trial.name for trial in trials)
    folders = Counter(experiment_name(cfg) for trial in trials for cfg in trial.configs)
    for name, count in (names | folders).items():
        if count > 1:
            raise UserError(
                f"{count} trials are called {name}: a value is there twice, or two VARIANTS agree"
            )
