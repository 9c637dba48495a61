"""Run folders as they stand on the disk: finished, failed or in between."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdistiller.config.safe_yaml import parse_yaml
from mdistiller.config.values import flatten, lookup
from mdistiller.engine.cfg import Config
from mdistiller.registry import UserError
from mdistiller.run_folder.naming import experiment_name
from mdistiller.run_folder.record import read_record

FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"


@dataclass
class Run:
    """One run.

    Attributes:
        config: values by dotted key; empty if the run recorded none.
        state: "finished", "failed", "unfinished", or the state in its sweep ("pruned", ...).
        why: the error, or how far it got.
        summary: of a finished run, else empty.
        epochs: rows of `metrics.jsonl`, those of the stages before the main one left out.
        stages: those.
        record: `run.json`.
        evaluations: results of `eval` for the student, by epoch ("last", "best").
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    state: str = UNFINISHED
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    @property
    def seed(self) -> int:
        return int(self.config.get("EXPERIMENT.SEED", 0))

    def number(self, which: str) -> float | None:
        """Accuracy on the test set in %, of the "last" or the "best" epoch; without labels k-NN."""
        scores = (f"test_acc_{which}", f"{which}_acc", f"{which}_knn")
        return next((self.summary[key] for key in scores if key in self.summary), None)

    def held_out(self, which: str) -> float | None:
        """Accuracy on held-out images in %, None for a run that holds out none."""
        return self.summary.get(f"{which}_acc") if "test_acc_best" in self.summary else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs in and below some folders, each once.

    Raises:
        UserError: a path is not a folder, or has no run in or below it.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, sweeps, or folders of runs")
        below = list(_below(path))
        if not below:
            raise UserError(f"no runs found in or below {path} (no config.yaml, no study.db)")
        for run in below:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values())


def _below(path: Path) -> Iterator[Run]:
    for name, folders, files in os.walk(path):
        folder = Path(name)
        if {"config.yaml", "metrics.jsonl", "worklog.txt"} & set(files):
            run = read_run(folder)
            if run is not None:
                folders.clear()
                yield run
                continue
        yield from _without_folder(folder, set(folders), files)
        folders.sort(key=_natural)
        if "study.db" in files:
            yield from _of_study(folder)
            folders.clear()  # the walk of the study has been below


def _without_folder(folder: Path, folders: Set[str], files: Sequence[str]) -> Iterator[Run]:
    """Runs of a sweep that failed before they had a folder: their logs are there."""
    for name in sorted(files, key=_natural):
        run = name.removesuffix(".log")
        if run != name and run not in folders:
            lines = (folder / name).read_text(errors="replace").splitlines()
            if any(line.startswith("Traceback (most recent call last)") for line in lines):
                yield Run(folder / run, state=FAILED, why=f"{lines[-1]} (before it began)")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which seed=10 comes after seed=9."""
    words = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def read_run(folder: Path) -> Run | None:
    """A run folder; None if its `config.yaml` belongs to another program."""
    config: Any = {}
    why = ""
    try:
        config = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"EXPERIMENT", "SOLVER"} <= set(config):
            return None
    except FileNotFoundError:
        why = "no config.yaml: a run of the original project, or of another program"
    except (OSError, ValueError):
        config, why = {}, "config.yaml is damaged"
    rows = _rows(folder / "metrics.jsonl")
    run = Run(
        folder,
        {key: lookup(config, key) for key in flatten(config)},
        why=why,
        epochs=[row for row in rows if "epoch" in row],
        stages=[row for row in rows if "stage" in row],
        record=read_record(folder),
    )
    if config:
        _set_state(run)
    return run


def _set_state(run: Run) -> None:
    """Set a run's state, and why it did not finish."""
    try:
        summary = json.loads((run.folder / "summary.json").read_text())
        run.summary = summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):  # not there yet, or cut off
        pass
    if run.summary:
        run.state = FINISHED
        return
    last = run.epochs[-1]["epoch"] if run.epochs else 0
    run.why = f"after epoch {last} of {run.config.get('SOLVER.EPOCHS', '?')}"
    ended = (run.record["starts"] or [{}])[-1].get("ended", "")
    if ended.startswith("TrialPruned"):
        run.state = "pruned"
    elif ended.startswith("KeyboardInterrupt"):
        run.why += ", interrupted"
    elif ended:
        run.state, run.why = FAILED, f"{ended} ({run.why})"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` as far as they are whole."""
    rows = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _of_study(folder: Path) -> Iterator[Run]:
    """The runs of a sweep's folder; those that did not finish get their state from the study."""
    runs = {}
    for child in sorted(folder.iterdir(), key=lambda path: _natural(path.name)):
        for run in _below(child) if child.is_dir() else ():
            runs[run.folder.resolve()] = run
    for place, config, state, error in _trials(folder):
        run = runs.setdefault((folder / place).resolve(), Run(folder / place))
        run.config = run.config or {key: lookup(config, key) for key in flatten(config)}
        if not run.finished:
            run.state = UNFINISHED if state in ("done", "open") else state
            run.why = error or run.why or "not begun"
    yield from runs.values()


def _trials(folder: Path) -> Iterator[tuple[str, Mapping[str, Any], str, str]]:
    """Of each trial of a sweep: run folder, config, state, error."""
    from mdistiller.sweep.study import connect
    from mdistiller.sweep.trial_state import attempts_by_trial, trial_states

    storage = connect(f"sqlite:///{(folder / 'study.db').resolve()}")
    for study in storage.get_all_studies():
        states = trial_states(storage, study._study_id)
        for name, attempts in attempts_by_trial(storage, study._study_id).items():
            config = Config(parse_yaml(attempts[-1].user_attrs["config"]))
            yield experiment_name(config), config, states[name].state, states[name].error
