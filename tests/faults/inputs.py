"""Files that are damaged, absurd or hostile: refused in one line, or read as what they say."""

from __future__ import annotations

from faults.bad_inputs import bad_inputs
from faults.work import Outcome, Work

COUNT = 1500


def inputs(work: Work) -> Outcome:
    """Read bad configs, checkpoints, archives and images."""
    outcome = Outcome("bad inputs withstood")
    for name, passed in bad_inputs(work.seed, 60 if work.quick else COUNT):
        outcome.tried += 1
        if not passed:
            outcome.losses.append(name)
    return outcome
