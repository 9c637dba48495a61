"""Networks of timm and torchvision behind the contract of StagedNet."""

import copy
import sys

import pytest
import timm
import torch
from support import same_state
from torchvision import models as torchvision_models
from torchvision.models.vision_transformer import VisionTransformer

from mdistiller.models import StagedNet, get_model_entry
from mdistiller.models.external._torchvision import TorchvisionNet
from mdistiller.models.external._wrapper import stage_indices, uneven_norms
from mdistiller.registry import UserError
from mdistiller.weights import load_network

SMALL_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 8, "num_heads": 3}
SMALL_SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
SMALL_ENCODER = {"embed_dim": 48, "depth": 4, "num_heads": 3}
# name: (side of the images, arguments, heights of stem and stages, made of tokens)
NETS = {
    "timm/resnet10t": (64, {}, [32, 16, 8, 4, 2], False),
    "timm/efficientnet_lite0": (64, {}, [32, 16, 8, 4, 2], False),
    "timm/convnext_atto": (64, {"dims": (8, 12, 16, 24)}, [16, 16, 8, 4, 2], False),
    "timm/vit_tiny_patch16_224": (32, SMALL_VIT, [8] * 5, True),
    "timm/swin_tiny_patch4_window7_224": (32, SMALL_SWIN, [8, 8, 4, 2, 1], True),
    "timm/mixer_s16_224": (64, {}, [4] * 5, True),
    "timm/vit_tiny_r_s16_p8_224": (64, {"depth": 4}, [2] * 5, True),
    "timm/xcit_nano_12_p16_224": (64, {}, [4] * 5, True),  # its first layer gives the size as well
    "timm/twins_pcpvt_small": (64, {"depths": (1, 1, 1, 1)}, [16, 16, 8, 4, 2], False),
    "timm/qwen3_vit_88m": (64, SMALL_ENCODER, [4] * 5, True),  # its stages are an encoder's
    "torchvision/resnet18": (32, {}, [16, 8, 4, 2, 1], False),
    "torchvision/shufflenet_v2_x0_5": (64, {}, [32, 16, 8, 4, 2], False),
    "torchvision/swin_t": (64, {}, [16, 16, 8, 4, 2], True),
    "torchvision/vit_b_16": (32, {}, [2] * 5, True),
}


def build(name, side, settings):
    torch.manual_seed(0)
    return get_model_entry(name, "cifar")(num_classes=7, image_size=(side, side), **settings)


def library_net(name):
    """The same network, built by the library with the same seed."""
    side, settings, _, tokens = NETS[name]
    torch.manual_seed(0)
    library, short = name.split("/")
    if library == "timm":
        size = {"img_size": (side, side)} if tokens else {}
        return timm.create_model(short, num_classes=7, **size, **settings)
    size = {"image_size": side} if short.startswith("vit") else {}
    return torchvision_models.get_model(short, num_classes=7, **size, **settings)


def check_stages(net, output, heights, tokens):
    feats = output[1]["feats"]
    assert [feat.shape[2] for feat in feats] == [feat.shape[3] for feat in feats] == heights
    assert [feat.shape[1] for feat in feats] == net.get_stage_channels()
    assert net.tokens is tokens
    with pytest.raises(UserError, match="another teacher"):
        net.get_bn_before_relu()


def check_head(net, output):
    logits, features = output
    torch.testing.assert_close(net.classifier()(features["pooled_feat"]), logits)
    mean = features["final_map"].mean(dim=(2, 3))
    if net.globally_pooled:
        torch.testing.assert_close(features["pooled_feat"], mean, rtol=1e-4, atol=1e-5)
    else:
        assert mean.shape != features["pooled_feat"].shape or not torch.allclose(
            mean, features["pooled_feat"], rtol=1e-2, atol=1e-2
        )


def check_gradients(net, output):
    """The logits' reach all parameters; that of every stage some."""
    logits, features = output
    parameters = set(net.parameters())
    for feat in [*features["feats"], features["final_map"]]:
        assert parameters & leaves(feat)
    grads = torch.autograd.grad(logits.square().sum(), list(net.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def leaves(tensor):
    """The parameters that the graph of a tensor leads to."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


LARGE = ("torchvision/resnet18", "torchvision/vit_b_16")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in NETS]
)
def test_a_network_of_a_library_keeps_to_the_contract_and_stays_what_it_is(name):
    side, settings, heights, tokens = NETS[name]
    net = build(name, side, settings).eval()
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    output = net(image)
    assert isinstance(net, StagedNet)
    check_stages(net, output, heights, tokens)
    check_head(net, output)
    plain = library_net(name).eval()
    assert same_state(net.state_dict(), plain.state_dict())  # building moved no statistics
    with torch.no_grad():
        torch.testing.assert_close(output[0], plain(image))
    check_gradients(net, output)


def test_a_file_of_the_library_loads_into_a_copy_that_shares_nothing(tmp_path):
    for name in ("timm/resnet10t", "timm/vit_tiny_patch16_224", "torchvision/shufflenet_v2_x0_5"):
        side, settings, _, _ = NETS[name]
        net, plain = build(name, side, settings).eval(), library_net(name).eval()
        image = torch.randn(2, 3, side, side)
        before = net(image)[0]
        for key, value in plain.state_dict().items():
            value += 0.5 if "running_" in key else 0.01 if value.is_floating_point() else 0
        torch.save(plain.state_dict(), tmp_path / "own.pth")
        twin = copy.deepcopy(net)
        load_network(twin, tmp_path / "own.pth", name, 7)
        torch.testing.assert_close(twin(image)[0], plain(image))
        torch.testing.assert_close(net(image)[0], before)


def test_a_part_of_a_larger_module_keeps_the_names():
    net = build("timm/vit_tiny_patch16_224", 32, SMALL_VIT)
    both = torch.nn.ModuleDict({"student": net, "teacher": copy.deepcopy(net)})
    state = {key: value.clone() for key, value in both.state_dict().items()}
    own = list(net.state_dict())
    assert list(state) == [*(f"student.{key}" for key in own), *(f"teacher.{key}" for key in own)]
    with torch.no_grad():
        for value in both.parameters():
            value.zero_()
    both.load_state_dict(state)
    assert same_state(state, both.state_dict())


@pytest.mark.parametrize(
    "norm",
    [torch.nn.LayerNorm, torch.nn.BatchNorm1d, torch.nn.RMSNorm, timm.layers.RmsNorm],
    ids=str,
)
def test_the_check_at_building_sees_norms_of_any_kind(norm):
    layer = norm(6).eval()
    images = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain = layer(images)
    with torch.no_grad(), uneven_norms(torch.nn.Sequential(layer)):
        assert (layer(images) - plain).abs().max() > 0.1
    assert torch.equal(layer(images), plain)


@pytest.mark.parametrize(
    "name",
    [
        "timm/efficientvit_m0",  # batch norm before the classifier
        "timm/shvit_s1",
        "timm/pit_ti_224",  # its last output is the class token alone
    ],
)
@torch.no_grad()
def test_heads_of_other_forms_give_the_logits_of_timm(name):
    net = build(name, 64, {}).eval()
    generator = torch.Generator().manual_seed(2)
    for key, value in net.net.state_dict().items():
        if "running_" in key:
            assert torch.equal(value, torch.full_like(value, "var" in key)), "building changed it"
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    logits, features = net(image)
    torch.testing.assert_close(logits, net.net(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(net.classifier()(features["pooled_feat"]), logits)
    assert features["final_map"].shape == features["feats"][-1].shape
    assert not net.globally_pooled


def small_vit(library):
    """A transformer of images of 32 pixels."""
    if library == "timm":
        return build("timm/vit_tiny_patch16_224", 32, SMALL_VIT).eval()
    torch.manual_seed(0)
    return TorchvisionNet(VisionTransformer(32, 8, 4, 2, 12, 24, num_classes=7), "small", (32, 32))


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_tokens_become_maps_in_place_and_class_tokens_are_apart(name):
    net = small_vit(name).eval()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    _, features = net(image)
    inner = net.net
    embed = inner.patch_embed.proj if name.startswith("timm") else inner.conv_proj
    torch.testing.assert_close(features["feats"][0], embed(image))
    tokens = features["class_tokens"]
    assert [token.shape[:2] for token in tokens] == [(2, 1)] * 4
    norm = inner.norm if name.startswith("timm") else inner.encoder.ln
    torch.testing.assert_close(norm(tokens[-1])[:, 0], features["pooled_feat"])
    last = norm(features["feats"][-1].flatten(2).mT).mT.unflatten(
        2, features["final_map"].shape[2:]
    )
    torch.testing.assert_close(last, features["final_map"])


def test_stages_of_one_resolution_are_quarters_of_the_depth():
    assert stage_indices([8] * 12) == [2, 5, 8, 11]
    assert stage_indices([8] * 5) == [1, 2, 3, 4]
    assert stage_indices([8] * 3) == [0, 1, 2]
    assert stage_indices([16, 16, 8, 4, 4, 4]) == [1, 2, 5]


def test_the_size_of_the_images_is_passed_on_where_it_is_fixed():
    net = build("timm/vit_tiny_patch16_224", 48, SMALL_VIT)
    assert net.net.pos_embed.shape[1] == 1 + 12 * 12
    free = get_model_entry("timm/resnet10t", "tiny_imagenet")(num_classes=3)
    assert free.eval()(torch.zeros(1, 3, 64, 64))[0].shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "side", "settings", "message"),
    [
        ("timm/resnet19", 32, {}, "timm has no network 'resnet19'; did you mean"),
        ("torchvision/resnet8", 32, {}, "torchvision has no network 'resnet8'; did you mean"),
        ("tinm/resnet18", 32, {}, "unknown model library 'tinm'; did you mean 'timm'"),
        ("timm/resnet10t", 32, {"dept": 3}, "timm/resnet10t cannot be built with dept=3"),
        ("timm/mixer_s16_224", 32, {"patch_size": 4}, "mixer_s16_224 cannot be built with"),
        ("timm/inception_v3", 32, {}, "timm/inception_v3 does not run on 32x32 images"),
        ("torchvision/maxvit_t", 32, {}, "torchvision/maxvit_t does not run on 32x32 images"),
        ("timm/deit_tiny_distilled_patch16_224", 32, {}, "head is not a single linear layer"),
        ("torchvision/squeezenet1_1", 64, {}, "its head is not a linear layer"),
        ("timm/coat_tiny", 64, {}, "coat_tiny cannot be used here: its features cannot be read"),
        ("timm/vit_tiny_patch16_224", 32, {"patch_drop_rate": 0.5}, "patch_drop_rate 0.5 leaves"),
        ("timm/qwen3_vit_88m_enc", 32, SMALL_ENCODER, "cannot be used here: it has no classifier"),
        ("timm/qwen3_vit_88m_merge", 64, SMALL_ENCODER, "its last tokens are merged"),
        ("torchvision/googlenet", 64, {"init_weights": False}, "it has auxiliary logits"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(name, side, settings, message, capfd):
    with pytest.raises(UserError, match=message) as caught:
        build(name, side, settings)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_timm_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"timm cannot be imported .*pip install mdistiller\[timm\]"
    ):
        get_model_entry("timm/resnet18", "cifar")
