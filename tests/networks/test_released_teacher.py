"""Networks of our zoos with released weights: the teacher's file, the student's new head."""

from types import SimpleNamespace

import pytest
import torch
from support import saved_teacher
from torchvision.transforms import InterpolationMode

from mdistiller.engine.cfg import load_config
from mdistiller.models import ModelEntry, cifar_model_dict
from mdistiller.networks.network import build_network
from mdistiller.networks.released import PRETRAINED
from mdistiller.networks.teacher_weights import find_teacher
from mdistiller.registry import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the weights of a `resnet8` that torchvision publishes, for 100 classes, belong."""
    url = saved_teacher(tmp_path, num_classes=100).as_uri()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    fake = SimpleNamespace(
        url=url,
        meta={"categories": [""] * 100},
        transforms=lambda: SimpleNamespace(
            **{"mean": MEAN, "std": STD, "crop_size": [32], "resize_size": [32]},
            interpolation=InterpolationMode.BILINEAR,
        ),
    )
    monkeypatch.setattr("torchvision.models.get_weight", {"Fake.V1": fake}.get)
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


def build(role, classes, weights=None, name="resnet8"):
    cfg = load_config("", [f"DISTILLER.{role}", name, f"DISTILLER.{role}_ARGS.pretrained", True])
    data = SimpleNamespace(
        zoo="cifar", num_classes=classes, image_size=(32, 32), mean=MEAN, std=STD
    )
    return build_network(cfg, role, data, weights)


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("file", [False, True])
def test_a_student_of_other_classes_gets_a_new_head(place, tmp_path, monkeypatch, fetched, file):
    """Whether the weights are torchvision's, here already or not, or a file of ours."""
    published = torch.load(tmp_path / "resnet8_100.pth", weights_only=True)["model"]
    if fetched:
        find(100)
    if file:
        entry = ModelEntry(cifar_model_dict["resnet8"].constructor, str(find(100)))
        monkeypatch.setitem(cifar_model_dict, "resnet8", entry)
    own = build("STUDENT", 10).state_dict()
    assert [key for key in own if not torch.equal(own[key], published[key])] == [
        "fc.weight",
        "fc.bias",
    ]
    assert len(own["fc.bias"]) == 10
    assert 0 < own["fc.weight"].std() < 1
    same = build("STUDENT", 100).state_dict()
    assert all(torch.equal(same[key], published[key]) for key in same)


@pytest.mark.parametrize("file", [False, True])
def test_a_teacher_of_other_classes_is_refused(place, monkeypatch, file):
    path = find(100)
    if file:
        entry = ModelEntry(cifar_model_dict["resnet8"].constructor, str(path))
        monkeypatch.setitem(cifar_model_dict, "resnet8", entry)
    assert find(10) == path
    message = "is of a resnet8 for 100 classes, but 10 are wanted"
    with pytest.raises(UserError, match=message):
        build("TEACHER", 10, path)
    with pytest.raises(UserError, match="for 100 classes, but 10 are wanted"):
        build("STUDENT", 10, PRETRAINED)  # to be evaluated as it is


def test_a_student_of_another_shape_is_refused(place, monkeypatch):
    entry = ModelEntry(cifar_model_dict["resnet14"].constructor, str(find(100)))
    monkeypatch.setitem(cifar_model_dict, "resnet14", entry)
    with pytest.raises(UserError, match=r"do not fit together: .* missing tensors"):
        build("STUDENT", 10, name="resnet14")
