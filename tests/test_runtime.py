"""What a process of the library sets for itself, and what several meet together."""

import platform
import resource

import pytest
import torch

from mdistiller import runtime
from mdistiller.cli.support.command import guarded
from mdistiller.registry import UserError
from mdistiller.runtime import keep_freed_memory


def page_faults(tensors):
    """Pages taken from the system by as many tensors of 64 MB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory")
def test_commands_keep_freed_memory():
    """64 MB are 16,384 pages, which each tensor would take anew.

    The heap grows until it has a gap of that size between the blocks that stay, so not at once.
    """
    assert guarded(lambda: None) == 0
    page_faults(16)
    assert page_faults(8) < 4 * 16_384


def test_a_user_s_own_settings_of_the_allocator_hold(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the allocator was changed"))
    keep_freed_memory()


@pytest.mark.parametrize(
    ("other", "kind"), [((True, "no disk"), UserError), ((False, "no disk"), RuntimeError)]
)
def test_what_fails_in_one_process_fails_in_all(monkeypatch, other, kind):
    """With the error's own text, a process's own error first, and before what waits for it."""
    results = [other]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(runtime, "distributed", lambda: True)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(runtime, "side_group", lambda: None)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object",
        lambda values, mine, group: values.__setitem__(slice(None), [*results, mine]),
    )
    with pytest.raises(kind, match="no disk"):
        runtime.fail_together(None)
    with pytest.raises(KeyError, match="mine"):
        runtime.fail_together(KeyError("mine"))
    entered = False
    with pytest.raises(kind, match="no disk"), runtime.local_rank_zero_first():
        entered = True
    assert not entered
    results[0] = None
    runtime.fail_together(None)
