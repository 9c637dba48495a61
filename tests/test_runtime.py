"""What a process of the library sets for itself."""

import platform
import resource

import pytest
import torch

from mdistiller.cli.support.command import guarded
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
