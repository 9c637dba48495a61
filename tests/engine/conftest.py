import pytest
import support


@pytest.fixture(autouse=True, scope="module")
def _small_images(request):
    """Train on images of 16 pixels, or on the data set that a module names as TRAINS_ON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "DATA", getattr(request.module, "TRAINS_ON", "tiny16"))
        yield
