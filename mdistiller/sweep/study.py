"""The trials of a sweep in an Optuna study, shared out among any number of processes and machines.

Every attempt at a trial is an Optuna trial with the name of ours and its process. The database
numbers attempts one after the other, so of several running attempts at one trial the first counts,
and a process that finds an earlier one after adding its own withdraws: no two ever work on the same
trial, on any SQL database, without a lock (Optuna's own queue of waiting trials can give one to
two processes on SQLite). Optuna's heartbeats show which attempts are stale; those are closed.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from mdistiller.registry import UserError, first_line
from mdistiller.sweep.fields import Range
from mdistiller.sweep.plan import Plan, Trial
from mdistiller.sweep.settings import changes, noted
from mdistiller.sweep.trial_state import (
    GRACE,
    HEARTBEAT,
    Status,
    attempts_by_trial,
    last_reset,
    occupies,
    place,
    stale_attempts,
    trial_states,
)

_OptunaError = optuna.exceptions.OptunaError
_CONNECTS = 3  # processes that start together may disturb each other's creation of the tables

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The attempts at a plan's trials.

    Args:
        url: of the database.
        create: make the study if it is not there.

    Raises:
        UserError: the database or the study in it does not exist.
    """

    def __init__(self, plan: Plan, url: str, create: bool = True):
        self.plan, self.url = plan, url
        self.storage: Any = optuna.storages.get_storage(connect(url))
        try:
            self.id = self._find_or_create(create)
        except KeyError:
            raise UserError(f"no study {plan.name!r} in {shown(url)} yet") from None
        self.optuna = optuna.load_study(
            study_name=plan.name,
            storage=self.storage,
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=plan.prune)
            if plan.prune
            else optuna.pruners.NopPruner(),
        )

    def _find_or_create(self, create: bool) -> int:
        if create:
            try:
                direction = optuna.study.StudyDirection.MAXIMIZE
                return self.storage.create_new_study([direction], self.plan.name)
            except optuna.exceptions.DuplicatedStudyError:
                pass
        return self.storage.get_study_id_from_name(self.plan.name)

    def check_settings(self) -> None:
        """Refuse a plan that has trials of the study with other settings."""
        attempts = attempts_by_trial(self.storage, self.id)
        for trial in self.plan.trials:
            for attempt in attempts[trial.name][-1:]:
                recorded = attempt.user_attrs
                if "error" in recorded:  # to be run again, perhaps mended
                    continue
                others = changes(recorded, self.plan, trial)
                if others:
                    raise UserError(
                        f"study {self.plan.name!r} in {shown(self.url)} has {trial.name} with "
                        f"other settings ({'; '.join(others)}): choose another --out or SWEEP name"
                    )

    def status(self) -> dict[str, Status]:
        """The state of every trial of the plan."""
        states = trial_states(self.storage, self.id)
        return {t.name: states.get(t.name) or Status("open", [], {}) for t in self.plan.trials}

    def open_trials(self) -> list[Trial]:
        """Trials that are neither done nor running."""
        status = self.status()
        return [trial for trial in self.plan.trials if status[trial.name].state == "open"]

    def reset(self) -> None:
        """Open all failed trials again."""
        last = self.storage.get_n_trials(self.id) - 1
        self.storage.set_study_user_attr(self.id, "reset", last)

    def take(self, trial: Trial) -> Attempt | None:
        """Begin an attempt at an open trial; None if another process was first."""
        for stale in stale_attempts(self.storage, self.id):
            with contextlib.suppress(RuntimeError):  # closed by another, or by its own process
                self.storage.set_trial_state_values(stale, TrialState.FAIL)
        earlier = attempts_by_trial(self.storage, self.id)[trial.name]
        reset = last_reset(self.storage, self.id)
        if any(occupies(other, reset) for other in earlier):
            return None
        sampled = next((other for other in reversed(earlier) if other.params), None)
        attempt = Attempt(self, trial, self._add(trial, sampled))
        attempt.beat()
        mine = self.storage.get_trial(attempt.id).number
        others = attempts_by_trial(self.storage, self.id)[trial.name]
        if any(other.number < mine and occupies(other, reset) for other in others):
            attempt.end(TrialState.FAIL, end="withdrawn")
            return None
        return attempt

    def _add(self, trial: Trial, sampled: FrozenTrial | None) -> int:
        """Add an attempt, in one transaction; one `sampled` before keeps its values."""
        attrs: dict[str, Any] = {"trial": trial.name, **noted(self.plan, trial)}
        attrs |= {"place": place(), "pid": os.getpid()}
        entry = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=sampled.params if sampled else {},
            distributions=sampled.distributions if sampled else {},
            user_attrs=attrs,
        )
        return self.storage.create_new_trial(self.id, entry)


class Attempt:
    """A trial that this process runs."""

    def __init__(self, study: Study, trial: Trial, number: int):
        self.study, self.trial, self.id = study, trial, number

    def choose(self) -> dict[str, Any]:
        """The values of a searched point: as an earlier attempt had them, else by the sampler."""
        search, space = self.study.optuna, self.study.plan.space
        number = self.study.storage.get_trial(self.id).number
        with warnings.catch_warnings():  # of some versions: constant_liar is new
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            search.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
        handle = optuna.Trial(search, self.id)
        return {key: _suggest(handle, key, axis) for key, axis in space.items()}

    def beat(self) -> None:
        """Record a heartbeat."""
        self.study.storage.record_heartbeat(self.id)

    def report(self, step: int, value: float) -> bool:
        """Record an epoch's accuracy; True if the trial should be pruned.

        Raises:
            UserError: another process has taken the trial over.
        """
        handle = optuna.Trial(self.study.optuna, self.id)
        try:
            handle.report(value, step)
        except optuna.exceptions.StorageInternalError:  # out of reach: training goes on
            return False
        except RuntimeError:
            raise UserError(
                f"{self.trial.name} was taken over by another process, because this one recorded "
                f"no heartbeat for {GRACE} s"
            ) from None
        return handle.should_prune()

    def finish(self, results: list[dict[str, Any]]) -> float:
        """Record the results of all runs; returns the metric's mean over them."""
        values = [result[self.study.plan.metric] for result in results]
        mean = sum(values) / len(values)
        self.end(TrialState.COMPLETE, mean, results=results)
        return mean

    def end(self, state: TrialState, value: float | None = None, **attrs: Any) -> None:
        """Close the attempt, unless another process has taken it over."""
        storage = self.study.storage
        try:
            for key, fact in attrs.items():
                storage.set_trial_user_attr(self.id, key, fact)
            storage.set_trial_state_values(self.id, state, None if value is None else [value])
        except RuntimeError:
            pass


def _suggest(handle: optuna.Trial, key: str, axis: Any) -> Any:
    if not isinstance(axis, Range):
        return handle.suggest_categorical(key, axis)
    if axis.whole:
        step = 1 if axis.step is None else int(axis.step)
        return handle.suggest_int(key, int(axis.low), int(axis.high), step=step, log=axis.log)
    return handle.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)


def connect(url: str) -> optuna.storages.RDBStorage:
    """A database with heartbeats.

    Raises:
        UserError: it is not there, or of another program.
    """
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    beats: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE}
    for left in reversed(range(_CONNECTS)):
        try:
            with warnings.catch_warnings():  # of some versions: heartbeats are new
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(url, options, **beats)
        except (ImportError, RuntimeError, sqlalchemy.exc.SQLAlchemyError, _OptunaError) as error:
            reason = first_line(error)
            if isinstance(error, (ImportError, sqlalchemy.exc.ArgumentError)):
                break
            time.sleep(min(left, 1.0))
    raise UserError(f"{shown(url)} cannot be opened as a database: {reason}")


def shown(url: str) -> str:
    """A database URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return repr(url)
