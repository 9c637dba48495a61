"""SDD, CATKD, SIMKD, SEMCKD: their losses against recorded values and the textbook."""

import pytest
import textbook_maps as textbook
import torch
import torch.nn.functional as F
from modern_golden import check_golden, golden_inputs
from support import golden_values
from torch import nn

from mdistiller.distillers.CATKD import binarize, catkd_loss
from mdistiller.distillers.DKD import dkd_rows
from mdistiller.distillers.helpers.features.heads import classify
from mdistiller.distillers.KD import kd_rows
from mdistiller.distillers.SDD import cells, complementary, region_logits, region_nkd, sdd_loss
from mdistiller.distillers.SemCKD import Attention, layer_errors, semckd_loss
from mdistiller.distillers.SimKD import simkd_loss


def sdd(tensors, rows, weight, norm="mean", consistency="label"):
    scales = "124" if "reg_s124" in tensors else "12"
    student, teacher, y = tensors[f"reg_s{scales}"], tensors[f"reg_t{scales}"], tensors["y_sdd"]
    weights = 1 + (weight - 1) * complementary(teacher, y, consistency)
    return sdd_loss(student, teacher, y, rows, weights, norm)


@pytest.mark.parametrize("case", ["sdd_kd_M12", "sdd_kd_M124"])
def test_sdd_over_kd(case):
    def loss(t, h):
        rows = lambda s, v, y: kd_rows(s, v, h["temperature"])  # noqa: E731
        return sdd(t, rows, h["complementary_weight"])

    check_golden(case, loss)


def test_sdd_with_the_papers_sum_over_regions():
    def loss(t, h):
        rows = lambda s, v, y: kd_rows(s, v, h["temperature"])  # noqa: E731
        return sdd(t, rows, h["beta"], norm="sum")

    check_golden("sdd_kd_M12_paper", loss)


@pytest.mark.parametrize("case", ["sdd_dkd_M12", "sdd_dkd_M124"])
def test_sdd_over_dkd(case):
    def loss(t, h):
        def rows(s, v, y):
            tckd, nckd = dkd_rows(s, v, y, h["temperature"])
            return h["alpha"] * tckd + h["beta"] * nckd

        return sdd(t, rows, h["complementary_weight"])

    check_golden(case, loss)


@pytest.mark.parametrize("form", ["code", "fixed"])
@pytest.mark.parametrize("scales", ["M12", "M124"])
def test_sdd_over_nkd(scales, form):
    def loss(t, h):
        rows = lambda s, v, y: region_nkd(s, v, y, h["temp"], h["gamma"], form)  # noqa: E731
        return sdd(t, rows, h["complementary_weight"])

    check_golden(f"sdd_nkd_{scales}" + "_fixed" * (form == "fixed"), loss)


@pytest.mark.parametrize("by_class", [False, True])
def test_sdd_against_the_textbook_with_both_kinds_of_consistency(by_class):
    t = golden_inputs("sdd_kd_M12")
    consistency = "class" if by_class else "label"
    rows = lambda s, v, y: kd_rows(s, v, 2.0)  # noqa: E731
    got = sdd(t, rows, 3.0, consistency=consistency)
    want = textbook.sdd_kd(t["reg_s12"], t["reg_t12"], t["y_sdd"], 2.0, 3.0, by_class)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    other = complementary(t["reg_t12"], t["y_sdd"], "label" if by_class else "class")
    assert not torch.equal(other, complementary(t["reg_t12"], t["y_sdd"], consistency))


@pytest.mark.parametrize("rows", [lambda s, v, y: kd_rows(s, v, 4.0),
                                  lambda s, v, y: dkd_rows(s, v, y, 4.0)[1]])  # fmt: skip
def test_sdd_leaves_out_samples_without_label(rows):
    t = golden_inputs("sdd_kd_M12")
    kept = {name: tensor[:5] for name, tensor in t.items()}
    t["y_sdd"][5:] = -100
    assert sdd(t, rows, 2.0).item() == pytest.approx(sdd(kept, rows, 2.0).item(), rel=1e-12)
    t["y_sdd"][:] = -100
    assert sdd(t, rows, 2.0) == 0


def test_regions_are_the_classifier_on_exact_cells():
    maps, head = golden_values((3, 6, 8, 8), 1), nn.Linear(6, 5).double()
    got = region_logits(head, maps, [1, 2, 4])
    want = textbook.region_logits(maps, head.weight, head.bias, [1, 2, 4])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 14])
def test_cells_have_equal_area_at_any_size(side):
    for parts in (1, 2, 4, 5):
        weights = cells(side, parts)
        torch.testing.assert_close(weights.sum(1), torch.ones(parts).double())
        torch.testing.assert_close(weights.mean(0), torch.full((side,), 1 / side).double())
        if side % parts == 0 or parts % side == 0:
            usual = F.adaptive_avg_pool1d(torch.eye(side).double(), parts).T
            torch.testing.assert_close(weights, usual)


def test_cells_of_seven_pixels_share_those_on_a_border():
    assert (cells(7, 2) * 7).tolist() == [[2, 2, 2, 1, 0, 0, 0], [0, 0, 0, 1, 2, 2, 2]]


def test_a_linear_layer_and_a_1x1_convolution_classify_alike():
    linear, conv = nn.Linear(6, 5), nn.Conv2d(6, 5, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)
    x = golden_values((2, 6, 3, 4), 2).float()
    for bias in (True, False):
        got = classify(linear, x, bias)
        assert torch.equal(got, classify(conv, x, bias))
        want = conv(x) - (0 if bias else conv.bias[:, None, None])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", ["cat_norm", "cat_raw", "cat_binarised"])
def test_catkd(case):
    def loss(t, h):
        binary = "binarise" in h
        return catkd_loss(t["cam_s"], t["cam_t"], h["resolution"], h["normalize"], binary)

    check_golden(case, loss)


def test_catkd_of_the_paper_is_res_squared_times_the_code():
    def loss(t, h):
        res = h["resolution"]
        return res**2 * catkd_loss(t["cam_s"], t["cam_t"], res, h["normalize"])

    check_golden("cat_norm_paper", loss)


@pytest.mark.parametrize("side", ["top", "bottom"])
def test_part_of_the_maps_takes_exactly_so_many_classes(side):
    student, teacher = golden_values((4, 9, 4, 4), 1), golden_values((4, 9, 4, 4), 2)
    order = teacher.mean((2, 3)).argsort(1, descending=side == "top")
    for count in (1, 3, 9):
        want = [
            F.mse_loss(F.adaptive_avg_pool2d(s[k], 2), F.adaptive_avg_pool2d(t[k], 2))
            for s, t, k in zip(student, teacher, order[:, :count], strict=True)
        ]
        got = catkd_loss(student, teacher, 2, normalize=False, **{side: count})
        assert got.item() == pytest.approx((sum(want) / 4).item(), rel=1e-12)
    tied = teacher[:, :1].expand_as(teacher)
    student = student.clone().requires_grad_()
    catkd_loss(student, tied, 2, normalize=False, **{side: 3}).backward()
    touched = student.grad.abs().sum((2, 3)) > 0
    assert touched.sum(1).tolist() == [3] * 4


def test_binary_maps_are_those_above_the_mean_size():
    x = torch.tensor([[[[4.0, -4.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert binarize(x).tolist() == [[[[0, 0], [0, 1]], [[0, 0], [0, 0]]]]


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8)])
def test_simkd_pools_the_teacher_to_the_student(sizes):
    student = golden_values((3, 5, sizes[0], sizes[0]), 1).requires_grad_()
    teacher = golden_values((3, 5, sizes[1], sizes[1]), 2)
    step = sizes[1] // sizes[0]
    pooled = teacher.unflatten(2, (4, step)).unflatten(4, (4, step)).mean((3, 5))
    loss = simkd_loss(student, teacher)
    assert loss.item() == pytest.approx((student - pooled).square().mean().item(), rel=1e-12)
    loss.backward()
    want = 2 * (student.detach() - pooled) / student.numel()
    torch.testing.assert_close(student.grad, want, rtol=1e-10, atol=1e-14)


def test_semckd():
    def loss(t, h):
        student, teacher = (
            [t[f"sem_{who}{i}{j}"] for i in range(2) for j in range(3)] for who in "st"
        )
        return semckd_loss(layer_errors(student, teacher).unflatten(1, (2, 3)), t["sem_att"])

    check_golden("semckd", loss)


@pytest.mark.parametrize("soft", [1.0, 0.3])
def test_semckds_attention_against_the_textbook(soft):
    torch.manual_seed(0)
    net = Attention(8, 2, 3, soft).double()
    student = [golden_values((8, c, 4, 4), c).requires_grad_() for c in (3, 5)]
    teacher = [golden_values((8, c, 4, 4), c) for c in (2, 4, 6)]
    weights = [[list(embed.parameters()) for embed in nets] for nets in (net.queries, net.keys)]
    got = net(student, teacher)
    want = textbook.semckd_attention(student, teacher, *weights, soft)
    assert got.shape == (8, 2, 3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    inputs = [*student, *net.parameters()]
    got, want = (torch.autograd.grad(a.square().sum(), inputs) for a in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_semckds_attention_of_a_short_batch_ignores_the_missing_samples():
    """It is that of the full batch whose other samples are zero maps."""
    torch.manual_seed(0)
    net = Attention(8, 1, 2, 1.0).double()
    student, teacher = (
        [golden_values((5, 3, 4, 4), 1)],
        [golden_values((5, 2, 4, 4), s) for s in (2, 3)],
    )
    filled = [
        [torch.cat([m, torch.zeros(3, *m.shape[1:]).double()]) for m in maps]
        for maps in (student, teacher)
    ]
    torch.testing.assert_close(net(student, teacher), net(*filled)[:5], rtol=1e-12, atol=0)
