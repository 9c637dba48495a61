"""Networks with another head: the contract holds, and their files load into plain ones."""

import pytest
import torch
from support import same_state

from mdistiller.models import get_model_entry
from mdistiller.registry import UserError
from mdistiller.weights import load_network

ENTRIES = [
    ("cifar", "resnet8"),
    ("cifar", "vgg8"),  # the head's name hides a method
    ("cifar", "MobileNetV2"),  # a Sequential as head
    ("tiny_imagenet", "MobileNetV2"),  # a convolution as head
]


def network(zoo, name, classes=7):
    return get_model_entry(name, zoo)(num_classes=classes)


def with_neck(zoo="cifar", name="resnet8"):
    torch.manual_seed(0)
    net = network(zoo, name)
    net.add_neck(hidden=6, outputs=12, size=(2, 3))
    return net


def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("zoo", "name"), ENTRIES)
def test_the_contract_holds_with_a_neck(zoo, name):
    net = with_neck(zoo, name)
    maps = []
    net.neck[0].register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    logits, features = net(image())
    assert features["final_map"].shape[:2] == (2, 12)
    assert maps[0].shape[2] <= 2
    pooled = features["pooled_feat"]
    torch.testing.assert_close(pooled.flatten(1), features["final_map"].mean((2, 3)))
    torch.testing.assert_close(net.classifier()(pooled).flatten(1), logits)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    names = list(net.state_dict())
    assert [key.startswith(f"{net.head}.") for key in names[-2:]] == [True, True]


@pytest.mark.parametrize(("zoo", "name"), ENTRIES)
def test_a_file_brings_its_neck(tmp_path, zoo, name):
    net = with_neck(zoo, name).train()
    net(image())  # moves statistics
    torch.save({"model": net.state_dict()}, tmp_path / "ckpt")
    plain = network(zoo, name)
    load_network(plain, tmp_path / "ckpt", name, 7)
    assert same_state(net.state_dict(), plain.state_dict())
    assert plain.neck.size == (2, 3)
    assert torch.equal(net.eval()(image())[0], plain.eval()(image())[0])
    load_network(plain, tmp_path / "ckpt", name, 7)  # into one that has it


def test_a_file_that_does_not_fit_brings_nothing(tmp_path):
    torch.save({"model": with_neck().state_dict()}, tmp_path / "ckpt")
    for plain, says in (
        (network("cifar", "resnet8", 9), "is of a resnet8 for 7 classes, but 9 are wanted"),
        (network("cifar", "resnet14", 9), "do not fit together"),
        (network("cifar", "BabyStudent", 9), "do not fit together"),
    ):
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        with pytest.raises(UserError, match=says):
            load_network(plain, tmp_path / "ckpt", "resnet8", 9)
        assert same_state(before, plain.state_dict())
        assert plain.neck is None


def test_a_map_that_is_small_enough_is_not_pooled():
    net = network("cifar", "resnet8")
    net.add_neck(hidden=6, outputs=12, size=(8, 8))
    assert net(torch.zeros(1, 3, 16, 16))[1]["final_map"].shape == (1, 12, 4, 4)


def test_other_heads_and_second_necks_are_refused():
    for net in (with_neck(), network("cifar", "BabyStudent")):
        with pytest.raises(UserError, match="takes no neck"):
            net.add_neck(hidden=6, outputs=12, size=(2, 2))
