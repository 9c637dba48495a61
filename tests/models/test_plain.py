"""Networks of a user's that return logits and little else are wrapped."""

import types

import pytest
import torch
from torch import nn

from mdistiller.distillers import distiller_dict, get_distiller
from mdistiller.engine.cfg import default_config
from mdistiller.models import ModelEntry
from mdistiller.models.external.plain import PlainNet
from mdistiller.networks.make import check_input, make_network
from mdistiller.registry import UserError
from mdistiller.weights import load_network


class Net(nn.Module):
    """Two resolutions, pooled; subclasses change what `forward` returns."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, num_classes)

    def maps(self, x):
        shallow = self.stem(x)
        return [shallow, self.stage(shallow)]

    def forward(self, x):
        return self.fc(self.pool(self.maps(x)[-1]).flatten(1))


class WithAux(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits * 2) if self.training else logits


class AuxAlways(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits, {"attention": logits * 2}


class Named(Net):
    def forward(self, x):
        return types.SimpleNamespace(logits=super().forward(x))


class Mapped(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class IsFeat(Net):
    def forward(self, x, is_feat=False, preact=False):
        maps = self.maps(x)
        pooled = self.pool(maps[-1]).flatten(1)
        logits = self.fc(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


class ConvHead(Net):
    def __init__(self, num_classes=5):
        super().__init__()
        self.fc = nn.Conv2d(6, num_classes, 1)

    def forward(self, x):
        return self.fc(self.pool(self.maps(x)[-1])).flatten(1)


class Flat(nn.Sequential):
    def __init__(self, num_classes=5):
        super().__init__(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, num_classes))


class Normed(Net):
    """A head that is more than a linear layer."""

    def forward(self, x):
        return super().forward(x).log_softmax(1)


def build(constructor):
    return make_network(ModelEntry(constructor), 5, (8, 8), {}, "")


@pytest.mark.parametrize("kind", [Net, WithAux, AuxAlways, Named, Mapped, IsFeat, ConvHead])
def test_a_plain_network_gives_its_logits_and_the_last_maps_of_each_resolution(kind):
    torch.manual_seed(0)
    net = build(kind)
    own = net.net
    image = torch.randn(2, 3, 8, 8)
    for mode in (True, False):
        logits, features = net.train(mode)(image)
        maps = own.maps(image)
        plain = own.fc(
            own.pool(maps[-1]).flatten(1) if kind is not ConvHead else own.pool(maps[-1])
        )
        torch.testing.assert_close(logits, plain.flatten(1))
        for got, right in zip(features["feats"][-2:], maps, strict=True):
            torch.testing.assert_close(got, right)
        torch.testing.assert_close(features["pooled_feat"].flatten(1), maps[-1].mean((2, 3)))
        torch.testing.assert_close(net.classifier()(features["pooled_feat"]).flatten(1), logits)
    assert net.get_stage_channels()[-1] == 6
    assert net.globally_pooled


def test_state_dicts_keep_the_users_keys(tmp_path):
    source = Net()
    torch.save(source.state_dict(), tmp_path / "own.pt")
    net = build(Net)
    assert set(net.state_dict()) == set(source.state_dict())
    load_network(net, tmp_path / "own.pt", "net", 5)
    torch.testing.assert_close(net.net.fc.weight, source.fc.weight)


def test_a_constructor_without_num_classes_is_called_without():
    assert isinstance(build(lambda: Net(5)), PlainNet)


def test_a_network_of_other_classes_is_refused():
    net = build(lambda num_classes: Net(10))
    data = types.SimpleNamespace(image_size=(8, 8), num_classes=5)
    with pytest.raises(UserError, match=r"net gives logits \[1, 10\].*the data has 5 classes"):
        check_input(net, "net", data)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Normed, "output of a linear"), (lambda: nn.Conv2d(3, 5, 3), "logits")],
)
def test_what_cannot_be_wrapped_is_one_line_that_names_the_page(kind, reason):
    with pytest.raises(UserError, match=rf"{reason}.*docs/extend/own_backbone\.md") as raised:
        build(kind)
    assert "\n" not in str(raised.value)


def test_a_network_that_keeps_the_contract_stays_as_it_is():
    class Contract(Net):
        def forward(self, x):
            return super().forward(x), {"feats": self.maps(x)}

    assert isinstance(build(Contract), Contract)


def test_arguments_that_clash_are_named_without_an_address():
    with pytest.raises(UserError, match="STUDENT_ARGS gives num_classes, which") as raised:
        make_network(ModelEntry(Net), 5, (8, 8), {"num_classes": 3}, "DISTILLER.STUDENT_ARGS")
    assert "0x" not in str(raised.value)


def test_a_constructor_that_cannot_be_called_is_named_with_what_it_lacks():
    with pytest.raises(UserError, match="needs depth: give it in"):
        build(lambda num_classes, depth: Net(num_classes))


def test_a_constructor_that_gives_no_module_is_refused():
    page = r"docs/extend/own_backbone\.md"
    with pytest.raises(UserError, match=f"returns a dict, not a module.*{page}"):
        build(lambda num_classes: {"net": Net(num_classes)})


def test_a_network_without_maps_serves_methods_that_read_logits():
    net = build(Flat)
    logits, features = net(torch.rand(2, 3, 8, 8))
    assert logits.shape == (2, 5)
    assert features == {}
    assert list(net.state_dict()) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    net.load_state_dict(Flat().state_dict())


def test_logits_beside_an_empty_mapping_stay_as_they_are():
    class Dot(Flat):
        def forward(self, x):
            return super().forward(x), {}

    assert isinstance(build(Dot), Dot)


class FlatFeatures(Flat):
    """Its features are rows, not maps."""

    def forward(self, x):
        hidden = self[2](self[1](self[0](x)))
        return self[3](hidden), {"feats": [hidden, hidden], "pooled_feat": hidden}


def test_every_method_runs_on_networks_without_maps_or_says_in_a_line_what_they_lack():
    refused, lines = set(), []
    for make in (Flat, FlatFeatures):
        for method in distiller_dict:
            student, teacher = build(make), build(make)
            batch = {"target": torch.tensor([0, 1, 2, 3]), "index": torch.arange(4), "epoch": 1}
            image = torch.rand(4, 3, 8, 8)
            try:
                distiller = get_distiller(method).build(
                    student, teacher, default_config(), 9, (8, 8), torch.arange(9) % 5
                )
                image = (image, image) if distiller.two_views else image
                distiller.train()(image=image, **batch)
            except UserError as error:
                refused.add((make.__name__, method))
                lines.append(str(error))
    assert not any("\n" in line for line in lines)
    assert {("Flat", "FITNET"), ("FlatFeatures", "AT"), ("FlatFeatures", "SIMKD")} <= refused
    assert not {("Flat", name) for name in ("NONE", "KD", "DKD", "DIST", "RLD")} & refused
