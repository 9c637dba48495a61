"""AT, NST, PKT, SP, RKD, KDSVD, LOGITS, CC against numbers of the original and the textbook."""

import pytest
import textbook
import torch
from support import golden_values

from mdistiller.distillers import RKD as RKD_CLASS
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._base import Output
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.helpers.losses.numerics import mean_square_error
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError


def maps(shapes, first_seed):
    return [golden_values((8, *s), first_seed + i).relu() for i, s in enumerate(shapes)]


# methods.md section 10
S = maps([(4, 8, 8), (6, 8, 8), (8, 4, 4)], 11)
T_A = maps([(5, 8, 8), (7, 4, 4), (9, 4, 4)], 21)
T_B = maps([(5, 8, 8), (7, 8, 8), (9, 4, 4)], 21)
PS, PT = [golden_values((8, 12), 31)], [golden_values((8, 16), 32)]
E_S, E_T = [golden_values((8, 12), 31)], [golden_values((8, 12), 32)]
Z_S, Z_T = [4 * golden_values((8, 10), 1)], [6 * golden_values((8, 10), 2)]


def on_one(loss, **settings):
    return lambda s, t: loss(s[0], t[0], **settings)


GOLDEN = {
    "AT p=2": (S, T_A, lambda s, t: at_loss(s, t, 2), 0.0582507048,
               [0.001827935, 0.008280318, 0.008840767]),
    "AT p=4": (S, T_A, lambda s, t: at_loss(s, t, 4), 0.104598923,
               [0.003691267, 0.01979796, 0.02098067]),
    "NST": (S, T_A, nst_loss, 0.838599626, [0.04121036, 0.05905037, 0.04670128]),
    "SP": (S[2:], T_A[2:], sp_loss, 0.00489838886, [0.004535969]),
    "PKT": (PS, PT, on_one(pkt_loss), 0.00601470717, [0.004883025]),
    "RKD": (PS, PT, on_one(rkd_loss), 1.8152799, [1.336878]),
    "RKD distance": (PS, PT, on_one(rkd_loss, distance_weight=1, angle_weight=0), 0.0218422812,
                     [0.01909588]),
    "RKD angle": (PS, PT, on_one(rkd_loss, distance_weight=0, angle_weight=1), 0.0253844573,
                  [0.01795869]),
    "RKD squared": (PS, PT, on_one(rkd_loss, distance_weight=1, angle_weight=0, squared=True),
                    0.0746712897, [0.06581478]),
    "LOGITS": (Z_S, Z_T, on_one(logits_loss), 25.6531346, [1.132544]),
    "CC neighbour": (E_S, E_T, on_one(cc_loss), 12.0083347, [2.525728]),
    "CC kernel": (PS, PT, on_one(cc_loss, form="kernel"), 0.0162727572, [0.01137141]),
    "KDSVD": (S, T_B, lambda s, t: kdsvd_loss(s, t, 1), 0.00296506991,
              [0.0002825482, 0.0005829444, 0.002315826]),
    "KDSVD canonical": (S, T_B, lambda s, t: kdsvd_loss(s, t, 1, "canonical"), 0.00296506991,
                        [0.0002825482, 0.0005829444, 0.002315826]),
}  # fmt: skip


def leaves(features):
    return [feature.clone().requires_grad_() for feature in features]


def value_and_gradients(loss, students, teachers):
    students = leaves(students)
    value = loss(students, teachers)
    return value, torch.autograd.grad(value, students)


@pytest.mark.parametrize("name", GOLDEN)
def test_value_and_gradients_equal_the_originals(name):
    students, teachers, loss, want, norms = GOLDEN[name]
    value, gradients = value_and_gradients(loss, students, teachers)
    tolerance = 3e-6 if "KDSVD" in name else 1e-6  # float32 signs and values of the teacher
    assert value.shape == ()
    assert value.item() == pytest.approx(want, rel=tolerance)
    assert [g.norm().item() for g in gradients] == pytest.approx(norms, rel=tolerance)


STAGES_S = [(4, 12, 12), (24, 8, 8), (40, 4, 4)]
STAGES_T = [(6, 8, 8), (24, 8, 8), (48, 4, 4)]
SAME_WIDTH = [(6, 12, 12), (7, 8, 8), (5, 4, 4)]


def features(shapes, seed, batch=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes]


TEXTBOOK = {
    "AT": (lambda s, t: at_loss(s, t, 2), textbook.at, STAGES_S, STAGES_T),
    "AT p=3": (lambda s, t: at_loss(s, t, 3), lambda s, t: textbook.at(s, t, 3),
               STAGES_S, STAGES_T),
    "NST": (nst_loss, textbook.nst, STAGES_S, STAGES_T),
    "SP": (sp_loss, on_one(textbook.sp), STAGES_S[2:], STAGES_T[2:]),
    "PKT": (on_one(pkt_loss), on_one(textbook.pkt), [(9,)], [(14,)]),
    "RKD": (on_one(rkd_loss), on_one(textbook.rkd), [(9,)], [(14,)]),
    "RKD squared": (on_one(rkd_loss, squared=True), on_one(textbook.rkd, squared=True),
                    [(9,)], [(14,)]),
    "KDSVD k=1": (lambda s, t: kdsvd_loss(s, t, 1, "canonical"),
                  lambda s, t: textbook.kdsvd(s, t, 1, canonical=True), STAGES_S, SAME_WIDTH),
    "KDSVD k=3": (lambda s, t: kdsvd_loss(s, t, 3, "canonical"),
                  lambda s, t: textbook.kdsvd(s, t, 3, canonical=True), STAGES_S, SAME_WIDTH),
    "LOGITS": (on_one(logits_loss), on_one(textbook.logits), [(10,)], [(10,)]),
    "CC neighbour": (on_one(cc_loss), on_one(textbook.cc_neighbour), [(9,)], [(9,)]),
    "CC kernel": (on_one(cc_loss, form="kernel", gamma=0.7, order=4),
                  on_one(textbook.cc_kernel, gamma=0.7, order=4), [(9,)], [(14,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_value_and_gradients_equal_the_textbook_on_random_input(name):
    loss, reference, s_shapes, t_shapes = TEXTBOOK[name]
    students, teachers = features(s_shapes, 1), features(t_shapes, 2)
    value, gradients = value_and_gradients(loss, students, teachers)
    want, wanted = value_and_gradients(reference, students, teachers)
    assert value.item() == pytest.approx(want.item(), rel=1e-8)
    for got, gradient in zip(gradients, wanted, strict=True):
        # a gap of squared singular values of 1e-3 of the largest is damped by 1e-6
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max())


@pytest.mark.parametrize("name", TEXTBOOK)
def test_equal_features_have_no_loss_and_no_gradient(name):
    loss, _, shapes, _ = TEXTBOOK[name]
    same = features(shapes, 3)
    value, gradients = value_and_gradients(loss, same, same)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert max(g.abs().max().item() for g in gradients) < 1e-8  # PKT's eps leaves 3e-9


def test_lapack_signs_are_those_of_the_full_decomposition():
    students, teachers = ([f.float() for f in features(STAGES_S, seed)] for seed in (4, 5))
    got = kdsvd_loss(students, teachers, 2)
    assert got.item() == pytest.approx(textbook.kdsvd(students, teachers, 2).item(), rel=1e-4)
    assert got.item() != pytest.approx(kdsvd_loss(students, teachers, 2, "canonical").item())


@pytest.mark.parametrize(
    ("loss", "reference", "tolerance"),
    [(pkt_loss, textbook.pkt, 0.2), (rkd_loss, textbook.rkd, 1e-3)],
)
def test_float32_keeps_digits_for_features_with_a_large_common_mean(loss, reference, tolerance):
    student, teacher = (5 + 0.01 * features([(64,)], seed, 32)[0] for seed in (6, 7))
    student, teacher = student.float(), teacher.float()  # compare on the same, rounded input
    exact = [student.double()], [teacher.double()]
    want, wanted = value_and_gradients(on_one(reference), *exact)
    if loss is pkt_loss:  # the textbook's form, in float32, has no right digit here
        assert reference(student, teacher).item() != pytest.approx(want.item(), rel=0.5)
    value, gradients = value_and_gradients(on_one(loss), [student], [teacher])
    assert value.item() == pytest.approx(want.item(), rel=2 * tolerance)
    assert (gradients[0] - wanted[0]).norm() < tolerance * wanted[0].norm()


def test_rkd_in_parts_equals_rkd_at_once(monkeypatch):
    student, teacher = features([(9,)], 8, 13), features([(14,)], 9, 13)
    whole = value_and_gradients(on_one(rkd_loss), student, teacher)
    module = __import__(RKD_CLASS.__module__, fromlist=["ANGLES_AT_ONCE"])
    monkeypatch.setattr(module, "ANGLES_AT_ONCE", 2 * 13 * 13)
    parts = value_and_gradients(on_one(rkd_loss), student, teacher)
    torch.testing.assert_close(parts, whole)


def outputs(s_widths, t_widths):
    logits = torch.zeros(2, 10)
    return [
        Output(logits, {"feats": [torch.rand(2, 3, w, w) for w in (64, *widths)]})
        for widths in (s_widths, t_widths)
    ]


@pytest.mark.parametrize(
    ("k", "s_widths", "t_widths", "message"),
    [
        (1, (8, 4), (8, 8), r"equal widths at every stage, but have \[8, 4\] and \[8, 8\]"),
        (1, (8,), (8,), "only one"),
        (5, (8, 4), (8, 4), "narrowest map has only 4 columns"),
    ],
)
def test_kdsvd_says_in_one_line_what_it_cannot_compare(k, s_widths, t_widths, message):
    cfg = default_config()
    cfg.merge_from_list(["KDSVD.K", k])
    distiller = distiller_dict["KDSVD"](None, None, cfg)
    with pytest.raises(UserError, match=message):
        distiller.distill(*outputs(s_widths, t_widths), None)


@pytest.mark.parametrize(("key", "value"), [("KDSVD.SIGNS", "mine"), ("CC.FORM", "mine")])
def test_an_unknown_choice_is_refused_at_construction(key, value):
    cfg = default_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{key} 'mine' is n"):
        distiller_dict[key.split(".")[0]](None, None, cfg)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_squared_errors_hand_back_gradients_in_the_layout_of_the_map(layout, reduction):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    student = a.contiguous(memory_format=layout).requires_grad_()
    loss = mean_square_error(student, b, reduction)
    (gradient,) = torch.autograd.grad(loss, student)
    count = a.numel() if reduction == "mean" else 1
    torch.testing.assert_close(loss, ((a - b) ** 2).sum() / count)
    torch.testing.assert_close(gradient, 2 * (a - b) / count)
    assert gradient.is_contiguous(memory_format=layout)
