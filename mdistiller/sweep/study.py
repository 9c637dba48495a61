"""The trials of a sweep in an Optuna study, shared out among any number of processes and machines.

Every attempt at a trial is an Optuna trial that carries its name and who is at it. The database
numbers attempts one after the other, so of several running attempts at one trial the first holds
it, and whoever finds an earlier one after entering his own withdraws: no two ever work on the same
trial, on any SQL database, without a lock. An attempt whose process is gone no longer counts.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import defaultdict
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from mdistiller.registry import UserError
from mdistiller.sweep.fields import Range
from mdistiller.sweep.judge import GRACE, Status, counting, holds, place, status
from mdistiller.sweep.plan import Plan, Trial
from mdistiller.sweep.settings import changes, noted

_CONNECTS = 3  # processes that start together may disturb each other's creation of the tables

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The attempts at a plan's trials.

    Args:
        url: of the database.
        create: make the study if it is not there.

    Raises:
        UserError: no database there, or no study in it.
    """

    def __init__(self, plan: Plan, url: str, create: bool = True):
        self.plan, self.url = plan, url
        self.storage = optuna.storages.get_storage(_connect(url))
        try:
            self.id = self._find_or_create(create)
        except KeyError:
            raise UserError(f"there is no study {plan.name!r} in {shown(url)} yet") from None
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
        attempts = self.attempts()
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

    def attempts(self) -> dict[str, list[FrozenTrial]]:
        """All attempts by name of their trial, in order."""
        found: dict[str, list[FrozenTrial]] = defaultdict(list)
        for attempt in self.storage.get_all_trials(self.id, deepcopy=False):
            found[attempt.user_attrs.get("trial", "")].append(attempt)
        return found

    def status(self) -> dict[str, Status]:
        """Where every trial of the plan stands."""
        attempts, forgiven = self.attempts(), self._forgiven()
        return {t.name: status(attempts[t.name], forgiven) for t in self.plan.trials}

    def open_trials(self) -> list[Trial]:
        """Trials that nobody has done or is at."""
        status = self.status()
        return [trial for trial in self.plan.trials if status[trial.name].state == "open"]

    def forgive(self) -> None:
        """Open all failed trials again."""
        last = max((a.number for group in self.attempts().values() for a in group), default=-1)
        self.storage.set_study_user_attr(self.id, "forgiven", last)

    def take(self, trial: Trial) -> Attempt | None:
        """Begin an attempt at an open trial; None if another process was first."""
        earlier = self.attempts()[trial.name]
        if any(holds(other) for other in counting(earlier, self._forgiven())):
            return None
        known = next((other for other in reversed(earlier) if other.params), None)
        attempt = Attempt(self, trial, self._enter(trial, known))
        mine = self.storage.get_trial(attempt.id).number
        for other in counting(self.attempts()[trial.name], self._forgiven()):
            if other.number < mine and (holds(other) or not self._bury(other)):
                attempt.end(TrialState.FAIL, end="withdrawn")
                return None
        return attempt

    def _enter(self, trial: Trial, known: FrozenTrial | None) -> int:
        """Enter an attempt, in one transaction; a searched point stays where it was `known`."""
        attrs = {
            "trial": trial.name,
            **noted(self.plan, trial),
            "place": place(),
            "pid": os.getpid(),
            "alive": time.time(),
        }
        entry = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=known.params if known else {},
            distributions=known.distributions if known else {},
            user_attrs=attrs,
        )
        return self.storage.create_new_trial(self.id, entry)

    def _bury(self, attempt: FrozenTrial) -> bool:
        """Close an attempt whose process is gone; False if that finished it after all."""
        if attempt.state.is_finished():
            return True
        try:
            self.storage.set_trial_user_attr(attempt._trial_id, "end", "died")
            self.storage.set_trial_state_values(attempt._trial_id, TrialState.FAIL)
        except RuntimeError:  # closed by another: by its own process, or as dead
            return not holds(self.storage.get_trial(attempt._trial_id))
        return True

    def _forgiven(self) -> int:
        """Failed attempts up to this number do not count."""
        return int(self.storage.get_study_user_attrs(self.id).get("forgiven", -1))


class Attempt:
    """This process at work on a trial."""

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
        """Sign of life."""
        self.study.storage.set_trial_user_attr(self.id, "alive", time.time())

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
                f"{self.trial.name} was taken over by another process, because this one gave no "
                f"sign of life for {GRACE:.0f} s"
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


def _connect(url: str) -> optuna.storages.RDBStorage:
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for left in reversed(range(_CONNECTS)):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except (sqlalchemy.exc.ArgumentError, ImportError) as error:
            reason: Exception = error
            break
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            reason = error
            if left:
                time.sleep(1.0)
    first = str(reason).splitlines()[0]
    raise UserError(f"--storage {shown(url)}: no database there: {first}")


def shown(url: str) -> str:
    """A database URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return repr(url)
