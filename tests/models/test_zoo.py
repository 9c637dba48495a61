"""The zoos as tables, released weights, and what is particular to a family."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mdistiller.models import (
    ModelEntry,
    cifar_model_dict,
    get_model_entry,
    imagenet_model_dict,
    tiny_imagenet_model_dict,
)
from mdistiller.models.cifar import baby, resnetv2, wrn
from mdistiller.models.cifar.resnet import ResNet, resnet8, resnet32x4
from mdistiller.registry import UnknownNameError, UserError
from mdistiller.runtime import project_root
from mdistiller.weights import load_network

RESNETS = ("ResNet18", "ResNet34", "ResNet50", "ResNet101")
TEACHERS = ("resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13")


def test_released_checkpoints_are_where_the_original_keeps_them():
    root = project_root() / "download_ckpts"
    for name, (_, path) in cifar_model_dict.items():
        released = root / "cifar_teachers" / f"{name}_vanilla" / "ckpt_epoch_240.pth"
        assert path == (str(released) if name in TEACHERS else None)
    assert {name: entry.checkpoint for name, entry in tiny_imagenet_model_dict.items()} == {
        "ResNet18": str(root / "tiny_imagenet_teachers" / "ResNet18_vanilla" / "ti_res18"),
        "MobileNetV2": None,
        "ShuffleV2": None,
    }
    assert {name: entry.checkpoint for name, entry in imagenet_model_dict.items()} == {
        **{name: f"torchvision:{name}_Weights.IMAGENET1K_V1" for name in RESNETS},
        "MobileNetV1": None,
        "MobileNetV2": None,
    }


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'resnet32x4'"):
        get_model_entry("resnet32x", "cifar")
    with pytest.raises(UnknownNameError, match="did you mean 'cifar'"):
        get_model_entry("resnet8", "cifar100")
    with pytest.raises(KeyError):
        imagenet_model_dict["resnet8"]


def test_an_entry_unpacks_and_is_callable():
    constructor, checkpoint = get_model_entry("resnet32x4", "cifar")
    assert constructor is resnet32x4
    assert checkpoint.endswith("ckpt_epoch_240.pth")
    assert get_model_entry("resnet8", "cifar")(num_classes=3).fc.out_features == 3


def released(path, num_classes=100):
    """Write a file like those of the original: weights, and what its training script adds."""
    net = resnet8(num_classes)
    beside = {"epoch": 240, "optimizer": {"lr": np.float64(0.05)}, "best_acc": torch.tensor(1.0)}
    torch.save({"model": net.state_dict(), **beside}, path)
    return net


def test_pretrained_loads_the_file(tmp_path):
    path = tmp_path / "ckpt_epoch_240.pth"
    net = released(path)
    loaded = ModelEntry(resnet8, str(path))(num_classes=100, pretrained=True)
    assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))


def test_pretrained_says_what_is_wrong(tmp_path):
    entry = ModelEntry(resnet8, str(tmp_path / "here"))
    with pytest.raises(UserError, match=r"not at .*here"):
        entry(pretrained=True)
    with pytest.raises(UserError, match="resnet8 has no released weights"):
        ModelEntry(resnet8)(pretrained=True)
    released(tmp_path / "here", num_classes=10)
    with pytest.raises(UserError, match="resnet8 for 10 classes, but 100 are wanted") as caught:
        entry(num_classes=100, pretrained=True)
    assert "\n" not in str(caught.value)


def torchvisions(name, classes=5):
    """torchvision's network with the stem for small images."""
    net = torchvision.models.get_model(name, num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def test_residual_networks_are_torchvisions_but_for_the_stem(tmp_path):
    """Files with `downsample` for the shortcut and `fc` for the classifier load; logits agree."""
    torch.manual_seed(0)
    name, other = "ResNet18", torchvisions("resnet18").eval()
    torch.save({"model": other.state_dict()}, tmp_path / "file")
    net = get_model_entry(name, "cifar")(num_classes=5).eval()
    load_network(net, tmp_path / "file", name, 5)
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(image)[0], other(image))
    assert "layer2.0.shortcut.0.weight" in net.state_dict()


def test_deeper_and_wider_residual_networks_have_torchvisions_tensors():
    pairs = {
        "ResNet34": "resnet34",
        "wrn_50_2": "wide_resnet50_2",
        "resnext50_32x4d": "resnext50_32x4d",
    }
    for name, theirs in pairs.items():
        with torch.device("meta"):
            ours = get_model_entry(name, "cifar")(num_classes=5).state_dict()
            other = torchvisions(theirs).state_dict()
        renamed = {k.replace("shortcut", "downsample"): v for k, v in ours.items()}
        shapes = {k.replace("linear.", "fc."): v.shape for k, v in renamed.items()}
        assert shapes == {key: value.shape for key, value in other.items()}


def test_files_of_repdistillers_resnet18_load(tmp_path):
    """Its shortcut is called `downsample`; all else as here."""
    torch.manual_seed(0)
    net, other = resnetv2.ResNet18(5), resnetv2.ResNet18(5)
    state = {k.replace("shortcut", "downsample"): v for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / "file")
    load_network(other, tmp_path / "file", "ResNet18", 5)
    assert all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))


def test_mobilenetv1_has_its_earlier_name():
    old, new = (get_model_entry(name, "imagenet") for name in ("MobileNetV2", "MobileNetV1"))
    assert old == new


def test_depths_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        ResNet(21)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        wrn.WideResNet(18, 2)


@pytest.mark.parametrize(("side", "last"), [(32, 4), (48, 6), (64, 4), (96, 12)])
def test_vgg_pools_a_fourth_time_for_tiny_imagenet_only(side, last):
    net = get_model_entry("vgg8", "cifar")().eval()
    with torch.no_grad():
        feats = net(torch.zeros(1, 3, side, side))[1]["feats"]
    assert [feat.shape[2] for feat in feats] == [side, side // 2, side // 4, side // 8, last]


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2"])
def test_a_head_named_like_its_accessor_can_be_replaced(name):
    net = get_model_entry(name, "cifar")().eval()
    net.classifier = nn.Linear(net.classifier().in_features, 5)
    assert net(torch.zeros(1, 3, 32, 32))[0].shape == (1, 5)
    assert list(net.state_dict())[-2:] == ["classifier.weight", "classifier.bias"]


def test_initial_weights():
    net = get_model_entry("vgg16", "cifar")()
    conv = net.get_submodule("block4.3")
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert net.classifier().weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not conv.bias.any()
    assert not net.classifier().bias.any()
    assert not wrn.wrn_16_1().fc.bias.any()
    residual = resnetv2.ResNet18(zero_init_residual=True).get_submodule("layer2.1")
    assert not residual.bn2.weight.any()
    assert residual.bn1.weight.all()


@pytest.mark.parametrize("build", [baby.baby_teacher, baby.baby_student])
def test_baby_networks_have_relu_after_convolutions_only_if_asked(build):
    image = torch.randn(4, 3, 32, 32)
    plain = build(num_classes=10).eval()
    active = build(num_classes=10, conv_relu=True).eval()
    active.load_state_dict(plain.state_dict())
    features = plain(image)[1]
    assert all(map(torch.equal, features["feats"], features["preact_feats"]))
    first = plain.stage1.conv(image)
    want = nn.functional.max_pool2d(first.relu(), 2)
    torch.testing.assert_close(active(image)[1]["feats"][0], active.stage1.bn(want))
    assert features["pooled_feat"].shape == (4, plain.classifier().in_features)
