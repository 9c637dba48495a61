"""A few faults of each kind, by the command that makes many."""

import pytest
from support import command


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_nothing_is_lost():
    done = command("--quick", module="faults")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("losses: 0")
    for claim in ("kills survived 4/4", "corruptions detected 3/3"):
        assert claim in last
    assert "full disks survived" in last
    assert "lost processes survived 2/2" in last
