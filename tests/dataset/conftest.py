import pytest
from worker_support import write_imagenet


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """ImageNet's layout: 3 x 8 training and 3 x 3 validation images; tests leave it as it is."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))
