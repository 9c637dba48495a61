"""Every loss in float32 on rough input: value and gradient are finite; nothing small divides.

Whole methods are tried under bf16, in test_distillers.py.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from rough import KINDS, hostile_logits, rough_features
from support import golden_values
from torch import nn

from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CATKD import catkd_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.CorrectedKD import mode_loss
from mdistiller.distillers.CRLD import crld_terms
from mdistiller.distillers.CTKD import InstanceTemperature, instance_kd_loss
from mdistiller.distillers.DGKD import dgkd_loss
from mdistiller.distillers.DIST import dist_loss
from mdistiller.distillers.DKD import dkd_loss, dkd_rows, dkd_terms
from mdistiller.distillers.DML import dml_losses
from mdistiller.distillers.FitNet import fitnet_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.distillers.FT import ft_loss
from mdistiller.distillers.GDKD import gdkd_loss
from mdistiller.distillers.GDKD3 import gdkd3_loss
from mdistiller.distillers.helpers.losses import sinkhorn
from mdistiller.distillers.helpers.losses.divergence import read_divergence
from mdistiller.distillers.helpers.losses.moments import wkd_feature_loss
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.losses.standardize import standardize
from mdistiller.distillers.helpers.training.teacher_facts import class_similarity
from mdistiller.distillers.KD import kd_loss, kd_rows
from mdistiller.distillers.KDCL import kdcl_losses
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LDRLD import ldrld_terms
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.MLKD import mlkd_terms
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.NormKD import normkd_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFA import ofa_loss
from mdistiller.distillers.OFD import ofd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.PSKD import pskd_loss
from mdistiller.distillers.ReviewKD import ABF, hcl_loss, review
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.RLD import rld_loss
from mdistiller.distillers.SDD import complementary, region_nkd, sdd_loss
from mdistiller.distillers.SemCKD import Attention, layer_errors, semckd_loss
from mdistiller.distillers.SimKD import simkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.TFKD import tfkd_loss
from mdistiller.distillers.TTM import ttm_loss
from mdistiller.distillers.USKD import uskd_terms
from mdistiller.distillers.VID import vid_loss
from mdistiller.distillers.WKD import class_costs, wkd_logit_terms
from mdistiller.engine.cfg import default_config


def labelled(loss, *settings):
    """A loss of logits and targets, as one of logits alone."""
    return lambda s, t: loss(s, t, torch.full((len(s),), 3), *settings)


def learned(loss):
    """A loss at a trained temperature, whose gradient has to be finite as well."""

    def at(student, teacher):
        raw = torch.ones(len(student), 1, requires_grad=True)
        value = loss(student, teacher, 1 + 20 * raw.sigmoid())
        (slope,) = torch.autograd.grad(value, raw, retain_graph=True)
        return value if torch.isfinite(slope).all() else value * math.nan

    return at


def by_network(student, teacher):
    """CTKD's temperature from a network on the logits."""
    torch.manual_seed(0)
    net = InstanceTemperature(20, 8, 1.0)
    student, teacher = full_precision(student), full_precision(teacher)
    nn.init.normal_(net.out.weight)
    value = instance_kd_loss(student, teacher, 1 + 20 * net(student, teacher).sigmoid())
    slopes = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
    return value if all(torch.isfinite(x).all() for x in slopes) else value * math.nan


def corrected(mode):
    node = default_config().CORRECTEDKD
    node.MODE = mode
    loss = mode_loss(node)
    return lambda s, t: loss(s, t, torch.full((len(s), 1), 3)).mean()


def crld(student, teacher):
    view = student, teacher
    return sum(crld_terms(view, view, 4.0, (0.9, 0.2)).values())


def wkd(direct, temperature):
    """WKD's terms, transport in one form of two; on logarithms a few rows at a time."""
    cost = class_costs(class_similarity(golden_values((10, 12, 6), 3)), 1.0).float()

    def loss(student, teacher):
        with mock.patch.multiple(sinkhorn, DIRECT=math.inf if direct else 0.0, CHUNK=3000):
            target = torch.full((len(student),), 3)
            own, moved = wkd_logit_terms(student, teacher, target, cost, temperature)
            return own + 30 * moved

    return loss


GROUPS = (0.5, 2.0, 8.0)
BY_SAMPLE = {  # means over samples
    **{f"KD T={t}": lambda s, t_, t=t: kd_loss(s, t_, t) for t in (1.0, 4.0)},
    **{f"DKD T={t}": labelled(dkd_loss, 1.0, 8.0, t) for t in (1.0, 4.0)},
    "NKD": labelled(nkd_loss, 1.0, 1.5),
    "NKD T=3": labelled(nkd_loss, 3.0, 3.5),
    "USKD": lambda s, t: sum(uskd_terms(s, t, torch.full((len(s),), 3))),
    "USKD prob": lambda s, t: sum(uskd_terms(s, t, torch.full((len(s),), 3), "prob")),
    "TFKD": lambda s, t: tfkd_loss(s, torch.full((len(s),), 3), 0.99, 20.0),
    "DML": lambda s, t: sum(dml_losses([s, t], 1.0)),
    **{
        f"KDCL {kind}": lambda s, t, kind=kind: sum(
            kdcl_losses([s, t], torch.full((len(s),), 3), 2.0, kind)
        )
        for kind in ("naive", "minlogit", "mean", "linear")
    },
    "KDCL general": lambda s, t: sum(
        kdcl_losses([s, t], torch.full((len(s),), 3), 2.0, "general", torch.tensor([1e4, 1 - 1e4]))
    ),
    "PSKD": lambda s, t: pskd_loss(
        s, t.float().clamp(-1e30, 1e30).softmax(dim=1), torch.full((len(s),), 3)
    ),
    "TTM": lambda s, t: ttm_loss(s, t, 0.1),
    "WTTM": lambda s, t: ttm_loss(s, t, 0.1, weighted=True),
    "DGKD": labelled(dgkd_loss, 1.0, 8.0, 6.0, 4.0, "log"),
    "DGKD plain": labelled(dgkd_loss, 1.0, 8.0, 6.0, 4.0, "plain"),
    "CTKD": learned(lambda s, t, at: kd_loss(s, t, at.mean())),
    "CTKD dkd": learned(lambda s, t, at: labelled(dkd_loss, 1.0, 2.0, at)(s, t)),
    "CTKD instance": learned(instance_kd_loss),
    "CTKD network": by_network,
    "LSKD": lambda s, t: kd_loss(standardize(s), standardize(t), 2.0),
    "LSKD without EPS": lambda s, t: kd_loss(standardize(s, eps=0), standardize(t, eps=0), 2.0),
    "RLD": labelled(rld_loss, 1.5, 8.0, 2.0, 4.0),
    **{
        f"GDKD {kind}": lambda s, t, kind=kind: gdkd_loss(s, t, GROUPS, 3, 4.0, kind)
        for kind in ("forward", "reverse", "both")
    },
    "GDKD3": lambda s, t: gdkd3_loss(s, t, GROUPS, 4, 4.0),
    "GDKD3 both": lambda s, t: gdkd3_loss(s, t, GROUPS, 4, 4.0, "both"),
    "NORMKD": lambda s, t: normkd_loss(s, t, 2.0),
    **{mode: corrected(mode) for mode in ("swap", "soft_swap", "rc", "revision")},
    "CRLD": crld,
    **{f"LDRLD {k}": lambda s, t, k=k: sum(ldrld_terms(s, t, k, 4.0)) for k in (2, 5, 10)},
    **{
        f"OFA {form} {eps}": lambda s, t, form=form, eps=eps: labelled(ofa_loss, eps, 1.0, form)(
            s, t
        )
        for form in ("code", "paper")
        for eps in (1.0, 1.5)
    },
    **{
        f"WKD {direct} {t}": wkd(direct, t)
        for direct in (True, False)
        for t in (1.0, 8.0)
    },
}  # fmt: skip
PAIRS = [(0.8, 0.3), (1, 0), (0, 1), (0, 0), (0.5, -0.5), (0, 0.7), (0.6, 0), (1.4, -0.2), (2, 3)]
for text in ("reverse_kl", *(f"ab({a}, {b})" for a, b in PAIRS)):
    form = read_divergence("KEY", text)
    BY_SAMPLE |= {
        f"KD {text}": lambda s, t, form=form: kd_loss(s, t, 4.0, form),
        f"DKD {text}": lambda s, t, form=form: sum(labelled(dkd_terms, 4.0, form)(s, t)),
        f"TTM {text}": lambda s, t, form=form: ttm_loss(s, t, 0.2, form=form),
    }


def mlkd(mask):
    def loss(student, teacher):
        parts = [(student[:rows], teacher[:rows]) for rows in (5, 2, 1)]
        return sum(sum(mlkd_terms(part, part, [4.0, 2.0], mask).values()) for part in parts)

    return loss


BY_BATCH = {  # losses that compare samples
    "DIST tau=1": dist_loss,
    "DIST tau=4": lambda s, t: dist_loss(s, t, tau=4.0),
    "LSKD DIST": lambda s, t: dist_loss(standardize(s), standardize(t)),
    "MLKD as_coded": mlkd("as_coded"),
    "MLKD per_item": mlkd("per_item"),
}


def logits():
    noise = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    return {**hostile_logits(), "random": noise, "1e4-fold": 1e4 * noise, "7.7": 7.7 + 0 * noise}


NAMES = list(itertools.product(logits(), repeat=2))  # of student and teacher
STUDENTS, TEACHERS = (torch.cat([logits()[pair[i]] for pair in NAMES]) for i in (0, 1))
STEEP = ("reverse", "both", "NORMKD", "revision", "ab(0, ")  # their gradients grow with the logits


def test_losses_of_single_samples():
    """All pairs of kinds in one batch: a row that fails is one of its gradient."""
    wrong = []
    for name, loss in BY_SAMPLE.items():
        student = STUDENTS.clone().requires_grad_()
        value = loss(student, TEACHERS)
        value.backward()
        slopes = student.grad.abs().amax(dim=1).view(len(NAMES), 5).amax(dim=1) * len(NAMES)
        bad = [NAMES[i] for i, slope in enumerate(slopes.tolist()) if not math.isfinite(slope)]
        steep = any(word in name for word in STEEP)
        if not steep and slopes.max() > 3e3:  # 1e-7 or so in a denominator
            bad.append(NAMES[int(slopes.argmax())])
        if bad or not torch.isfinite(value):
            wrong.append((name, value.item(), slopes.max().item(), bad[:3]))
    assert wrong == []


def test_losses_that_compare_samples():
    wrong = []
    for name, loss in BY_BATCH.items():
        for i, kinds in enumerate(NAMES):
            student = STUDENTS[5 * i : 5 * i + 5].clone().requires_grad_()
            value = loss(student, TEACHERS[5 * i : 5 * i + 5])
            value.backward()
            if not (torch.isfinite(value) and student.grad.abs().max() < 3e3):
                wrong.append((name, *kinds, value.item(), student.grad.abs().max().item()))
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_on_half_precision_are_those_in_float32(dtype):
    student, teacher = (4 * golden_values((5, 10), seed).to(dtype) for seed in (1, 2))
    wrong = []
    for name, loss in {**BY_SAMPLE, **BY_BATCH}.items():
        with torch.no_grad() if "CTKD" not in name else torch.enable_grad():
            first = student.clone().requires_grad_()
            got = loss(first, teacher)
            want = loss(student.float().requires_grad_(), teacher.float())
        if got.dtype != torch.float32 or got.item() != pytest.approx(want.item(), rel=1e-6):
            wrong.append((name, got, want))
    assert wrong == []


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


def review_chain(student, teacher):
    torch.manual_seed(0)
    outputs = review([ABF(4, 4, 4, fuse=False)], full_precision(student), [teacher[0].shape[2:]])
    return hcl_loss(outputs, teacher)


def vid(scale):
    return lambda s, t: vid_loss(nn.Identity(), s[0], t[0], torch.full((4,), scale), 1e-5)


def on_one(loss, *settings, **more):
    return lambda s, t: loss(s[0], t[0], *settings, **more)


MAPS = [(4, 8, 8), (48, 4, 4)]  # NST takes another form for each
MAP, ROWS, REGIONS = MAPS[:1], [(12,)], [(10, 5)]
STAGES = [(4, 8, 8), (6, 8, 8), (8, 4, 4)]
FEATURES = {
    "AT": (lambda s, t: at_loss(s, t, 2), MAPS),
    "AT p=4": (lambda s, t: at_loss(s, t, 4), MAPS),
    "AT mean": (lambda s, t: at_loss(s, t, 2, "mean"), STAGES),
    "AT mean p=4": (lambda s, t: at_loss(s, t, 4, "mean"), STAGES),
    "NST": (nst_loss, MAPS),
    "SP": (sp_loss, MAPS[1:]),
    "KDSVD": (lambda s, t: kdsvd_loss(s, t, 1), MAPS),
    "KDSVD k=3": (lambda s, t: kdsvd_loss(s, t, 3), MAPS),
    "KDSVD canonical": (lambda s, t: kdsvd_loss(s, t, 2, "canonical"), MAPS),
    "PKT": (on_one(pkt_loss), ROWS),
    "RKD": (on_one(rkd_loss), ROWS),
    "RKD squared": (on_one(rkd_loss, squared=True), ROWS),
    "CC neighbour": (on_one(cc_loss), ROWS),
    "CC kernel": (on_one(cc_loss, form="kernel"), ROWS),
    "LOGITS": (on_one(logits_loss), [(10,)]),
    "SDD KD": (on_one(sdd, lambda *z: kd_rows(*z[:2], 4.0)), REGIONS),
    "SDD DKD": (on_one(sdd, lambda *z: sum(dkd_rows(*z, 4.0))), REGIONS),
    "SDD NKD": (on_one(sdd, lambda *z: region_nkd(*z, 4.0, 8.0)), REGIONS),
    "SDD NKD fixed": (on_one(sdd, lambda *z: region_nkd(*z, 1.0, 1.5, "fixed")), REGIONS),
    "CATKD": (on_one(catkd_loss), MAP),
    "CATKD binary, raw": (on_one(catkd_loss, 4, normalize=False, binary=True, top=2), MAP),
    "SIMKD": (on_one(simkd_loss), MAP),
    "SEMCKD": (semckd, MAP),
    "FITNET": (on_one(fitnet_loss), MAP),
    **{f"VID {scale}": (vid(scale), MAP) for scale in (5.0, 200.0)},
    "OFD": (on_one(ofd_loss, torch.full((4,), -0.2)), MAP),
    "HCL": (hcl_loss, MAPS),
    "REVIEWKD": (review_chain, MAP),
    "AB": (ab_loss, STAGES),
    "AB mean": (lambda s, t: ab_loss(s, t, 2, "mean"), STAGES),
    "FSP": (fsp_loss, STAGES),
    "FT": (on_one(ft_loss), MAP),
    "FT squared": (on_one(ft_loss, 2), MAP),
    "FT factor": (on_one(ft_loss, 1, "factor"), MAP),
    "WKD-F": (lambda s, t: wkd_feature_loss(s[0].float(), t[0].float(), 4, 2.0), MAP),
}
"""By name: the loss of lists of features, and the shapes of one sample's."""


@pytest.mark.parametrize("name", FEATURES)
def test_losses_of_features(name):
    loss, shapes = FEATURES[name]
    wrong = []
    for kind in KINDS if len(shapes[0]) == 3 else KINDS[:-1]:
        # 1e-12 in a denominator shows as 1e10 and more; some gradients grow with the maps
        bound = math.inf if kind == "1e4-fold" else 1e3
        for batch, teacher_kind in ((8, "random"), (8, kind), (2, kind), (1, kind)):
            students = [rough_features(kind, s, batch, 1).requires_grad_() for s in shapes]
            teachers = [rough_features(teacher_kind, s, batch, 2) for s in shapes]
            value = loss(students, teachers)
            value.backward()
            slope = max(student.grad.abs().max().item() for student in students)
            if not (torch.isfinite(value) and slope < bound):
                wrong.append((kind, teacher_kind, batch, value.item(), slope))
    assert wrong == []


def test_losses_of_half_precision_features_are_those_in_float32():
    wrong = []
    for name, (loss, shapes) in FEATURES.items():
        parts = [
            [rough_features("random", s, 8, seed).bfloat16() for s in shapes] for seed in (1, 2)
        ]
        got, want = loss(*parts), loss(*([x.float() for x in part] for part in parts))
        if got.dtype != torch.float32 or got.item() != pytest.approx(want.item(), rel=1e-6):
            wrong.append((name, got, want))
    assert wrong == []


def test_a_narrow_variance_of_vid_is_finite():
    """An error of 1 in units of 1e-5 is large, as it should be."""
    (student,), (teacher,) = ([rough_features("random", MAP[0], 4, seed)] for seed in (1, 2))
    student.requires_grad_()
    value = vid(-200.0)([student], [teacher])
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_unit_vectors_have_length_one_or_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    rows = unit(x)
    rows.sum().backward()
    assert rows.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert x.grad[1].tolist() == [0, 0]
