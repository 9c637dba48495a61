"""A sample of the hostile and damaged files that `python -m faults.bad_inputs` tries."""

import random

import pytest
import torch
from faults import bad_inputs as checks
from faults.bad_inputs import bad_inputs


def test_hostile_and_damaged_files_are_read_or_refused_in_a_line():
    """Each kind often enough to be met in every form; nothing runs, escapes or is left behind."""
    results = list(bad_inputs(seed=0, count=240, configs=False))
    assert [name for name, passed in results if not passed] == []
    met = {name for name, _ in results}
    assert {f"archive: {kind}" for kind in checks._HOSTILE} <= met
    assert {f"hostile checkpoint ({form})" for form in ("zip", "legacy", "pickle")} <= met


def test_one_seed_gives_one_sequence():
    first, second = (list(bad_inputs(3, 6, configs=False)) for _ in range(2))
    assert first == second


def test_configs_are_half_of_them():
    names = [name for name, _ in bad_inputs(1, 6)]
    assert sum(name.startswith("config ") for name in names) == len(names) - 3


def test_the_check_sees_code_that_runs(tmp_path, monkeypatch):
    def careless(path):
        return torch.load(path, weights_only=False)

    monkeypatch.setattr(checks, "load_checkpoint", careless)
    failed = [name for name, passed in bad_inputs(0, 60, configs=False) if not passed]
    assert any(name.startswith("hostile checkpoint") for name in failed)


@pytest.mark.parametrize("kind", ["escape", "link or device", "bomb", "too many"])
def test_the_check_sees_an_archive_that_is_unpacked(tmp_path, monkeypatch, kind):
    import contextlib

    @contextlib.contextmanager
    def careless(path, beside, what, limits):
        yield beside

    monkeypatch.setattr(checks, "unpacked", careless)
    monkeypatch.setattr(checks, "_HOSTILE", {kind: checks._HOSTILE[kind]})
    _, act = checks._archive(random.Random(0), tmp_path)
    assert "a hostile archive was unpacked" in checks._verdict(act, tmp_path)
