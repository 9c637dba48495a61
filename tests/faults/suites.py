"""Suites of the command `faults`: what goes wrong is made to go wrong, and nothing may be lost."""

from __future__ import annotations

from collections.abc import Callable

from faults.damage import corruptions, full_disk
from faults.inputs import inputs
from faults.kills import kills
from faults.processes import ranks
from faults.work import Outcome, Work

SUITES: dict[str, Callable[[Work], Outcome]] = {
    "kills": kills,
    "corruptions": corruptions,
    "disk": full_disk,
    "ranks": ranks,
    "inputs": inputs,
}
"""Name -> suite; an entry is all that a new one needs."""
