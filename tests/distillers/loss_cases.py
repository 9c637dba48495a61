"""Each method's loss beside its textbook form, on the features of two networks.

Used twice: a test holds values and gradients together, and `tools/benchmark.py losses` times both
forms. Layers that a method adds (connectors) belong to both sides and are the same modules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import textbook
import textbook_relations
import torch
from logit_cases import logit_cases
from torch import Tensor, nn

from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.CRD import crd_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.FitNet import fitnet_loss
from mdistiller.distillers.helpers.features.connectors import ConvReg
from mdistiller.distillers.helpers.losses.divergence import read_divergence
from mdistiller.distillers.helpers.losses.moments import wkd_feature_loss
from mdistiller.distillers.helpers.training.memory_bank import Bank
from mdistiller.distillers.helpers.training.negatives import Negatives
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LDRLD import ldrld_terms
from mdistiller.distillers.LOGITS import logits_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import Connectors, ofd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.ReviewKD import ABF, hcl_loss, review
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.VID import make_regressor, vid_loss
from mdistiller.distillers.WKD import wkd_logit_terms
from mdistiller.models import get_model_entry


@dataclass
class Case:
    """Two functions of the student's tensors `inputs`, each giving a scalar."""

    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    textbook: Callable[..., Tensor]


@torch.no_grad()
def outputs(name: str, image: Tensor) -> dict:
    """What a network of the CIFAR zoo gives for `image`, untrained, in train mode."""
    net = get_model_entry(name, "cifar")(num_classes=100).to(image.device, image.dtype)
    logits, features = net.train()(image)
    return {"logits": logits} | features


def fresh(tensors) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def loss_cases(
    batch: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    student: str = "resnet8x4",
    teacher: str = "resnet32x4",
    bank: int = 50_000,
    negatives: int = 16_384,
) -> dict[str, Case]:
    """The cases by name, for one batch of random images.

    Args:
        bank, negatives: images in CRD's bank and negatives drawn for each sample.
    """
    torch.manual_seed(0)
    image = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype)
    s, t = outputs(student, image), outputs(teacher, image)
    target = torch.arange(batch, device=device) % 100
    maps_s, maps_t = s["feats"][1:], t["feats"][1:]
    z_s, z_t, pooled_s, pooled_t = s["logits"], t["logits"], s["pooled_feat"], t["pooled_feat"]

    def on(tensors, other, ours, form, **settings):
        """A case whose functions take (list of the student's, list of the teacher's)."""
        return Case(
            fresh(tensors), lambda *x: ours(list(x), other), lambda *x: form(list(x), other)
        )

    def on_one(tensor, other, ours, form):
        return Case(fresh([tensor]), lambda x: ours(x, other), lambda x: form(x, other))

    def like(module: nn.Module) -> nn.Module:
        return module.to(device, dtype)

    cases = {
        "KD": on_one(
            z_s, z_t, lambda a, b: kd_loss(a, b, 4.0), lambda a, b: textbook.kd(a, b, 4.0)
        ),
        "DKD": on_one(
            z_s,
            z_t,
            lambda a, b: dkd_loss(a, b, target, 1.0, 8.0, 4.0),
            lambda a, b: textbook.dkd(a, b, target, 1.0, 8.0, 4.0),
        ),
        "LOGITS": on_one(z_s, z_t, logits_loss, textbook.logits),
        "AT": on(maps_s, maps_t, lambda a, b: at_loss(a, b, 2), textbook.at),
        "NST": on(maps_s, maps_t, nst_loss, textbook.nst),
        "SP": on_one(maps_s[-1], maps_t[-1], lambda a, b: sp_loss([a], [b]), textbook.sp),
        "PKT": on_one(pooled_s, pooled_t, pkt_loss, textbook.pkt),
        "RKD": on_one(pooled_s, pooled_t, rkd_loss, textbook.rkd),
        "CC": on_one(pooled_s, pooled_t, cc_loss, textbook.cc_neighbour),
        "CC kernel": on_one(
            pooled_s, pooled_t, lambda a, b: cc_loss(a, b, form="kernel"), textbook.cc_kernel
        ),
    }
    for signs in ("lapack", "canonical"):
        cases[f"KDSVD {signs}"] = on(
            maps_s,
            maps_t,
            lambda a, b, signs=signs: kdsvd_loss(a, b, 1, signs),
            lambda a, b, signs=signs: textbook.kdsvd(a, b, 1, signs == "canonical"),
        )
    hint = like(ConvReg(maps_s[1].shape, maps_t[1].shape))
    cases["FITNET"] = on_one(
        maps_s[1],
        maps_t[1],
        lambda a, b: fitnet_loss(hint(a), b),
        lambda a, b: textbook.logits(hint(a), b),
    )
    widths = [(a.shape[1], b.shape[1]) for a, b in zip(maps_s, maps_t, strict=True)]
    regressors = [like(make_regressor(*pair)) for pair in widths]
    scales = [torch.full((c,), 5.0, device=device, dtype=dtype) for _, c in widths]

    def vid(form):
        return lambda a, b: sum(
            form(regressor, x, y, scale, 1e-5)
            for regressor, x, y, scale in zip(regressors, a, b, scales, strict=True)
        )

    cases["VID"] = on(maps_s, maps_t, vid(vid_loss), vid(textbook.vid))
    connectors = like(Connectors(*zip(*widths, strict=True), kernel_size=1))
    margins = [-torch.rand(c, device=device, dtype=dtype) for _, c in widths]

    def ofd(form, connect):
        return lambda a, b: sum(
            form(x, y, m) for x, y, m in zip(connect(a), b, margins, strict=True)
        )

    preacts_s, preacts_t = s["preact_feats"][1:], t["preact_feats"][1:]
    cases["OFD"] = on(
        preacts_s, preacts_t, ofd(ofd_loss, connectors), ofd(textbook.ofd, connectors)
    )
    with torch.no_grad():
        connected = connectors(preacts_s)
    cases["OFD distance"] = on(connected, preacts_t, ofd(ofd_loss, list), ofd(textbook.ofd, list))
    cases["REVIEWKD"] = review_case(s, t, like)
    cases["CRD step"] = crd_case(pooled_s, pooled_t, bank, negatives, like)
    some = maps_t[-1].flip(0)
    cases["WKD-F"] = on_one(
        some,
        maps_t[-1],
        lambda a, b: wkd_feature_loss(a, b, 4, 2.0),
        lambda a, b: textbook_relations.wkd_maps(a, b, 4, 2.0),
    )
    for classes in (100, 1000):
        generator = torch.Generator().manual_seed(classes)
        logits = (3 * torch.randn(2, batch, classes, generator=generator)).to(device, dtype)
        for name, case in relation_cases(*logits, target).items():
            cases[f"{name}, {classes} classes"] = case
    for name, (students, *forms) in logit_cases(batch, device, dtype).items():
        cases[name] = Case(fresh(students), *forms)
    return cases


def relation_cases(s: Tensor, t: Tensor, target: Tensor) -> dict[str, Case]:
    """Losses whose cost depends on the number of classes: logits [N, C]."""
    form = read_divergence("DIVERGENCE", "ab(0.8, 0.3)")
    places = torch.linspace(0, 3, s.shape[1], device=s.device, dtype=s.dtype)
    cost = 1 - (-(places[:, None] - places).abs()).clamp(min=-1).exp()

    def ldrld(a: Tensor) -> Tensor:
        local, rest = ldrld_terms(a, t, 5, 4.0)
        return 10.5 * local + 7 * rest

    def wkd(a: Tensor) -> Tensor:
        own, moved = wkd_logit_terms(a, t, target, cost, 4.0, largest=0.64)
        return own + 30 * moved

    pairs = {
        "KD ab(0.8, 0.3)": (
            lambda a: kd_loss(a, t, 4.0, form),
            lambda a: textbook_relations.ab_kd(a, t, 4.0, 0.8, 0.3),
        ),
        "LDRLD": (ldrld, lambda a: textbook_relations.ldrld(a, t, 5, 4.0, 10.5, 7)),
        "WKD-L": (
            wkd,
            lambda a: textbook_relations.wkd_logits(a, t, target, cost, 4.0, 0.05, 10, 30),
        ),
    }
    return {name: Case(fresh([s]), *both) for name, both in pairs.items()}


def review_case(s: dict, t: dict, like: Callable[[nn.Module], nn.Module]) -> Case:
    """The whole chain; the connectors are shared, the distances are not."""
    levels_s = [*s["feats"][1:], s["pooled_feat"][:, :, None, None]]
    levels_t = [*t["preact_feats"][1:], t["pooled_feat"][:, :, None, None]]
    deepest = len(levels_s) - 1
    blocks = [
        like(ABF(a.shape[1], 256, b.shape[1], fuse=level < deepest))
        for level, (a, b) in enumerate(zip(levels_s, levels_t, strict=True))
    ][::-1]
    sizes = [x.shape[2:] for x in levels_t[::-1]]

    def chain(distance):
        return lambda *maps: distance(review(blocks, maps[::-1], sizes), levels_t)

    def plain(ours, other):
        return sum(textbook.hcl(x, y) for x, y in zip(ours, other, strict=True))

    return Case(fresh(levels_s), chain(hcl_loss), chain(plain))


def crd_case(s: Tensor, t: Tensor, bank: int, k: int, like: Callable) -> Case:
    """A whole step: negatives drawn, both sides scored, the bank moved."""
    classes = torch.arange(bank) % 100
    index = torch.arange(len(s))
    memory = like(Bank(bank, 128, k, 0.07, 0.5))
    negatives = like(Negatives(classes, bank, k))
    rivals = textbook.rivals_by_class(classes.numpy())
    own, other = (torch.randn(x.shape[1], 128).to(x) / math.sqrt(x.shape[1]) for x in (s, t))
    embedded_t = nn.functional.normalize(t @ other)

    def ours(x: Tensor) -> Tensor:
        rows = index.to(x.device)
        v = nn.functional.normalize(x @ own)
        contrast = torch.cat([rows[:, None], negatives.draw(rows)], dim=1)
        loss = crd_loss(*memory(v, embedded_t, contrast), bank)
        memory.update(rows, v, embedded_t)
        return loss

    plain = like(textbook.CRDStep(bank, 128, k, 0.07, 0.5, rivals))
    plain.load_state_dict({"memory_s": memory.memory_v1, "memory_t": memory.memory_v2})

    def step(x: Tensor) -> Tensor:
        return plain(nn.functional.normalize(x @ own), embedded_t, index, classes)

    return Case(fresh([s]), ours, step)
