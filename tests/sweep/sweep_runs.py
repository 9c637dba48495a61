"""What the tests of sweeps share."""

import json
import multiprocessing
from collections import Counter

import pytest
from support import REPO

forks = "fork" in multiprocessing.get_all_start_methods()
needs_fork = pytest.mark.skipif(not forks, reason="needs fork")
IMPORTS = f"IMPORTS: [{json.dumps(str(REPO / 'tests' / 'sweep' / 'sweep_toy.py'))}]\n"


def words(path, *more):
    return ["--cfg", str(path), "--out", str(path.parent / "sweep"), *map(str, more)]


def started(folder):
    """How often each run was begun."""
    return Counter(line.split(" ", 1)[1] for line in (folder / "log").read_text().splitlines())


def names(plan):
    return [trial.name for trial in plan.trials]
