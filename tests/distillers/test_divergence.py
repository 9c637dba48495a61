"""KD.DIVERGENCE and its like: KL, reverse KL and ABKD's family with its limits."""

import pytest
import textbook_relations as textbook
import torch
from support import golden_values
from test_distillers import batch, networks

from mdistiller.distillers import get_distiller
from mdistiller.distillers.DKD import dkd_terms
from mdistiller.distillers.helpers.losses.divergence import ab_divergence, read_divergence
from mdistiller.distillers.helpers.losses.numerics import divergence
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.TTM import ttm_loss
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
PAIRS = [(0.8, 0.3), (1, 0), (0, 1), (0, 0), (0.5, -0.5), (0, 0.7), (0.6, 0), (1.4, -0.2), (2, 3)]


def with_gradient(loss, logits=STUDENT):
    student = logits.clone().requires_grad_()
    value = loss(student)
    (slope,) = torch.autograd.grad(value, student)
    return value.double(), slope.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_formula_and_its_limits(pair, dtype):
    alpha, beta = pair
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    form = read_divergence("KEY", f"ab({alpha}, {beta})")
    got = with_gradient(lambda z: kd_loss(z, teacher, 4.0, form), student)
    want = with_gradient(
        lambda z: textbook.ab_kd(z, teacher.double(), 4.0, alpha, beta), student.double()
    )
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(got, want, strict=True):  # a bfloat16 gradient is rounded
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_ends_of_the_family_are_kl_and_reverse_kl_and_the_default_is_kl_to_the_bit():
    for text, same in [("ab(1, 0)", "kl"), ("ab(0, 1)", "reverse_kl")]:
        forms = [read_divergence("KEY", name) for name in (text, same)]
        one, other = (with_gradient(lambda z, f=f: kd_loss(z, TEACHER, 4.0, f)) for f in forms)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    p, q = (z.softmax(1) for z in (TEACHER, STUDENT))
    reverse = read_divergence("KEY", "reverse_kl")(p.log(), q.log())
    torch.testing.assert_close(reverse, (q * (q / p).log()).sum(1))
    assert read_divergence("KEY", "kl") is divergence
    assert [default_config()[name].DIVERGENCE for name in ("KD", "DKD", "TTM", "WTTM")] == 4 * [
        "kl"
    ]


@pytest.mark.parametrize("pair", [(1e-2, 1.0), (1.0, 1e-2), (0.5, -0.49)])
def test_the_formula_approaches_its_limits(pair):
    logs = (z.log_softmax(1) for z in (TEACHER / 4, STUDENT / 4))
    log_p, log_q = logs
    near = [0.0 if abs(x) == 1e-2 else -0.5 if x == -0.49 else x for x in pair]
    got, limit = ab_divergence(log_p, log_q, *pair), ab_divergence(log_p, log_q, *near)
    torch.testing.assert_close(got, limit, rtol=0.1, atol=1e-3)
    assert not torch.equal(got, limit)


@pytest.mark.parametrize("name", ["KD", "DKD", "TTM", "WTTM"])
def test_the_config_key_reaches_the_loss(name):
    items, form = batch(), read_divergence("KEY", "ab(0.8, 0.3)")

    def loss(text, *more):
        cfg = default_config()
        cfg.merge_from_list([f"{name}.DIVERGENCE", text, *more])
        distiller = get_distiller(name).build(*networks(), cfg, 50).train()
        return distiller(**items)[1]["loss_kd"].item()

    s, t = (net(items["image"])[0] for net in (networks()[0], networks()[1].eval()))
    tckd, nckd = dkd_terms(s, t, items["target"], 4.0, form)
    want = {
        "KD": 0.9 * kd_loss(s, t, 4.0, form),
        "DKD": (tckd + 8 * nckd) / 10,  # epoch 2 of 20
        "TTM": 8 * ttm_loss(s, t, 0.2, form=form),
        "WTTM": 3 * ttm_loss(s, t, 0.1, True, form=form),
    }[name]
    got = loss("ab(0.8, 0.3)")
    assert got == pytest.approx(want.item(), rel=1e-5)
    assert got != pytest.approx(loss("kl"), rel=1e-3)
    assert loss("ab(0.8, 0.3)", "LSKD.ENABLE", True) != pytest.approx(got, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("js", r"KD.DIVERGENCE must be kl, reverse_kl or ab\(ALPHA, BETA\), got 'js'"),
        ("ab(1)", "KD.DIVERGENCE must be kl"),
        ("ab(1, x)", "KD.DIVERGENCE must be kl"),
        ("ab(0.001, 1)", "ALPHA is 0.001, too close to 0"),
        ("ab(0.5, -0.499)", r"ALPHA \+ BETA is 0.001, too close to 0"),
    ],
)
def test_a_divergence_without_meaning_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        read_divergence("KD.DIVERGENCE", text)
