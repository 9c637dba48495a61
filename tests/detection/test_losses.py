"""The terms that a teacher adds, on hand-made logits and pyramids."""

import pytest
import torch
import torch.nn.functional as F
from nets import detector
from support import golden_values

from mdistiller.detection.config import load_config
from mdistiller.detection.methods import LEVELS, build_method
from mdistiller.distillers import Output
from mdistiller.registry import UserError

SIZES = {"0": (24, 40), "1": (12, 20), "2": (6, 10), "3": (3, 5), "pool": (2, 3)}


@pytest.fixture(scope="module")
def net():
    return detector()


def method(name, net, **changes):
    """A method over a network with itself as the teacher."""
    words = [word for key, value in changes.items() for word in (f"DETECTION.{name}.{key}", value)]
    return build_method(name, net, net, load_config("", ["DISTILLER.TYPE", name, *words]))


def of_logits(part, student, teacher, labels):
    """The term of logits [R, classes]."""
    return part.distill(Output(student, {}), Output(teacher, {}), labels, epoch=1)


def of_maps(part, student, teacher):
    """The term of two pyramids."""
    outputs = [Output(torch.zeros(0), part.student.features(maps)) for maps in (student, teacher)]
    return part.distill(*outputs, torch.zeros(0), epoch=1)


def pyramid(seed, channels=32):
    """Maps of two images, whose levels come in any order."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(2, channels, *size, generator=generator) for n, size in SIZES.items()}


def golden_logits():
    student = (4 * golden_values((8, 10), 1)).requires_grad_()
    return student, 6 * golden_values((8, 10), 2), torch.arange(8)


@pytest.mark.parametrize(
    ("name", "settings", "value", "gradient"),
    [
        ("DKD", {"ALPHA": 1.0, "BETA": 0.5}, 2.92363133, 0.2669072),
        ("DKD", {"ALPHA": 1.0, "BETA": 8.0, "T": 4.0}, 72.82914, 3.945475),
        ("KD", {}, 3.44972102, 0.304369),
        ("KD", {"T": 4.0, "WEIGHT": 0.5}, 9.23463012 / 2, 0.4851301 / 2),
    ],
)
def test_logit_terms_have_the_reference_values(net, name, settings, value, gradient):
    student, teacher, labels = golden_logits()
    loss = of_logits(method(name, net, **settings), student, teacher, labels)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-7)
    assert student.grad.norm().item() == pytest.approx(gradient, rel=1e-6)


def test_dkd_has_the_original_weights(net):
    """alpha 1, beta 0.25, T 1: what the originals of these configs have."""
    weights = ({"ALPHA": 1.0, "BETA": 0.0}, {"ALPHA": 0.0, "BETA": 1.0}, {})
    tckd, nckd, both = (of_logits(method("DKD", net, **w), *golden_logits()) for w in weights)
    assert both.item() == pytest.approx((tckd + nckd / 4).item())


def test_dkd_does_not_care_how_classes_are_numbered(net):
    """The background is an ordinary class: it is moved as well."""
    student, teacher, labels = golden_logits()
    order = torch.tensor([7, 3, 0, 9, 1, 8, 2, 5, 6, 4])
    place = order.argsort()
    dkd = method("DKD", net)
    moved = of_logits(dkd, student[:, order], teacher[:, order], place[labels])
    plain = of_logits(dkd, student, teacher, labels)
    assert moved.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["DKD", "KD"])
def test_saturated_logits_give_finite_terms(net, name):
    """The textbook form is NaN where both networks are sure of the background."""
    sure = torch.tensor([[200.0, 0, 0], [1e4, -1e4, 0]])
    student = sure.clone().requires_grad_()
    part = method(name, net)
    loss = of_logits(part, student, sure, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.isfinite().all()
    student.grad = None
    loss = of_logits(part, student, -sure, torch.tensor([0, 2]))
    loss.backward()
    assert loss.isfinite()
    assert loss > 100
    assert student.grad.isfinite().all()


def reference_review(review, student, teacher):
    """Knowledge review as the paper has it, level by level in float64."""
    total, residual = 0.0, None
    for block, name in zip(review.abfs, ["pool", "3", "2", "1", "0"], strict=True):
        x = normalized(block.conv1, student[name].double(), padding=0)
        if residual is not None:
            above = F.interpolate(residual, x.shape[2:], mode="nearest")
            gate = block.att_conv[0]
            both = torch.cat([x, above], 1)
            gates = F.conv2d(both, gate.weight.double(), gate.bias.double()).sigmoid()
            x = x * gates[:, :1] + above * gates[:, 1:]
        else:
            assert block.att_conv is None
        residual = x
        total += pyramid_distance(normalized(block.conv2, x, padding=1), teacher[name].double())
    return total


def normalized(layers, x, padding):
    """A convolution without bias and a fresh batch norm."""
    x = F.conv2d(x, layers[0].weight.double(), padding=padding)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def pyramid_distance(x, y):
    """HCL; the width decides nothing."""
    terms, weights = [(x - y).square().mean()], [1.0]
    for side in (4, 2, 1):
        if side < x.shape[2]:
            pooled = [F.adaptive_avg_pool2d(maps, side) for maps in (x, y)]
            terms.append((pooled[0] - pooled[1]).square().mean())
            weights.append(weights[-1] / 2)
    return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)


def test_review_is_the_papers(net):
    torch.manual_seed(0)
    review = method("REVIEWKD", net, WEIGHT=1.2, MID_CHANNELS=16)
    student, teacher = pyramid(1), pyramid(2)
    loss = of_maps(review, student, teacher)
    assert loss.item() == pytest.approx(1.2 * reference_review(review, student, teacher).item())


def test_review_has_the_originals_size():
    with torch.device("meta"):
        review = method("REVIEWKD", detector_of(256))
    assert sum(p.numel() for p in review.parameters()) == 3_286_024


def detector_of(channels):
    from nets import node

    from mdistiller.detection.networks.models import build_detector

    return build_detector(node(CHANNELS=channels), 81)


def test_fitnet_sums_the_levels_differences(net):
    fitnet = method("FITNET", net, LEVELS=["P6", "P3"], WEIGHT=2.0)
    student, teacher = pyramid(1), pyramid(2)
    loss = of_maps(fitnet, student, teacher)
    expected = 0.0
    for adapter, name in zip(fitnet.adapters, ("1", "pool"), strict=True):
        mapped = torch.einsum("oi,nihw->nohw", adapter.weight[:, :, 0, 0], student[name])
        expected += (mapped + adapter.bias[:, None, None] - teacher[name]).square().mean()
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-5)


def test_levels_that_are_not_there(net):
    for levels in (["P7"], [], ["P2", "P2"]):
        message = r"DETECTION\.FITNET\.LEVELS .* must name some of P2, P3"
        with pytest.raises(UserError, match=message):
            method("FITNET", net, LEVELS=levels)


def test_levels_are_torchvisions(net):
    assert [*net.backbone.body.return_layers.values(), "pool"] == list(LEVELS.values())
