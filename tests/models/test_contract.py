"""What every network of the zoos must give (see StagedNet)."""

from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """A network after one forward in training mode: what it gave, with its graph."""

    name: str
    net: StagedNet
    logits: Any
    features: dict[str, Any]
    norms: list[Any]  # outputs of the batch norms before the stages' ReLUs

    @property
    def maps(self):
        features = self.features
        return features["feats"] + features.get("preact_feats", []) + [features["final_map"]]


NOISE = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def build(name):
    """A network of 7 classes with weights that are quickly made."""
    with torch.device("meta"):
        net = ENTRIES[name](num_classes=7)
    net.to_empty(device="cpu")
    for key, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            count = tensor.numel()
            noise = NOISE.repeat(-(-count // len(NOISE)))[:count].view_as(tensor)
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
        else:
            tensor.fill_(float(key.endswith(("weight", "running_var"))))
    return net


def run(name):
    torch.manual_seed(1)
    net, outputs = build(name), []
    hooks = [
        norm.register_forward_hook(lambda _, __, out: outputs.append(out))
        for norm in ([] if name in NO_NORM else net.get_bn_before_relu())
    ]
    case = Case(name, net, *net.train()(torch.randn(2, 3, 32, 32)), outputs)
    for hook in hooks:
        hook.remove()
    return case


def batch_norms_run_once_per_forward(case):
    norms = [layer for layer in case.net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)


def stages_have_the_declared_channels(case):
    channels = case.net.get_stage_channels()
    assert [feat.shape[1] for feat in case.features["feats"]] == channels
    assert len(channels) >= 2


def preactivations_pair_with_features(case):
    if case.name in LINEAR:
        assert "preact_feats" not in case.features
        return
    feats, preacts = case.features["feats"], case.features["preact_feats"]
    assert [preact.shape for preact in preacts] == [feat.shape for feat in feats]
    assert (preacts[0] is feats[0]) == (case.name not in NO_STEM)
    if case.name.split("-")[1].startswith(ACTIVATED):
        for feat, preact in zip(feats, preacts, strict=True):
            torch.testing.assert_close(F.relu(preact), feat)
            assert preact is feat or preact.min() < 0


def head_is_pooling_and_classifier(case):
    net, pooled = case.net, case.features["pooled_feat"]
    assert case.logits.shape == (2, 7)
    if net.globally_pooled:
        mean = case.features["final_map"].mean(dim=(2, 3))
        torch.testing.assert_close(pooled.flatten(1), mean)
        assert net.classifier().weight.shape[:2] == (7, case.features["final_map"].shape[1])
    torch.testing.assert_close(net.classifier()(pooled).flatten(1), case.logits)


def nothing_that_is_returned_was_overwritten(case):
    assert [tensor._version for tensor in case.maps] == [0] * len(case.maps)


def reaches(tensor, parameter):
    """Whether the graph of a tensor leads to a parameter."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is parameter:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def every_feature_has_a_path_to_the_stem(case):
    first = next(case.net.parameters())
    assert [reaches(tensor, first) for tensor in case.maps] == [True] * len(case.maps)


def norms_before_relu_fit_their_stages(case):
    if case.name in NO_NORM:
        with pytest.raises(UserError, match="another teacher"):
            case.net.get_bn_before_relu()
        with pytest.raises(NotImplementedError):  # what the original raises
            case.net.get_bn_before_relu()
        return
    widths = case.net.get_stage_channels()
    stages = widths if case.name in NO_STEM else widths[1:]
    if case.name.startswith("imagenet-ResNet"):
        stages = stages[1:]  # the original's OFD leaves out the first
    assert [norm.num_features for norm in case.net.get_bn_before_relu()] == stages


def norms_before_relu_make_the_preactivations(case):
    """Each norm's output, plus at most a shortcut, is the stage's pre-activation."""
    if case.name in NO_NORM | LINEAR:
        return
    preacts = case.features["preact_feats"][-len(case.norms) :]
    for preact, output in zip(preacts, case.norms, strict=True):
        (grad,) = torch.autograd.grad(preact.sum(), output, retain_graph=True)
        assert torch.equal(grad, torch.ones_like(grad))


def gradient_reaches_every_parameter(case):
    """The last check on the graph."""
    grads = torch.autograd.grad(
        case.logits.square().sum(), list(case.net.parameters()), allow_unused=True
    )
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@torch.no_grad()
def other_sizes_run_and_eval_mode_repeats_itself(case):
    """In eval mode nothing of the state moves."""
    net = case.net.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    image = torch.randn(1, 3, 48, 48)
    if case.name.startswith("cifar-Baby"):
        with pytest.raises(UserError, match="32x32 images, not 48x48") as caught:
            net(image)
        assert "\n" not in str(caught.value)
        image = image[:, :, :32, :32]
    (first, features), (second, _) = net(image), net(image)
    assert first.shape == (1, 7)
    assert [feat.shape[1] for feat in features["feats"]] == net.get_stage_channels()
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def state_dicts_are_of_one_layout(case):
    """As many classes as the data sets have by default; on no device."""
    with torch.device("meta"):
        other = ENTRIES[case.name]()
    classes = 1000 if case.name.startswith("imagenet") else 100
    assert isinstance(other, StagedNet)
    assert other.classifier().weight.shape[0] == classes
    assert list(other.state_dict()) == list(case.net.state_dict())


CHECKS = [
    batch_norms_run_once_per_forward,
    stages_have_the_declared_channels,
    preactivations_pair_with_features,
    head_is_pooling_and_classifier,
    nothing_that_is_returned_was_overwritten,
    every_feature_has_a_path_to_the_stem,
    norms_before_relu_fit_their_stages,
    norms_before_relu_make_the_preactivations,
    gradient_reaches_every_parameter,
    other_sizes_run_and_eval_mode_repeats_itself,
    state_dicts_are_of_one_layout,
]


DEEPER = {  # of the files and the blocks of others; slow
    *("cifar-resnet44", "cifar-resnet56", "cifar-resnet110", "cifar-vgg11", "cifar-vgg16"),
    *("cifar-vgg19", "cifar-wrn_28_4", "cifar-wrn_40_1", "cifar-wrn_50_2", "cifar-ResNet34"),
    *("imagenet-ResNet34", "imagenet-ResNet101"),
}
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in DEEPER else []) for n in ENTRIES]


def test_deeper_networks_exist():
    assert set(ENTRIES) > DEEPER


@pytest.mark.parametrize("name", NAMES)
def test_a_network_keeps_to_the_contract(name, capsys):
    case, wrong = run(name), []
    for check in CHECKS:
        try:
            check(case)
        except AssertionError as error:
            wrong.append(f"{check.__name__}: {error}")
    assert wrong == []
    assert capsys.readouterr() == ("", "")
