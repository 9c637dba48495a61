"""The state of a trial, from the attempts at it, and which attempts have lost their process."""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

HEARTBEAT = 10  # seconds
GRACE = 120  # seconds without a heartbeat after which another machine's attempt is stale
CRASHES = 3  # attempts that crash within an epoch make the trial a failure


@dataclass
class Status:
    """State of a trial: "open", "running", "done", "pruned" or "failed"."""

    state: str
    results: list[dict[str, Any]]  # of its runs, once done
    params: dict[str, Any]  # of a searched point
    error: str = ""


def trial_states(storage: Any, study_id: int) -> dict[str, Status]:
    """The states of a study's trials by name; `storage` is one with heartbeats."""
    reset, stale = last_reset(storage, study_id), stale_attempts(storage, study_id)
    by_trial = attempts_by_trial(storage, study_id)
    return {name: trial_state(attempts, reset, stale) for name, attempts in by_trial.items()}


def attempts_by_trial(storage: Any, study_id: int) -> dict[str, list[FrozenTrial]]:
    """All attempts by name of their trial, in order."""
    found: dict[str, list[FrozenTrial]] = defaultdict(list)
    for attempt in storage.get_all_trials(study_id, deepcopy=False):
        if "trial" in attempt.user_attrs:
            found[attempt.user_attrs["trial"]].append(attempt)
    return found


def last_reset(storage: Any, study_id: int) -> int:
    """Failed attempts up to this number do not count."""
    attrs = storage.get_study_user_attrs(study_id)
    return int(attrs.get("reset", attrs.get("forgiven", -1)))  # the latter of earlier versions


def trial_state(attempts: Sequence[FrozenTrial], reset: int, stale: Sequence[int]) -> Status:
    """The state of a trial; `stale` are ids of attempts without a process."""
    for attempt in attempts:
        if attempt.state in (TrialState.COMPLETE, TrialState.PRUNED):
            results = attempt.user_attrs.get("results", [])
            state = "done" if attempt.state == TrialState.COMPLETE else "pruned"
            return Status(state, results, attempt.params)
    crashes = 0
    for attempt in attempts:
        crashed = attempt._trial_id in stale
        if not crashed and occupies(attempt, reset):
            error = attempt.user_attrs.get("error", "")
            return Status("failed" if error else "running", [], attempt.params, error)
        # one that its process closed has an "end"; of earlier versions also one that crashed
        crashed |= attempt.number > reset and attempt.user_attrs.get("end", "died") == "died"
        crashes += crashed and not attempt.intermediate_values
    if crashes >= CRASHES:
        error = f"its process crashed {crashes} times within an epoch (out of memory?)"
        return Status("failed", [], {}, error)
    return Status("open", [], {})


def occupies(attempt: FrozenTrial, reset: int) -> bool:
    """Whether an attempt keeps others from the trial: it is done, running, or failed."""
    failed = attempt.number > reset and "error" in attempt.user_attrs
    return attempt.state != TrialState.FAIL or failed


def stale_attempts(storage: Any, study_id: int) -> list[int]:
    """Ids of running attempts whose process is gone, or sends no heartbeat from its machine."""
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    here = [a for a in running if a.user_attrs.get("place") == place()]
    gone = [a._trial_id for a in here if not process_exists(a.user_attrs["pid"])]
    now = time.time()  # earlier versions recorded it, and no heartbeats
    gone += [a._trial_id for a in running if now - a.user_attrs.get("alive", now) > GRACE]
    return [*gone, *storage._get_stale_trial_ids(study_id)]


def place() -> str:
    """Where process numbers mean the same: this machine, and on Linux its space of them."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def process_exists(pid: int) -> bool:
    """Whether a process of this machine lives; always true where that cannot be asked safely."""
    if os.name != "posix":  # elsewhere signal 0 may end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # one that ended and was not waited for still has its number
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state not in "ZX"
