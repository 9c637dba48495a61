#!/usr/bin/env bash
# optuna 5.0.0, sqlalchemy 2.1.9, Python 3.11, SQLite file on a local disk.
#
# `set_trial_state_values(trial, RUNNING)` is how workers of a distributed study claim a WAITING trial (one from
# enqueue_trial or add_trial): True is documented as "the state is successfully updated", False as "the
# state is kept the same", when it was RUNNING already. On SQLite several processes get True for one
# trial: the row is read FOR UPDATE, which SQLite ignores, its state is compared in Python, and the UPDATE
# that follows has no condition on the old state. Then the trial runs more than once. Four processes that
# claim each of 100 trials at the same moment; output seen (varies from run to run):
#   winners of a trial: 1 (81 trials), 2 (13 trials), 3 (3 trials), 4 (3 trials)
# So take a lock around the claim, or use a database with row locks.
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q optuna==5.0.0 sqlalchemy==2.1.9
cd "$work"
cat > claims.py <<'PY'
import multiprocessing
from collections import Counter

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

URL, TRIALS, PROCESSES = "sqlite:///claims.db", 100, 4


def claim(trials, together, results):
    storage = RDBStorage(URL)
    won = []
    for trial in trials:
        together.wait()
        won.append(storage.set_trial_state_values(trial, TrialState.RUNNING))
    results.put(won)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=URL)
    for _ in range(TRIALS):
        study.add_trial(create_trial(state=TrialState.WAITING))
    trials = [trial._trial_id for trial in study.get_trials(deepcopy=False)]
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(PROCESSES), context.Queue()
    workers = [
        context.Process(target=claim, args=(trials, together, results)) for _ in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    won = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    winners = Counter(map(sum, zip(*won)))
    print("winners of a trial:", ", ".join(f"{n} ({winners[n]} trials)" for n in sorted(winners)))
    assert all(type(answer) is bool for answers in won for answer in answers)
    assert max(winners) > 1, "each trial has one winner now"
    # one process after another: the documented answers
    study.add_trial(create_trial(state=TrialState.WAITING))
    last = study.get_trials(deepcopy=False)[-1]._trial_id
    answers = [RDBStorage(URL).set_trial_state_values(last, TrialState.RUNNING) for _ in range(2)]
    assert answers == [True, False], answers
PY
"$work/venv/bin/python" claims.py
