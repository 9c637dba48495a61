"""Runs to report on."""

import pytest
from report_runs import ENDS, METHODS, make_run


@pytest.fixture
def two(tmp_path):
    """Plain training and KD, three seeds each; one in a folder as earlier versions named it."""
    for name, pairs in METHODS.items():
        for seed, end in enumerate(ENDS[name]):
            folder = tmp_path / (f"{name}-seed={seed}" if seed else f"{name},seed:{seed}")
            make_run(folder, [20.0, end + 1, end], *pairs, seed=seed, teacher=80.0)
    return tmp_path
