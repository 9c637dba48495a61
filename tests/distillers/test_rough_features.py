"""Feature losses on input that divides by zero, or takes the root of it, elsewhere."""

import pytest
import torch

from mdistiller.distillers._common import unit
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.RKD import rkd_loss
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
}


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
