import gc
import os
import sys
from pathlib import Path

import pytest
import support
import torch

SMALL_IMAGES = ("config", "engine", "frozen_teacher", "networks", "run", "run_folder", "user_code")
"""Folders whose tests train on images of 16 pixels."""


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors run best on one thread, and sums then never depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _quick(request):
    """Files do not wait for the disk, and teachers run unfused, except where a module has FUSES."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        if not getattr(request.module, "FUSES", False):
            patch.setattr("mdistiller.frozen_teacher.frozen.can_fuse", lambda image: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _data(request):
    """Train on the data set that a module names as TRAINS_ON, else on its folder's."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    usual = "tiny16" if folder in SMALL_IMAGES else support.DATA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "DATA", getattr(request.module, "TRAINS_ON", usual))
        yield


@pytest.fixture(autouse=True)
def _no_code_of_another_test():
    """What a test's forks and files have put in place of the library's is taken back."""
    yield
    forks = sys.modules.get("mdistiller.user_code.forks")
    if forks is not None:
        forks.activate(())


def pytest_collection_finish():
    """What is imported by now stays: the search for garbage need not go through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU: without one they are skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
