import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors run best on one thread, and sums then never depend on how many there are."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """GPU tests need a GPU: without one they are left out, and the summary says how many."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
