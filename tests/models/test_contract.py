"""What every network of the zoos must give (see StagedNet)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mdistiller.models import (
    StagedNet,
    cifar_model_dict,
    imagenet_model_dict,
    tiny_imagenet_model_dict,
)
from mdistiller.registry import UserError

ENTRIES = {
    f"{zoo}-{name}": entry
    for zoo, table in (
        ("cifar", cifar_model_dict),
        ("tiny", tiny_imagenet_model_dict),
        ("imagenet", imagenet_model_dict),
    )
    for name, entry in table.items()
}
LINEAR = {"cifar-MobileNetV2", "tiny-MobileNetV2"}  # no pre-activations
NO_NORM = {
    "cifar-ShuffleV2",
    "tiny-ShuffleV2",
    "cifar-BabyStudent",
    "cifar-BabyStudentReLU",
    "cifar-BabyTeacherReLU",
}
ACTIVATED = ("resne", "ResNet", "vgg", "ShuffleV1", "MobileNetV1", "wrn_50_2")
NO_STEM = {"imagenet-MobileNetV1", "imagenet-MobileNetV2"}  # its lists begin with the first stage


@pytest.fixture(scope="module", params=ENTRIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def net(name):
    torch.manual_seed(0)
    return ENTRIES[name](num_classes=7)


@pytest.fixture(scope="module")
def output(net):
    """Logits and features in training mode, with their graph."""
    torch.manual_seed(1)
    net.train()
    return net(torch.randn(2, 3, 32, 32))


def norms_of(net):
    return [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]


def test_batch_norms_run_once_per_forward(net, output):
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms_of(net))


def test_stages_have_the_declared_channels(net, output):
    channels = net.get_stage_channels()
    assert [feat.shape[1] for feat in output[1]["feats"]] == channels
    assert len(channels) >= 2


def test_preactivations_pair_with_features(name, output):
    _, features = output
    if name in LINEAR:
        assert "preact_feats" not in features
        return
    feats, preacts = features["feats"], features["preact_feats"]
    assert [preact.shape for preact in preacts] == [feat.shape for feat in feats]
    assert (preacts[0] is feats[0]) == (name not in NO_STEM)
    if name.split("-")[1].startswith(ACTIVATED):
        for feat, preact in zip(feats, preacts, strict=True):
            torch.testing.assert_close(F.relu(preact), feat)
            assert preact is feat or preact.min() < 0


def test_head_is_pooling_and_classifier(net, output):
    logits, features = output
    assert logits.shape == (2, 7)
    pooled = features["pooled_feat"]
    if net.globally_pooled:
        mean = features["final_map"].mean(dim=(2, 3))
        torch.testing.assert_close(pooled.flatten(1), mean)
        assert net.classifier().weight.shape[:2] == (7, features["final_map"].shape[1])
    torch.testing.assert_close(net.classifier()(pooled).flatten(1), logits)


def test_nothing_that_is_returned_was_overwritten(output):
    _, features = output
    maps = features["feats"] + features.get("preact_feats", []) + [features["final_map"]]
    assert [tensor._version for tensor in maps] == [0] * len(maps)


def test_gradient_reaches_every_parameter(net, output):
    grads = torch.autograd.grad(
        output[0].square().sum(), list(net.parameters()), retain_graph=True, allow_unused=True
    )
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_gradient_of_every_feature_reaches_the_stem(net, output):
    first = next(net.parameters())
    features = output[1]
    for tensor in features["feats"] + features.get("preact_feats", []) + [features["final_map"]]:
        (grad,) = torch.autograd.grad(tensor.square().sum(), first, retain_graph=True)
        assert grad.isfinite().all()


def test_norms_before_relu_fit_their_stages(name, net):
    if name in NO_NORM:
        with pytest.raises(UserError, match="another teacher"):
            net.get_bn_before_relu()
        with pytest.raises(NotImplementedError):  # what the original raises
            net.get_bn_before_relu()
        return
    widths = net.get_stage_channels()
    stages = widths if name in NO_STEM else widths[1:]
    if name.startswith("imagenet-ResNet"):
        stages = stages[1:]  # the original's OFD leaves out the first
    assert [norm.num_features for norm in net.get_bn_before_relu()] == stages


def test_norms_before_relu_make_the_preactivations(name, net):
    """Each norm's output, plus at most a shortcut, is the stage's pre-activation."""
    if name in NO_NORM | LINEAR:
        return
    twin, outputs = copy.deepcopy(net).eval(), []
    norms = twin.get_bn_before_relu()
    for norm in norms:
        norm.register_forward_hook(lambda _, __, out: outputs.append(out))
    preacts = twin(torch.randn(2, 3, 32, 32))[1]["preact_feats"][-len(norms) :]
    for preact, output in zip(preacts, outputs, strict=True):
        (grad,) = torch.autograd.grad(preact.sum(), output, retain_graph=True)
        assert torch.equal(grad, torch.ones_like(grad))


def test_eval_mode_is_deterministic_and_leaves_the_state(net, output):
    twin = copy.deepcopy(net).eval()
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first, second = twin(image)[0], twin(image)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())


def test_state_dict_round_trip(name, net, output):
    other = ENTRIES[name](num_classes=7)
    other.load_state_dict(net.state_dict())
    assert all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))


def test_other_image_sizes(name, net):
    twin = copy.deepcopy(net).eval()
    image = torch.zeros(1, 3, 64, 64)
    if name.startswith("cifar-Baby"):
        with pytest.raises(UserError, match="32x32 images, not 64x64") as caught:
            twin(image)
        assert "\n" not in str(caught.value)
        return
    with torch.no_grad():
        logits, features = twin(image)
    assert logits.shape == (1, 7)
    assert [feat.shape[1] for feat in features["feats"]] == twin.get_stage_channels()


def test_construction_is_silent(name, capsys):
    net = ENTRIES[name]()
    assert isinstance(net, StagedNet)
    assert net.classifier().weight.shape[0] == (1000 if name.startswith("imagenet") else 100)
    assert capsys.readouterr() == ("", "")
