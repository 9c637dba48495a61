import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors run best on one thread, and sums then never depend on how many there are."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU: without one they are skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
