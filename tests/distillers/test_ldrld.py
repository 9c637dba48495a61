"""LDRLD: its relations against pairs one by one."""

import pytest
import textbook_relations as textbook
import torch
from support import golden_values
from test_distillers import batch, networks

from mdistiller.distillers import get_distiller
from mdistiller.distillers.LDRLD import ldrld_terms
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError

STUDENT = golden_values((8, 30), 1).argsort(1).double() / 4 - 3  # no ties, in bfloat16 neither
TEACHER = 6 * golden_values((8, 30), 2)


def weighted(student, teacher, topk=5, temperature=4.0):
    local, rest = ldrld_terms(student, teacher, topk, temperature)
    return 10.5 * local + 7 * rest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("topk", "temperature"), [(5, 4.0), (2, 1.0), (12, 4.0)])
def test_the_formula(topk, temperature, dtype):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    want_at = student.double().clone().requires_grad_()
    want = textbook.ldrld(want_at, teacher.double(), topk, temperature, 10.5, 7)
    got_at = student.clone().requires_grad_()
    got = weighted(got_at, teacher, topk, temperature)
    for loss in (got, want):
        loss.backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)
    largest = want_at.grad.abs().max().item()
    torch.testing.assert_close(got_at.grad.double(), want_at.grad, rtol=0, atol=tolerance * largest)


def test_without_other_classes_there_is_no_third_term():
    for topk in (30, 99):
        local, rest = ldrld_terms(STUDENT, TEACHER, topk, 4.0)
        assert rest == 0
        assert local > 0


def test_r_scales_all_terms_and_settings_reach_them():
    cfg, items = default_config(), batch()
    words = {"R": 2.0, "ALPHA": 3.0, "BETA": 0.5, "T": 2.0, "TOPK": 3}
    cfg.merge_from_list([x for key, value in words.items() for x in (f"LDRLD.{key}", value)])
    distiller = get_distiller("LDRLD").build(*networks(), cfg, 50).train()
    logits, losses = distiller(**items)
    teacher = distiller.teacher(items["image"])[0]
    want = textbook.ldrld(logits.double(), teacher.double(), 3, 2.0, 6.0, 1.0)
    assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, items["target"])
    assert losses["loss_ce"].item() == pytest.approx(2 * plain.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["LDRLD.TOPK", 1], "LDRLD.TOPK must be at least 2, got 1"),
        (["LDRLD.T", 0], "LDRLD.T must be positive, got 0"),
    ],
)
def test_a_setting_without_meaning_is_refused(words, message):
    cfg = default_config()
    cfg.merge_from_list(words)
    with pytest.raises(UserError, match=message):
        get_distiller("LDRLD").build(*networks(), cfg, 50)
