"""FITNET, VID, OFD, REVIEWKD: literal numbers of the original, float64 references, rough input."""

import math

import pytest
import textbook_connectors as textbook
import torch
from support import golden_values
from torch import nn

from mdistiller.distillers.FitNet import fitnet_loss
from mdistiller.distillers.helpers.features.connectors import ConvReg
from mdistiller.distillers.OFD import margin_from_norm, ofd_loss
from mdistiller.distillers.ReviewKD import ABF, hcl_loss, review
from mdistiller.distillers.VID import make_regressor, vid_loss


def golden(*shape, seed):
    return golden_values(shape, seed)


def set_weight(parameter, seed):
    with torch.no_grad():
        parameter.copy_(golden_values(parameter.shape, seed))


def norms(loss, *tensors):
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, tensors)]


def near(want, rel=1e-6):
    return pytest.approx(want, rel=rel)


@pytest.mark.parametrize(
    ("sides", "want", "gradients"),
    [
        ((8, 8), 0.454114059, (0.03580973, 0.06763138, 0.2979605)),
        ((8, 4), 0.442610704, (0.07885589, 0.05081777, 0.2932363)),
        ((4, 8), 0.493299163, (0.03674076, 0.04139937, 0.3237172)),
    ],
)
def test_fitnet_equals_the_original(sides, want, gradients):
    small, large = ((8, width, side, side) for width, side in zip((6, 7), sides, strict=True))
    regressor = ConvReg(small, large).double()
    set_weight(regressor.conv.weight, 61)
    set_weight(regressor.conv.bias, 62)
    student = golden(*small, seed=63).relu().requires_grad_()
    loss = fitnet_loss(regressor(student), golden(*large, seed=64).relu())
    assert loss.item() == near(want)
    got = norms(loss, student, regressor.conv.weight, regressor.bn.weight)
    assert got == near(gradients)


def test_vid_equals_the_original():
    student = golden(8, 6, 8, 8, seed=12).relu().requires_grad_()
    teacher = golden(8, 7, 4, 4, seed=22).relu()
    regressor = make_regressor(6, 7).double()
    weights = [regressor[i].weight for i in (0, 2, 4)]
    for weight, seed in zip(weights, (41, 42, 43), strict=True):
        set_weight(weight, seed)
    start = math.log(math.expm1(5.0 - 1e-5))
    scale = torch.full((7,), start, dtype=torch.float64, requires_grad=True)
    loss = vid_loss(regressor, student, teacher, scale, 1e-5)
    assert loss.item() == near(0.861988038)
    assert norms(loss, student, scale, *weights) == near(
        [0.01084493, 0.03336053, 0.07863984, 0.05343214, 0.03616303]
    )


def test_ofd_and_its_margins_equal_the_original():
    student = (2 * golden(8, 5, 4, 4, seed=51)).requires_grad_()
    loss = ofd_loss(student, 2 * golden(8, 5, 4, 4, seed=52), -(golden(5, seed=53).abs() + 0.1))
    assert loss.item() == near(264.877169)
    assert norms(loss, student) == near([11.5082])
    norm = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        norm.weight.copy_(1.5 * golden(5, seed=54))
        norm.bias.copy_(2 * golden(5, seed=55))
    want = [-0.403081654, -0.133711149, -0.222960831, -1.57854216, -1.14436998]
    assert margin_from_norm(norm).tolist() == near(want)


@pytest.mark.parametrize(
    ("side", "want", "gradient"),
    [
        (1, 0.991349044, 0.4064786),
        (2, 0.725022603, 0.1515766),
        (4, 0.655303053, 0.068655),
        (8, 0.607234245, 0.03173658),
    ],
)
def test_hcl_equals_the_original(side, want, gradient):
    student = golden(8, 3, side, side, seed=81).requires_grad_()
    loss = hcl_loss([student], [golden(8, 3, side, side, seed=82)])
    assert loss.item() == near(want)
    assert norms(loss, student) == near([gradient])


def test_reviewkd_chain_equals_the_original():
    deep, shallow = ABF(6, 6, 10, fuse=False).double(), ABF(5, 6, 9, fuse=True).double()
    gate = shallow.att_conv[0]
    weights = [deep.conv1[0], deep.conv2[0], shallow.conv1[0], shallow.conv2[0], gate]
    for seed, layer in enumerate(weights, start=90):
        set_weight(layer.weight, seed)
    set_weight(gate.bias, 95)
    features = [golden(8, 6, 1, 1, seed=101), golden(8, 5, 4, 4, seed=102)]
    for feature in features:
        feature.requires_grad_()
    outputs = review([deep, shallow], features, [(1, 1), (8, 8)])
    loss = hcl_loss(outputs, [golden(8, 9, 8, 8, seed=103), golden(8, 10, 1, 1, seed=104)])
    assert loss.item() == near(2.41758814)
    assert norms(loss, *features, gate.weight) == near([0.3008421, 0.02801585, 0.02882924])


@pytest.fixture
def maps():
    """Two maps [2, 4, 5, 5] in float64."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, 4, 5, 5, generator=generator, dtype=torch.float64).requires_grad_(i == 0)
        for i in range(2)
    ]


def same(got, want, *tensors):
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    pairs = zip(
        torch.autograd.grad(got, tensors, retain_graph=True),
        torch.autograd.grad(want, tensors),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_losses_equal_the_textbook(maps):
    student, teacher = maps
    same(fitnet_loss(student, teacher), textbook.fitnet(student, teacher), student)
    scale = torch.linspace(-2, 3, 4, dtype=torch.float64).requires_grad_()
    got = vid_loss(nn.Identity(), student, teacher, scale, 1e-3)
    same(got, textbook.vid(student, teacher, scale, 1e-3), student, scale)
    margins = torch.tensor([-0.1, -0.5, -1.0, -2.0], dtype=torch.float64)
    same(ofd_loss(student, teacher, margins), textbook.ofd(student, teacher, margins), student)
    same(hcl_loss([student], [teacher]), textbook.hcl(student, teacher), student)


@pytest.mark.parametrize("bias", [-1.5, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("weight", [0.3, -1.2])
def test_margins_are_the_mean_of_the_negative_part(weight, bias):
    norm = nn.BatchNorm2d(1).double()
    nn.init.constant_(norm.weight, weight)
    nn.init.constant_(norm.bias, bias)
    assert margin_from_norm(norm).item() == near(textbook.margin(weight, bias), rel=1e-5)


@pytest.mark.parametrize(("bias", "want"), [(-0.5, -0.5), (0.0, 0.0), (0.5, 0.0)])
def test_margin_of_a_dead_channel_is_its_negative_constant(bias, want):
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, 0.0)
    nn.init.constant_(norm.bias, bias)
    assert margin_from_norm(norm).item() == want


def test_review_equals_the_textbook():
    generator = torch.Generator().manual_seed(5)
    blocks = [ABF(7, 7, 5, fuse=False), ABF(3, 7, 4, fuse=True), ABF(2, 7, 6, fuse=True)]
    blocks = [block.double() for block in blocks]
    features = [
        torch.randn(4, width, side, side, generator=generator, dtype=torch.float64)
        for width, side in ((7, 1), (3, 4), (2, 8))
    ]
    sizes = [(1, 1), (2, 2), (8, 8)]
    weights = [
        {
            "conv1": block.conv1[0].weight,
            "conv2": block.conv2[0].weight,
            "gate": block.att_conv and block.att_conv[0].weight,
            "gate_bias": block.att_conv and block.att_conv[0].bias,
        }
        for block in blocks
    ]
    got, want = review(blocks, features, sizes), textbook.review(weights, features, sizes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def rough_maps():
    noise = torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "zeros": torch.zeros_like(noise),
        "constant": torch.full_like(noise, 3.0),
        "duplicates": noise[:1].repeat(4, 1, 1, 1),
        "scaled": 1e4 * noise,
    }


def one_block(student, teacher):
    torch.manual_seed(0)
    outputs = review([ABF(5, 5, 5, fuse=False)], [student], [teacher.shape[2:]])
    return hcl_loss(outputs, [teacher])


LOSSES = {
    "fitnet": lambda s, t: fitnet_loss(s, t),
    "vid": lambda s, t: vid_loss(nn.Identity(), s, t, torch.full((5,), 5.0), 1e-5),
    "vid narrow": lambda s, t: vid_loss(nn.Identity(), s, t, torch.full((5,), -200.0), 1e-5),
    "vid wide": lambda s, t: vid_loss(nn.Identity(), s, t, torch.full((5,), 200.0), 1e-5),
    "ofd": lambda s, t: ofd_loss(s, t, torch.full((5,), -0.2)),
    "hcl": lambda s, t: hcl_loss([s], [t]),
    "review": one_block,
}


@pytest.mark.parametrize("loss", ["fitnet", "ofd", "hcl"])
def test_equal_maps_have_nothing_to_distil(loss):
    maps = rough_maps()["scaled"]
    clipped = maps.clamp(min=-0.2)
    assert LOSSES[loss](clipped, maps if loss == "ofd" else clipped) == 0


@pytest.mark.parametrize("loss", ["fitnet", "vid", "ofd", "hcl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_computed_in_float32(loss, dtype):
    s, t = rough_maps()["duplicates"].to(dtype), rough_maps()["constant"].to(dtype)
    got = LOSSES[loss](s, t)
    assert got.dtype == torch.float32
    assert got.item() == near(LOSSES[loss](s.float(), t.float()).item())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_ofd_keeps_its_digits_on_large_maps(form):
    """Stage 1 of an ImageNet network: the sum of 1.6 million squares."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 256, 56, 56).contiguous(memory_format=form) for _ in range(2)]
    margin = -torch.rand(256)
    exact = ofd_loss(*(x.double() for x in maps), margin.double())
    assert ofd_loss(*maps, margin).item() == pytest.approx(exact.item(), rel=1e-6)
