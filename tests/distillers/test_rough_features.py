"""Feature losses on input that divides by zero, or takes the root of it, elsewhere."""

import pytest
import torch

from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CATKD import catkd_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.DKD import dkd_rows
from mdistiller.distillers.helpers.numerics import full_precision, unit
from mdistiller.distillers.KD import kd_rows
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SDD import complementary, region_nkd, sdd_loss
from mdistiller.distillers.SemCKD import Attention, layer_errors, semckd_loss
from mdistiller.distillers.SimKD import simkd_loss
from mdistiller.distillers.SP import sp_loss

MAPS = [(4, 8, 8), (48, 4, 4)]  # NST takes another form for each
LOSSES = {
    "AT": (lambda s, t: at_loss(s, t, 2), MAPS),
    "AT p=4": (lambda s, t: at_loss(s, t, 4), MAPS),
    "NST": (nst_loss, MAPS),
    "SP": (sp_loss, MAPS[1:]),
    "KDSVD": (lambda s, t: kdsvd_loss(s, t, 1), MAPS),
    "KDSVD k=3": (lambda s, t: kdsvd_loss(s, t, 3), MAPS),
    "KDSVD canonical": (lambda s, t: kdsvd_loss(s, t, 2, "canonical"), MAPS),
    "PKT": (lambda s, t: pkt_loss(s[0], t[0]), [(12,)]),
    "RKD": (lambda s, t: rkd_loss(s[0], t[0]), [(12,)]),
    "RKD squared": (lambda s, t: rkd_loss(s[0], t[0], squared=True), [(12,)]),
    "CC neighbour": (lambda s, t: cc_loss(s[0], t[0]), [(12,)]),
    "CC kernel": (lambda s, t: cc_loss(s[0], t[0], form="kernel"), [(12,)]),
    "LOGITS": (lambda s, t: logits_loss(s[0], t[0]), [(10,)]),
    "SDD KD": (lambda s, t: sdd(s[0], t[0], lambda *z: kd_rows(*z[:2], 4.0)), [(10, 5)]),
    "SDD DKD": (lambda s, t: sdd(s[0], t[0], lambda *z: sum(dkd_rows(*z, 4.0))), [(10, 5)]),
    "SDD NKD": (lambda s, t: sdd(s[0], t[0], lambda *z: region_nkd(*z, 4.0, 8.0)), [(10, 5)]),
    "SDD NKD fixed": (
        lambda s, t: sdd(s[0], t[0], lambda *z: region_nkd(*z, 1.0, 1.5, "fixed")),
        [(10, 5)],
    ),
    "CATKD": (lambda s, t: catkd_loss(s[0], t[0]), MAPS[:1]),
    "CATKD binary, raw": (
        lambda s, t: catkd_loss(s[0], t[0], 4, normalize=False, binary=True, top=2),
        MAPS[:1],
    ),
    "SIMKD": (lambda s, t: simkd_loss(s[0], t[0]), MAPS[:1]),
    "SEMCKD": (lambda s, t: semckd(s[:1], t), MAPS[:1]),
}


def sdd(student, teacher, rows):
    student, teacher = student.float(), teacher.float()  # as the classifier in full precision does
    target = torch.arange(len(student)) % 10
    weights = 1.0 + complementary(teacher, target)
    return sdd_loss(student, teacher, target, rows, weights)


def semckd(student, teacher):
    torch.manual_seed(0)
    student, teacher = full_precision(student), full_precision(teacher)
    attention = Attention(8, 1, 2, 1.0)(student, [teacher[0], teacher[0].relu()])
    return semckd_loss(layer_errors([*student, *student], [*teacher, *teacher])[:, None], attention)


def rough(kind, shape, batch, seed):
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    if kind == "one zero row":
        noise[0] = 0
    if kind == "zero channel":
        noise[:, 0] = 0
    if kind == "equal singular values":
        side = shape[-1]
        return torch.eye(side).expand(batch, *shape[:-2], side, side).contiguous()
    return {
        "zeros": torch.zeros_like(noise),
        "constant": torch.full_like(noise, 3.0),
        "duplicate rows": noise[: (batch + 1) // 2].repeat(2, *[1] * len(shape))[:batch],
        "equal rows": noise[:1].expand_as(noise).contiguous(),
        "1e4-fold": 1e4 * noise,
    }.get(kind, noise)


KINDS = [
    "random", "zeros", "constant", "duplicate rows", "equal rows", "one zero row", "zero channel",
    "1e4-fold", "equal singular values",
]  # fmt: skip
CASES = [
    (name, kind)
    for name, (_, shapes) in LOSSES.items()
    for kind in KINDS
    if kind != "equal singular values" or len(shapes[0]) == 3  # of maps only
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_losses_and_gradients_are_finite(name, kind, dtype):
    loss, shapes = LOSSES[name]
    for batch in (8, 2, 1):
        for teacher_kind in ("random", kind):
            students = [rough(kind, s, batch, 1).to(dtype).requires_grad_() for s in shapes]
            teachers = [rough(teacher_kind, s, batch, 2).to(dtype) for s in shapes]
            value = loss(students, teachers)
            value.backward()
            assert value.dtype == torch.float32
            assert torch.isfinite(value)
            for student in students:
                assert torch.isfinite(student.grad).all()
                # 1e-12 in a denominator shows as 1e10 and more here
                bound = 1e5 if kind == "1e4-fold" else 1e3
                assert student.grad.abs().max() < bound, (batch, teacher_kind)


def test_unit_vectors_have_length_one_or_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    rows = unit(x)
    rows.sum().backward()
    assert rows.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert x.grad[1].tolist() == [0, 0]
