import pytest
import support


@pytest.fixture(autouse=True, scope="module")
def _small_images():
    """Runs of the engine's tests train on images of 16 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "DATA", "tiny16")
        yield
