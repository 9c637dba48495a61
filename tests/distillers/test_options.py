"""Settings of classical methods reach the loss: config in, the pure function's number out."""

import pytest
import torch
from test_distillers import batch

from mdistiller.distillers import get_distiller
from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.distillers.FT import ft_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.engine.cfg import default_config
from mdistiller.engine.stages import running
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError


def build(method, **settings):
    """On two WRNs, whose maps are signed; keys are those of the method, "__" for a dot."""
    torch.manual_seed(0)
    nets = [get_model_entry("wrn_16_1", "cifar")(num_classes=10) for _ in range(2)]
    cfg = default_config()
    for key, value in settings.items():
        cfg.merge_from_list([f"{method}.{key.replace('__', '.')}", value])
    return get_distiller(method).build(*nets, cfg, num_data=50, image_size=(32, 32)).train()


def ab(d, s, t, margin=1.0, form="sum"):
    return ab_loss(s["preact_feats"][1:], t["preact_feats"][1:], margin, form)


def at(d, s, t, p=2, form="sum"):
    return at_loss(s["feats"][1:], t["feats"][1:], p, form)


def cc(d, s, t, form="neighbour", gamma=0.4, order=2):
    return cc_loss(d.embed_s(s["pooled_feat"]), d.embed_t(t["pooled_feat"]), form, gamma, order)


def fsp(d, s, t, form="sum"):
    return fsp_loss(s["feats"], t["feats"], form)


def ft(d, s, t, p=1, form="attention"):
    factor = d.paraphraser.encoder(t["feats"][-1])
    return ft_loss(d.translator(s["feats"][-1]), factor, p, form)


def kdsvd(d, s, t, k=1, signs="lapack"):
    return kdsvd_loss(s["feats"][1:], t["feats"][1:], k, signs)


def rkd(d, s, t, squared=False, distance=25, angle=50):
    return rkd_loss(s["pooled_feat"], t["pooled_feat"], squared, 1e-12, distance, angle)


KERNEL = {"form": "kernel"}
CASES = [  # method, its settings, the pure function, its settings
    ("AB", {"FORM": "sum", "MARGIN": 1.0}, ab, {}),
    ("AB", {"FORM": "mean", "MARGIN": 1.0}, ab, {"form": "mean"}),
    ("AB", {"FORM": "mean", "MARGIN": 2.0}, ab, {"form": "mean", "margin": 2.0}),
    ("AB", {"FORM": "sum", "MARGIN": 1.5}, ab, {"margin": 1.5}),
    ("AT", {"FORM": "sum"}, at, {}),
    ("AT", {"FORM": "mean"}, at, {"form": "mean"}),
    ("AT", {"P": 4}, at, {"p": 4}),
    ("AT", {"FORM": "mean", "P": 3}, at, {"form": "mean", "p": 3}),
    ("CC", {"FORM": "neighbour"}, cc, {}),
    ("CC", {"FORM": "kernel"}, cc, KERNEL),
    ("CC", {"FORM": "kernel", "GAMMA": 0.8}, cc, KERNEL | {"gamma": 0.8}),
    ("CC", {"FORM": "kernel", "ORDER": 3}, cc, KERNEL | {"order": 3}),
    ("FSP", {"FORM": "sum"}, fsp, {}),
    ("FSP", {"FORM": "mean"}, fsp, {"form": "mean"}),
    ("FT", {"FORM": "attention"}, ft, {}),
    ("FT", {"FORM": "factor"}, ft, {"form": "factor"}),
    ("FT", {"P": 2}, ft, {"p": 2}),
    ("FT", {"FORM": "factor", "P": 2}, ft, {"form": "factor", "p": 2}),
    ("KDSVD", {"SIGNS": "lapack"}, kdsvd, {}),
    ("KDSVD", {"SIGNS": "canonical"}, kdsvd, {"signs": "canonical"}),
    ("KDSVD", {"K": 2}, kdsvd, {"k": 2}),
    ("RKD", {}, rkd, {}),
    ("RKD", {"DISTANCE_WEIGHT": 70}, rkd, {"distance": 70}),
    ("RKD", {"ANGLE_WEIGHT": 10}, rkd, {"angle": 10}),
    ("RKD", {"PDIST__SQUARED": True}, rkd, {"squared": True}),
]
CASES = [
    pytest.param(*case, id="-".join([case[0], *(f"{key}={v}" for key, v in case[1].items())]))
    for case in CASES
]
TWO_STAGE = [case for case in CASES if case.values[0] in ("AB", "FSP")]


def expected(distiller, pure, settings):
    """The numbers of the pure function with these settings, and what differs: with fewer."""
    image = batch()["image"]
    with torch.no_grad():
        outputs = distiller.run_student(image), distiller.run_teacher(image)
        fewer = [{k: v for k, v in settings.items() if k != left} for left in settings]
        others = [pure(distiller, *outputs, **some).item() for some in fewer]
        return pure(distiller, *outputs, **settings).item(), others


def check(got, weight, want, others):
    assert want != 0
    assert got.item() == pytest.approx(weight * want, rel=1e-5)
    for other in others:  # each setting counts
        assert got.item() != pytest.approx(weight * other, rel=1e-3)


@pytest.mark.parametrize(("method", "keys", "pure", "settings"), CASES)
def test_a_setting_reaches_the_distillation_term(method, keys, pure, settings):
    distiller = build(method, **keys, LOSS__FEAT_WEIGHT=3.0)
    want = expected(distiller, pure, settings)
    _, losses = distiller(**batch())
    check(losses["loss_kd"], 3.0, *want)
    losses["loss_kd"].backward()
    assert distiller.student.conv1.weight.grad.any()


@pytest.mark.parametrize(("method", "keys", "pure", "settings"), TWO_STAGE)
def test_a_setting_reaches_the_initialisation(method, keys, pure, settings):
    distiller = build(method, **keys, INIT__WEIGHT=7.0)
    with running(distiller, "init"):
        distiller.train()
        want = expected(distiller, pure, settings)
        _, losses = distiller(**batch())
        check(losses["loss_init"], 7.0, *want)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("WKD", {"HINT_LAYERS": [9]}, r"WKD\.HINT_LAYERS \[9\]: the networks"),
        ("WKD", {"HINT_LAYER": 9}, r"WKD\.HINT_LAYER 9: the networks"),
        ("WKD", {"PROJECTOR": "mlp"}, r"WKD\.PROJECTOR 'mlp' is not one of"),
        ("WKD", {"LOSS__WKD_FEAT_WEIGHT": 1.0, "COST": "cosine"}, r"WKD\.COST 'cosine' is not"),
        ("CTKD", {"HIDDEN": 0}, r"CTKD\.HIDDEN must be positive"),
        ("CC", {"FORM": "kernel", "FEAT_DIM": 0}, r"CC\.FEAT_DIM must be positive"),
    ],
)
def test_a_setting_of_a_part_that_is_off_is_checked(method, settings, message):
    with pytest.raises(UserError, match=message):
        build(method, **settings)
