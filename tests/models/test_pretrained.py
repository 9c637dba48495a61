"""Released weights of timm and torchvision, from files in place of downloads."""

import pytest
import timm
import torch
from torchvision import models as torchvision_models
from torchvision.models.vision_transformer import VisionTransformer

from mdistiller.models import get_model_entry
from mdistiller.models.external._torchvision import TorchvisionNet, load_released
from mdistiller.registry import UserError
from mdistiller.weights import load_network

VIT = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2}
SMALL = "torchvision/mnasnet0_5"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def entry(name):
    return get_model_entry(name, "cifar")


def saved(net, path):
    torch.save(net.state_dict(), path)
    return net.state_dict()


@pytest.fixture
def release(tmp_path, monkeypatch):
    """`release(net, weights)` publishes a network's weights as torchvision's; returns them."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def publish(net, weights):
        state = saved(net, tmp_path / "published.pth")
        monkeypatch.setattr(weights.value, "url", (tmp_path / "published.pth").as_uri())
        return state

    return publish


def same_but(first, second, *prefixes):
    """Whether two state dicts agree in all but some keys, and there in nothing."""
    other = [key for key in first if not key.startswith(prefixes)]
    assert len(other) < len(first) or not prefixes
    assert all(torch.equal(first[key], second[key]) for key in other)
    return all(first[key].shape != second[key].shape for key in set(first) - set(other))


def test_timm_loads_its_weights_whole_or_under_a_new_head(tmp_path):
    torch.manual_seed(1)
    state = saved(timm.create_model("resnet10t"), tmp_path / "w.pth")
    settings = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}
    whole = entry("timm/resnet10t")(image_size=(32, 32), **settings)
    assert same_but(state, whole.state_dict())
    fresh = entry("timm/resnet10t")(num_classes=7, image_size=(32, 32), **settings)
    assert same_but(state, fresh.state_dict(), "fc.")


def test_timm_resamples_position_embeddings_to_the_images(tmp_path):
    state = saved(timm.create_model("vit_tiny_patch16_224", img_size=64, **VIT), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    net = entry("timm/vit_tiny_patch16_224")(
        num_classes=7, image_size=(32, 32), pretrained=True, pretrained_cfg_overlay=overlay, **VIT
    )
    assert same_but(state, net.state_dict(), "head.", "pos_embed")
    assert net.state_dict()["pos_embed"].shape[1] == 1 + 4 * 4


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_file_of_another_image_size_is_resampled(tmp_path, library):
    """As TEACHER_CKPT names one; what does not fit otherwise is refused as ever."""
    small = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 32}

    def build(side, depth=1):
        if library == "timm":
            settings = {**VIT, "depth": depth}
            return entry("timm/vit_tiny_patch16_224")(
                num_classes=7, image_size=(side, side), **settings
            )
        net = VisionTransformer(side, **{**small, "num_layers": depth}, num_classes=7)
        return TorchvisionNet(net, "small", (side, side))

    torch.manual_seed(1)
    state = saved(build(64), tmp_path / "w.pth")
    net = build(32)
    load_network(net, tmp_path / "w.pth", "vit", 7)
    name = "pos_embed" if library == "timm" else "encoder.pos_embedding"
    assert same_but(state, net.state_dict(), name)
    assert net.state_dict()[name].abs().sum() > 0
    with pytest.raises(UserError, match="missing tensors"):
        load_network(build(32, depth=2), tmp_path / "w.pth", "vit", 7)


def test_torchvision_loads_its_weights_whole_or_under_a_new_head(release):
    torch.manual_seed(1)
    weights = torchvision_models.MNASNet0_5_Weights.IMAGENET1K_V1
    state = release(torchvision_models.mnasnet0_5(), weights)
    whole = entry(SMALL)(image_size=(32, 32), pretrained=True)
    assert same_but(state, whole.state_dict())
    fresh = entry(SMALL)(num_classes=7, image_size=(32, 32), pretrained="IMAGENET1K_V1")
    assert same_but(state, fresh.state_dict(), "classifier.1.")


def test_torchvision_resamples_position_embeddings_to_the_images(release):
    def vit(side, classes):
        return VisionTransformer(side, 8, 4, 2, 12, 24, num_classes=classes)

    state = release(vit(64, 1000), torchvision_models.ViT_B_16_Weights.IMAGENET1K_V1)
    net = TorchvisionNet(vit(32, 7), "small", (32, 32))
    load_released(net, "torchvision:ViT_B_16_Weights.IMAGENET1K_V1")
    assert same_but(state, net.state_dict(), "heads.", "encoder.pos_embedding")
    deeper = TorchvisionNet(VisionTransformer(32, 8, 5, 2, 12, 24), "small", (32, 32))
    with pytest.raises(UserError, match="and small as it is built here do not fit together"):
        load_released(deeper, "torchvision:ViT_B_16_Weights.IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("name", "settings", "classes", "mean", "std"),
    [
        ("timm/resnet10t", {}, 1000, *IMAGENET),
        ("timm/vit_tiny_patch16_224", {}, 1000, (0.5,) * 3, (0.5,) * 3),
        ("timm/vit_tiny_patch16_224.augreg_in21k", {}, 21843, (0.5,) * 3, (0.5,) * 3),
        (
            "timm/resnet10t",
            {"pretrained_cfg_overlay": {"file": "x", "num_classes": 5, "std": (0.2,) * 3}},
            5,
            IMAGENET[0],
            (0.2,) * 3,
        ),
        (SMALL, {}, 1000, *IMAGENET),
        ("torchvision/efficientnet_v2_l", {"pretrained": True}, 1000, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_libraries_say_what_weights_were_trained_on(name, settings, classes, mean, std):
    found, (numbers, how) = entry(name).preprocessing(settings), entry(name).pretrained_on(settings)
    assert (numbers, how.mean, how.std) == (classes, mean, std)
    assert found == how


def test_networks_without_released_weights_say_nothing():
    assert entry("resnet8").pretrained_on({}) is None
    assert entry("timm/vit_small_patch16_18x2_224").pretrained_on({}) is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("timm/vit_small_patch16_18x2_224", {}, "timm publishes no weights of timm/vit_small"),
        ("timm/resnet10t", {"pretrained": "c3_in1k"}, "chosen by name, timm/resnet10t.TAG"),
        ("timm/resnet10t", {"pretrained_cfg": "c3_in1k"}, "pretrained_cfg cannot be given"),
        ("timm/resnet10t", {"pretrained_cfg_overlay": {"fiel": "x"}}, "overlay: .*'fiel'"),
        (
            "timm/resnet10t",
            {"pretrained_cfg_overlay": {"file": "nowhere.pth"}},
            r"the released weights of timm/resnet10t could not be loaded \(",
        ),
        (SMALL, {"pretrained": "V7"}, "mnasnet0_5 are IMAGENET1K_V1; name one of them, or set"),
        (SMALL, {"weights": "IMAGENET1K_V1"}, "set pretrained: IMAGENET1K_V1, not weights"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        entry(name)(num_classes=7, image_size=(32, 32), **{"pretrained": True, **settings})
    assert "\n" not in str(caught.value)
