"""The planted bugs: they fit the code, and the command that tries them says what it finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faults.planted import plant, stale
from faults.planted.bugs import BUGS, Bug


def test_every_bug_fits_the_code_and_names_a_test() -> None:
    assert [reason for reason in map(stale, BUGS) if reason] == []
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20
    gone = BUGS[0]._replace(old="this is nowhere")
    assert "has 0 times, not once: this is nowhere" in stale(gone)
    assert "does not exist" in stale(BUGS[0]._replace(file="nowhere.py"))
    assert "has no test_nothing" in stale(BUGS[0]._replace(test="test_wheel.py::test_nothing"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_bug_is_caught_or_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Bug(
        "nothing", "registry.py", "import difflib\n", "import difflib  #\n", BUGS[0].test
    )
    monkeypatch.setattr("faults.planted.BUGS", (BUGS[0], harmless))
    shown: list[str] = []
    assert not plant(tmp_path, show=shown.append)
    assert [line.split()[0] for line in shown] == ["caught", "SURVIVED", "planted"]
