"""Default weights and settings of methods, and shipped configs, against the published numbers.

The numbers are literals on purpose: none is read from the code.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import REPO
from test_distillers import batch, build

from mdistiller.config.values import lookup
from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.CRD import crd_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.FitNet import fitnet_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.distillers.FT import ft_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import ofd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.ReviewKD import hcl_loss, review
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.VID import vid_loss
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.engine.stages import running


def stages(s, t):
    return s["feats"][1:], t["feats"][1:]


def pooled(s, t):
    return s["pooled_feat"], t["pooled_feat"]


def embedded(d, s, t):
    return d.embed_s(s["pooled_feat"]), d.embed_t(t["pooled_feat"])


def crd(d, s, t, items):
    contrast = copy.deepcopy(d.contrast)  # its first call settles Z
    return crd_loss(*contrast(*embedded(d, s, t), items["contrastive_index"]), num_data=50)


def ofd(d, s, t, items):
    margins = (d.margin0, d.margin1, d.margin2)
    maps = zip(
        d.connectors(s["preact_feats"][1:]), t["preact_feats"][1:], margins, (4, 2, 1), strict=True
    )
    return sum(ofd_loss(own, other, margin) / share for own, other, margin, share in maps)


def reviewkd(d, s, t, items):
    own, other = (
        [*maps[1:], x["pooled_feat"].flatten(1)[:, :, None, None]]
        for x, maps in ((s, s["feats"]), (t, t["preact_feats"]))
    )
    sizes = [(1, 1), (8, 8), (16, 16), (32, 32)]
    return hcl_loss(review(d.abfs, own[::-1], sizes), other)


def vid(d, s, t, items):
    total = 0.0
    for regressor, own, other in zip(d.regressors, *stages(s, t), strict=True):
        rho = torch.full((other.shape[1],), 4.993229)
        total = total + vid_loss(regressor, own, other, rho, 1e-5)
    return total


def ft(d, s, t, items):
    factors = d.translator(s["feats"][-1]), d.paraphraser.encoder(t["feats"][-1])
    return ft_loss(*factors, p=1, form="attention")


PUBLISHED = {  # weight of the cross-entropy, weight of the distillation term, that term
    "KD": (0.1, 0.9, lambda d, s, t, items: kd_loss(s.logits, t.logits, 4.0)),
    "DKD": (
        1.0,
        1.0,
        lambda d, s, t, items: dkd_loss(s.logits, t.logits, items["target"], 1.0, 8.0, 4.0),
    ),
    "LOGITS": (1.0, 0.1, lambda d, s, t, items: logits_loss(s.logits, t.logits)),
    "AT": (1.0, 1000.0, lambda d, s, t, items: at_loss(*stages(s, t), p=2, form="sum")),
    "FITNET": (
        1.0,
        100.0,
        lambda d, s, t, items: fitnet_loss(d.conv_reg(s["feats"][2]), t["feats"][2]),
    ),
    "NST": (1.0, 50.0, lambda d, s, t, items: nst_loss(*stages(s, t))),
    "PKT": (1.0, 30000.0, lambda d, s, t, items: pkt_loss(*pooled(s, t), eps=1e-7)),
    "KDSVD": (1.0, 1.0, lambda d, s, t, items: kdsvd_loss(*stages(s, t), k=1, signs="lapack")),
    "OFD": (1.0, 0.001, ofd),
    "RKD": (1.0, 1.0, lambda d, s, t, items: rkd_loss(*pooled(s, t), False, 1e-12, 25, 50)),
    "VID": (1.0, 1.0, vid),
    "SP": (1.0, 3000.0, lambda d, s, t, items: sp_loss([s["feats"][-1]], [t["feats"][-1]])),
    "CRD": (1.0, 0.8, crd),
    "REVIEWKD": (1.0, 1.0, reviewkd),
    "CC": (1.0, 0.02, lambda d, s, t, items: cc_loss(*embedded(d, s, t), form="neighbour")),
    "FT": (1.0, 200.0, ft),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_default_terms_are_the_published_weights_times_the_loss(method):
    ce_weight, weight, loss = PUBLISHED[method]
    distiller = build(method).train()
    generator = torch.Generator().manual_seed(2)
    items = batch() | {
        "epoch": 20,  # the first one after warm-up
        "contrastive_index": torch.randint(50, (6, 9), generator=generator),
    }
    with torch.no_grad():  # before the step: CRD's moves its bank
        outputs = distiller.run_student(items["image"]), distiller.run_teacher(items["image"])
        pure = loss(distiller, *outputs, items).item()
        _, losses = distiller(**items)
    assert pure != 0
    assert losses["loss_kd"].item() == pytest.approx(weight * pure, rel=1e-5)
    cross_entropy = F.cross_entropy(outputs[0].logits, items["target"]).item()
    assert losses["loss_ce"].item() == pytest.approx(ce_weight * cross_entropy, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "pure"),
    [
        ("AB", lambda s, t: ab_loss(s["preact_feats"][1:], t["preact_feats"][1:], 1.0, "sum")),
        ("FSP", lambda s, t: fsp_loss(s["feats"], t["feats"], "sum")),
    ],
)
def test_the_default_initialisation_is_the_unweighted_loss(method, pure):
    """The networks are of one kind, so AB's connectors are identities."""
    distiller = build(method)
    with running(distiller, "init"), torch.no_grad():
        distiller.train()
        image = batch()["image"]
        want = pure(distiller.run_student(image), distiller.run_teacher(image)).item()
        _, losses = distiller(**batch())
    assert want != 0
    assert losses["loss_init"].item() == pytest.approx(want, rel=1e-5)


RECIPE = {
    "SOLVER.BATCH_SIZE": 64,
    "SOLVER.EPOCHS": 240,
    "SOLVER.LR": 0.05,
    "SOLVER.LR_DECAY_STAGES": [150, 180, 210],
    "SOLVER.LR_DECAY_RATE": 0.1,
    "SOLVER.WEIGHT_DECAY": 0.0005,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.TYPE": "SGD",
    "SOLVER.TRAINER": "base",
    "DATASET.TYPE": "cifar100",
}
SHIPPED = {
    "vanilla": {"DISTILLER.TYPE": "NONE", "DISTILLER.STUDENT": "resnet8x4"},
    "kd": {"KD.TEMPERATURE": 4, "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9},
    "at": {"AT.P": 2, "AT.LOSS.FEAT_WEIGHT": 1000.0},
    "fitnet": {"FITNET.HINT_LAYER": 2, "FITNET.LOSS.FEAT_WEIGHT": 100.0},
    "nst": {"NST.LOSS.FEAT_WEIGHT": 50.0},
    "ofd": {"OFD.LOSS.FEAT_WEIGHT": 0.001, "OFD.CONNECTOR.KERNEL_SIZE": 1},
    "pkt": {"PKT.LOSS.FEAT_WEIGHT": 30000.0},
    "rkd": {"RKD.DISTANCE_WEIGHT": 25, "RKD.ANGLE_WEIGHT": 50, "RKD.LOSS.FEAT_WEIGHT": 1.0},
    "sp": {"SP.LOSS.FEAT_WEIGHT": 3000.0},
    "vid": {"VID.LOSS.FEAT_WEIGHT": 1.0, "VID.INIT_PRED_VAR": 5.0},
    "crd": {
        "SOLVER.TRAINER": "crd",
        "CRD.LOSS.FEAT_WEIGHT": 0.8,
        "CRD.NCE.K": 16384,
        "CRD.NCE.TEMPERATURE": 0.07,
        "CRD.NCE.MOMENTUM": 0.5,
    },
    "reviewkd": {"REVIEWKD.REVIEWKD_WEIGHT": 5.0, "REVIEWKD.WARMUP_EPOCHS": 20},
    "dkd/res32x4_res8x4": {"DKD.ALPHA": 1.0, "DKD.BETA": 8.0, "DKD.T": 4.0, "DKD.WARMUP": 20},
    "dkd/res56_res20": {"DKD.BETA": 2.0, "DISTILLER.STUDENT": "resnet20"},
    "dkd/vgg13_mv2": {"DKD.BETA": 6.0, "SOLVER.LR": 0.01},
    "dkd/wrn40_2_shuv1": {"DKD.BETA": 8.0, "SOLVER.LR": 0.01, "DISTILLER.STUDENT": "ShuffleV1"},
    "dot/vgg13_vgg8": {"SOLVER.TRAINER": "dot", "SOLVER.DOT.DELTA": 0.075},
    "dot/res32x4_shuv2": {"SOLVER.TRAINER": "dot", "SOLVER.LR": 0.01, "KD.LOSS.KD_WEIGHT": 0.9},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_hold_the_published_numbers(name):
    cfg = load_config(REPO / "configs" / "cifar100" / f"{name}.yaml")
    want = RECIPE | SHIPPED[name]
    if "/" not in name and name != "vanilla":
        pair = {"DISTILLER.TEACHER": "resnet32x4", "DISTILLER.STUDENT": "resnet8x4"}
        want = want | pair | {"DISTILLER.TYPE": name.upper()}
    assert {key: lookup(cfg, key) for key in want} == want


DEFAULTS = {  # of the methods of 2023 to 2026, as their authors' code has them
    "RLD": {"CE_WEIGHT": 1, "ALPHA": 1, "BETA": 8, "ALPHA_T": 1, "T": 4, "WARMUP": 20},
    "GDKD": {"CE_WEIGHT": 1, "W0": 1, "W1": 1, "W2": 8, "TOPK": 5, "T": 4, "WARMUP": 20},
    "GDKD3": {"CE_WEIGHT": 1, "W0": 1, "W1": 1, "W2": 8, "TOPK": 4, "T": 4, "WARMUP": 20},
    "CRLD": {"CE_WEIGHT": 1, "WV_WEIGHT": 2, "CV_WEIGHT": 0.5, "T": 4, "TAU_W": 0.9, "TAU_S": 0.2},
    "LDRLD": {"R": 1, "ALPHA": 10.5, "BETA": 7, "T": 4},
    "NORMKD": {"TEMPERATURE": 2, "LOSS.CE_WEIGHT": 0.1, "LOSS.KD_WEIGHT": 0.9},
    "CORRECTEDKD": {
        **{"MARGIN": 0.05, "RC_WEIGHT": 0.1, "MSE_WEIGHT": 4, "SHARE": 0.8},
        "LOSS.CE_WEIGHT": 0,
    },
    "WKD": {
        **{"TEMPERATURE": 2, "SHARPEN": 1, "LAMBDA": 0.05, "ITERATIONS": 10, "HINT_LAYER": -1},
        **{"PROJECTOR": "bottleneck", "WIDTH": 256, "GRID": 4, "RATIO": 2},
        **{"LOSS.CE_WEIGHT": 1, "LOSS.COSINE_DECAY_EPOCH": 0},
    },
    "SOLVER.DEEPKD": {"DELTA_TOG": 0.075, "DELTA_TCG": -0.075, "DELTA_NCG": 0.075, "TOPK": 0},
}


def test_defaults_of_recent_methods_are_those_of_their_authors():
    cfg = default_config()
    for node, stated in DEFAULTS.items():
        assert {key: lookup(cfg, f"{node}.{key}") for key in stated} == stated, node
