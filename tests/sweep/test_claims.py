"""Trials are shared out among processes: races, deaths, machines that fall silent."""

import multiprocessing
import sqlite3
import subprocess
import time
from collections import Counter

import pytest
from optuna.trial import TrialState
from sweep_runs import needs_fork

from mdistiller.registry import UserError
from mdistiller.sweep import trial_state
from mdistiller.sweep.plan import read_plan
from mdistiller.sweep.study import Study
from mdistiller.sweep.trial_state import attempts_by_trial


def claims(path, queue):
    """Takes all trials it can get and says which; a finished one ends at once."""
    plan = read_plan(path, out=path.parent / "sweep")
    study = Study(plan, f"sqlite:///{path.parent / 'study.db'}")
    taken = []
    while waiting := study.open_trials():
        attempt = study.take(waiting[0])
        if attempt is not None:
            taken.append(attempt.trial.name)
            attempt.finish([{"last_acc": 1.0}])
    queue.put(taken)


@needs_fork
def test_processes_in_a_race_never_take_the_same_trial(sweep):
    path = sweep("SEEDS: 4\n")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    racers = [context.Process(target=claims, args=(path, queue)) for _ in range(3)]
    for racer in racers:  # they also create the database all at once
        racer.start()
    taken = [queue.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert Counter(name for names in taken for name in names) == {
        f"s,seed:{seed}": 1 for seed in range(4)
    }


def test_the_later_of_two_attempts_withdraws(study, monkeypatch):
    """Another process enters its attempt after this one has seen none."""
    trial, add = study.plan.trials[0], study._add

    def late(*args):
        monkeypatch.setattr(study, "_add", add)
        rival.append(study.take(trial))
        return add(*args)

    rival = []
    monkeypatch.setattr(study, "_add", late)
    assert study.take(trial) is None
    assert study.status()[trial.name].state == "running"
    rival[0].finish([{"last_acc": 50.0}])
    assert study.status()[trial.name].results == [{"last_acc": 50.0}]
    states = [
        (a.state, a.user_attrs.get("end"))
        for a in attempts_by_trial(study.storage, study.id)[trial.name]
    ]
    assert states == [(TrialState.COMPLETE, None), (TrialState.FAIL, "withdrawn")]


def elsewhere(study, attempt, seconds):
    """Make an attempt that of a process on another machine, silent for some seconds."""
    study.storage.set_trial_user_attr(attempt.id, "place", "elsewhere")
    with sqlite3.connect(study.url.removeprefix("sqlite:///")) as database:
        database.execute(
            f"UPDATE trial_heartbeats SET heartbeat = datetime('now', '-{seconds} seconds')"
        )
    database.close()


def test_another_machines_attempt_is_taken_over_once_it_is_silent(study):
    trial = study.plan.trials[0]
    lost = study.take(trial)
    elsewhere(study, lost, trial_state.GRACE // 2)
    assert study.take(trial) is None
    elsewhere(study, lost, trial_state.GRACE + 2)
    assert study.status()[trial.name].state == "open"
    own = study.take(trial)
    assert own is not None
    with pytest.raises(UserError, match="was taken over by another process"):
        lost.report(1, 10.0)
    lost.finish([{"last_acc": 1.0}])  # too late
    own.finish([{"last_acc": 2.0}])
    assert study.status()[trial.name].results == [{"last_acc": 2.0}]


def test_a_dead_process_of_this_machine_holds_nothing(study):
    trial = study.plan.trials[0]
    child = subprocess.Popen(["true"])
    attempt = study.take(trial)
    study.storage.set_trial_user_attr(attempt.id, "pid", child.pid)
    time.sleep(0.5)  # it has ended, but nobody has waited for it
    assert study.status()[trial.name].state == "open"
    child.wait()
    assert study.status()[trial.name].state == "open"


def test_a_trial_that_keeps_killing_its_process_has_failed(study):
    trial = study.plan.trials[0]
    for epochs in (1, 0, 0, 0):  # the first got through an epoch, and does not count
        assert study.status()[trial.name].state == "open"
        attempt = study.take(trial)
        for epoch in range(epochs):
            attempt.report(epoch + 1, 10.0)
        study.storage.set_trial_state_values(attempt.id, TrialState.FAIL)
    status = study.status()[trial.name]
    assert status.state == "failed"
    assert "crashed 3 times within an epoch" in status.error
    study.reset()
    assert study.take(trial) is not None
