"""Which file the teacher's weights come from where torchvision publishes some."""

from types import SimpleNamespace

import pytest
import torch
from support import saved_teacher

from mdistiller.engine.build import find_teacher
from mdistiller.engine.cfg import load_config
from mdistiller.models import ModelEntry, cifar_model_dict
from mdistiller.registry import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the weights of a `resnet8` that torchvision publishes, for 100 classes, belong."""
    url = saved_teacher(tmp_path, num_classes=100).as_uri()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.models.get_weight", {"Fake.V1": SimpleNamespace(url=url)}.get)
    entry = ModelEntry(cifar_model_dict["resnet8"].constructor, "torchvision:Fake.V1")
    monkeypatch.setitem(cifar_model_dict, "resnet8", entry)
    return tmp_path / "hub" / "checkpoints" / "resnet8_100.pth"


def find(classes, **settings):
    words = [word for key, value in settings.items() for word in (f"DISTILLER.{key}", str(value))]
    cfg = load_config("", ["DISTILLER.TEACHER", "resnet8", *words])
    facts = {} if classes is None else {"num_classes": classes}
    return find_teacher(cfg, SimpleNamespace(zoo="cifar", **facts))


@pytest.mark.parametrize("classes", [100, None])
def test_the_released_weights_are_downloaded(place, classes):
    """Also before the data are read, when their classes are not known."""
    assert find(classes) == place
    assert place.is_file()


def test_none_are_downloaded_if_there_is_a_file_or_a_config(place, tmp_path):
    own = saved_teacher(tmp_path, seed=2, num_classes=10)
    assert find(100, TEACHER_CKPT=own) == own
    assert find(100, TEACHER_CFG="configs/cifar100/vanilla.yaml") is None
    assert not place.exists()
    find(100)
    assert find(100, TEACHER_CFG="configs/cifar100/vanilla.yaml") == place
    assert find(10, TEACHER_CFG="configs/cifar100/vanilla.yaml") is None


def test_none_are_downloaded_for_other_classes(place):
    with pytest.raises(UserError, match="for 100 classes, but 10 are wanted"):
        find(10)
    assert not place.exists()
