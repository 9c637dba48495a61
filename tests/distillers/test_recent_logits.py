"""RLD, GDKD, GDKD3, CRLD, NORMKD and CORRECTEDKD: sample by sample from their formulas, the
equalities that they promise, rough logits, and their settings."""

import math

import pytest
import torch
from support import REPO, golden_values
from test_distillers import batch, networks

from mdistiller.distillers import get_distiller
from mdistiller.distillers.CorrectedKD import mode_loss, soft_swap, swap
from mdistiller.distillers.CRLD import crld_terms
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.GDKD import gdkd_loss
from mdistiller.distillers.GDKD3 import gdkd3_loss
from mdistiller.distillers.helpers.losses.standardize import standardize
from mdistiller.distillers.KD import kd_loss, kd_rows
from mdistiller.distillers.NormKD import normkd_loss
from mdistiller.distillers.RLD import rld_loss, rld_terms
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.registry import UserError

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
STUDENT[0] -= 20  # its largest logit is negative
VIEWS = [4 * golden_values((8, 10), seed) for seed in (3, 4)]
TARGET = torch.tensor([*TEACHER[:4].argmax(dim=1).tolist(), 4, 5, -100, 7])  # 4 right, 1 unlabelled
SETTINGS = {"W0": 0.5, "W1": 2.0, "W2": 8.0}


def kl(v, z, temperature=1.0, classes=None):
    """T^2 KL of the softmaxes of two rows over some classes; 0 if there are none."""
    columns = list(range(len(v))) if classes is None else list(classes)
    if not columns:
        return 0 * z.sum()
    q, p = ((row[columns] / temperature).log_softmax(0) for row in (v, z))
    return temperature**2 * (q.exp() * (q - p)).sum()


def sums(row, groups, temperature):
    """Logits whose softmax at T are the probabilities of groups of classes."""
    return torch.stack([(row[g] / temperature).logsumexp(0) * temperature for g in groups])


def rld_row(z, v, y):
    guess = v.argmax().item()
    pairs = [
        sums(row, [[c], [d for d in range(len(row)) if d != c]], 2.0)
        for row, c in ((v, guess), (z, y))
    ]
    below = [c for c in range(len(v)) if v[c] < v[y]]
    return 1.5 * kl(*pairs, 2.0) + 8 * kl(v, z, 4.0, below)


def gdkd_row(z, v, y, sizes=(3,), weights=(0.5, 2.0, 8.0)):
    order, groups = v.topk(sum(sizes)).indices.tolist(), []  # of equal logits any may be first
    order += [c for c in range(len(v)) if c not in order]
    for size in (*sizes, len(v) - sum(sizes)):
        groups.append(order[:size])
        order = order[size:]
    high = kl(sums(v, groups, 4.0), sums(z, groups, 4.0), 4.0)
    inner = [w * kl(v, z, 4.0, g) for w, g in zip(weights[1:], groups, strict=True)]
    return weights[0] * high + sum(inner)


def normkd_row(z, v, y):
    t_v, t_z = (2.0 * row.std() for row in (v, z))
    q, p = (v / t_v).log_softmax(0), (z / t_z).log_softmax(0)
    return t_v**2 * (q.exp() * (q - p)).sum()


def swapped_row(z, v, y):
    changed, best = v.clone(), v.argmax().item()
    changed[y], changed[best] = v[best], v[y]
    return kl(changed, z, 4.0)


def softly_swapped_row(z, v, y):
    rival = max((c for c in range(len(v)) if c != y), key=lambda c: v[c])
    half = max(0.0, (v[rival] - v[y] + 0.05).item()) / 2
    changed = v.clone()
    changed[y] += half
    changed[rival] -= half
    return kl(changed, z, 4.0)


def rc_row(z, v, y):
    lifted = z.detach().clone()
    lifted[y] += lifted.max()
    return kl(v, z, 4.0) + 0.1 * kl(lifted, z, 4.0)


def revision_row(z, v, y):
    if v.argmax() == y:
        return -z.log_softmax(0)[y] + 4 * (z - v).square().mean()
    q = v.softmax(0)
    b = 0.8 / (q.max() - q[y] + 1)
    wanted = b * q + (1 - b) * torch.eye(len(v), dtype=v.dtype)[y]
    return (z.softmax(0) - wanted).square().mean()


def corrected(mode):
    """The loss of CORRECTEDKD of a mode as a function of logits and labels, a scalar."""
    cfg = default_config()
    cfg.merge_from_list(["CORRECTEDKD.MODE", mode])
    rows = mode_loss(cfg.CORRECTEDKD)

    def loss(z, v, target):
        labelled = target >= 0
        return rows(z, v, target.clamp(min=0)[:, None])[labelled].mean()

    return loss


RLD = lambda z, v, y: rld_loss(z, v, y, 1.5, 8.0, 2.0, 4.0)  # noqa: E731
WEIGHTS = tuple(SETTINGS.values())
LOSSES = {  # the loss, the same for one sample, whether unlabelled samples count
    "RLD": (RLD, rld_row, False),
    "GDKD": (lambda z, v, y: gdkd_loss(z, v, WEIGHTS, 3, 4.0), gdkd_row, True),
    "GDKD3": (
        lambda z, v, y: gdkd3_loss(z, v, WEIGHTS, 4, 4.0),
        lambda z, v, y: gdkd_row(z, v, y, (1, 3), (0.5, 0.0, 2.0, 8.0)),
        True,
    ),
    "NORMKD": (lambda z, v, y: normkd_loss(z, v, 2.0), normkd_row, True),
    "swap": (corrected("swap"), swapped_row, False),
    "soft_swap": (corrected("soft_swap"), softly_swapped_row, False),
    "rc": (corrected("rc"), rc_row, False),
    "revision": (corrected("revision"), revision_row, False),
}


def by_sample(row, student, teacher, unlabelled_count):
    """Mean of the loss of each sample in float64, and its gradient."""
    student = student.double().requires_grad_()
    rows = [
        row(z, v, y)
        for z, v, y in zip(student, teacher.double(), TARGET.tolist(), strict=True)
        if unlabelled_count or y >= 0
    ]
    value = torch.stack(rows).mean()
    return value.item(), torch.autograd.grad(value, student)[0]


def tied(logits):
    """Rows with ties, constant rows, and one with two classes far above."""
    logits = logits.round()
    logits[1] = 3.0
    logits[4, :5] = logits[4].max()
    logits[7, :2] += 100
    return logits


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)]
)
@pytest.mark.parametrize("kind", ["plain", "1e4-fold", "ties"])
def test_value_and_gradient_equal_those_of_single_samples(name, kind, dtype, rtol):
    loss, row, unlabelled_count = LOSSES[name]
    change = {"plain": lambda x: x, "1e4-fold": lambda x: 1e4 * x, "ties": tied}[kind]
    student, teacher = STUDENT.clone(), change(TEACHER.clone())
    if kind == "1e4-fold":
        student = change(student)
    if kind == "ties" and name == "NORMKD":
        teacher[1, 0] += 1  # the plain formula divides by 0 in a constant row
    student, teacher = student.to(dtype), teacher.to(dtype)
    want, gradient = by_sample(row, student, teacher, unlabelled_count)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, TARGET)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(want, rel=rtol, abs=1e-9)
    (got,) = torch.autograd.grad(value, leaf)
    near = 5e-3 if dtype == torch.bfloat16 else 10 * rtol
    scale = gradient.abs().max().item()
    torch.testing.assert_close(got.double(), gradient, rtol=near, atol=near * scale)


def test_gdkd_of_one_class_is_dkd_where_the_teacher_is_right():
    right = TEACHER.argmax(dim=1)
    for scale in (1, 1e4):
        leaf = (scale * STUDENT).requires_grad_()
        ours = gdkd_loss(leaf, TEACHER, (1.0, 3.0, 8.0), 1, 4.0)
        dkd = dkd_loss(leaf, TEACHER, right, 1.0, 8.0, 4.0)
        torch.testing.assert_close(ours, dkd, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, leaf)[0] for x in (ours, dkd)), rtol=1e-9, atol=1e-12
        )


def test_gdkd_directions_are_those_of_exchanged_networks_and_their_mean():
    """Where both networks rank the same classes first."""
    student = 0.5 * TEACHER + 0.1
    forward, reverse, both = (
        gdkd_loss(student, TEACHER, WEIGHTS, 3, 4.0, kind)
        for kind in ("forward", "reverse", "both")
    )
    exchanged = gdkd_loss(TEACHER, student, WEIGHTS, 3, 4.0)
    torch.testing.assert_close(reverse, exchanged)
    torch.testing.assert_close(both, (forward + reverse) / 2)


@pytest.mark.parametrize("loss", [gdkd_loss, gdkd3_loss])
def test_gdkd_with_few_classes_leaves_out_groups_that_are_empty(loss):
    z, v = STUDENT[:, :3], TEACHER[:, :3]
    got = loss(z, v, WEIGHTS, 4, 4.0)
    if loss is gdkd_loss:
        want = 2.0 * kd_loss(z, v, 4.0)
    else:
        rows = [gdkd_row(a, b, 0, (1,), (0.5, 0.0, 2.0)) for a, b in zip(z, v, strict=True)]
        want = torch.stack(rows).mean()
    torch.testing.assert_close(got, want)


def test_crld_without_thresholds_is_the_sum_of_four_kd_terms():
    z_w, z_s, v_w, v_s = STUDENT, VIEWS[0], TEACHER, VIEWS[1]
    terms = crld_terms((z_w, v_w), (z_s, v_s), 4.0, (0.0, 0.0))
    within = kd_loss(z_w, v_w, 4.0) + kd_loss(z_s, v_s, 4.0)
    cross = kd_loss(z_s, v_w, 4.0) + kd_loss(z_w, v_s, 4.0)
    torch.testing.assert_close(terms, {"within": within, "cross": cross})


def test_crld_thresholds_choose_samples_of_a_mean_over_all():
    z_w, z_s, v_w, v_s = STUDENT, VIEWS[0], TEACHER, VIEWS[1]
    tau_w, tau_s = (v.softmax(1).amax(1).sort().values[3].item() for v in (v_w, v_s))
    terms = crld_terms((z_w, v_w), (z_s, v_s), 4.0, (tau_w, tau_s))
    within = cross = 0.0
    for n in range(8):
        if v_w[n].softmax(0).max() >= tau_w:
            within += kl(v_w[n], z_w[n], 4.0) + kl(v_s[n], z_s[n], 4.0)
        if v_s[n].softmax(0).max() >= tau_s:
            cross += kl(v_w[n], z_s[n], 4.0) + kl(v_s[n], z_w[n], 4.0)
    torch.testing.assert_close(terms, {"within": within / 8, "cross": cross / 8})


def test_normkd_is_lskd_times_the_teachers_variance():
    """Of any logits; of standardised ones, whose variance is 1, it is LSKD."""
    z, v = (standardize(x, eps=0.0) for x in (STUDENT, TEACHER))
    want = (TEACHER.var(dim=1) * kd_rows(z, v, 2.0)).mean()
    torch.testing.assert_close(normkd_loss(STUDENT, TEACHER, 2.0), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(normkd_loss(z, v, 2.0), kd_loss(z, v, 2.0), rtol=1e-12, atol=0)


def test_normkd_sees_nothing_in_constant_logits():
    leaf = torch.full((8, 10), 7.7, requires_grad=True)
    normkd_loss(leaf, TEACHER.float(), 2.0).backward()
    assert not leaf.grad.any()
    assert normkd_loss(STUDENT.float(), torch.full((8, 10), 7.7), 2.0) == 0


def test_a_swap_puts_the_label_first_and_a_soft_one_above_the_best_wrong_class():
    column = TARGET.clamp(min=0)[:, None]
    assert torch.equal(swap(TEACHER, column).argmax(dim=1, keepdim=True), column)
    rival = TEACHER.scatter(1, column, -math.inf).argmax(dim=1, keepdim=True)
    changed = soft_swap(TEACHER, column)
    assert (changed.gather(1, column) - changed.gather(1, rival)).min() > 0.05 - 1e-12
    right = TEACHER.argmax(dim=1, keepdim=True)
    for unchanged in (swap(TEACHER, right), soft_swap(TEACHER, right, margin=0.0)):
        assert torch.equal(unchanged, TEACHER)


def test_rld_without_a_class_below_the_label_has_no_second_term():
    leaf = STUDENT.clone().requires_grad_()
    _, mcd = rld_terms(leaf, TEACHER, TEACHER.argmin(dim=1), 1.0, 4.0)
    assert mcd == 0
    assert not torch.autograd.grad(mcd, leaf)[0].any()


def build(name, *overrides):
    cfg = default_config()
    cfg.merge_from_list(overrides)
    return get_distiller(name).build(*networks(), cfg, 50, (32, 32)).train()


def test_the_distillers_terms_are_the_weighted_losses_after_warm_up():
    distillers = {
        "RLD": (RLD, ["RLD.ALPHA", 1.5, "RLD.ALPHA_T", 2.0]),
        "GDKD": (LOSSES["GDKD"][0], ["GDKD.TOPK", 3, *_pairs("GDKD")]),
        "GDKD3": (LOSSES["GDKD3"][0], _pairs("GDKD3")),
        "NORMKD": (LOSSES["NORMKD"][0], ["NORMKD.LOSS.KD_WEIGHT", 1.0]),
        "CORRECTEDKD": (LOSSES["rc"][0], ["CORRECTEDKD.MODE", "rc"]),
    }
    for name, (loss, settings) in distillers.items():
        warmup = 20 if "WARMUP" in default_config()[name] else 1
        distiller = build(name, *settings)
        items = batch()
        with torch.no_grad():
            z = distiller.run_student(items["image"]).logits
            v = distiller.run_teacher(items["image"]).logits
        for epoch, share in ((1, 1 / warmup), (warmup, 1.0)):
            got = distiller(**items | {"epoch": epoch})[1]["loss_kd"].item()
            want = share * loss(z, v, items["target"]).item()
            assert got == pytest.approx(want, rel=1e-4), (name, epoch)


def _pairs(node):
    return [word for key, value in SETTINGS.items() for word in (f"{node}.{key}", value)]


@pytest.mark.parametrize("lskd", [False, True])
def test_crld_compares_both_views_and_has_the_cross_entropy_of_both(lskd):
    items = batch()
    views = items["image"], items["image"].flip(3) + 0.3
    with torch.no_grad():
        v_w, v_s = (build("CRLD").run_teacher(view).logits for view in views)
        taus = [
            v.softmax(1).amax(1).quantile(share).item() for v, share in ((v_w, 0.3), (v_s, 0.7))
        ]
        on = ["CRLD.TAU_W", taus[0], "CRLD.TAU_S", taus[1], "CRLD.CE_WEIGHT", 0.7]
        distiller = build("CRLD", *on, "LSKD.ENABLE", lskd)
        z_w, z_s = (distiller.run_student(view).logits for view in views)
        _, losses = distiller(**items | {"image": views})
    change = standardize if lskd else lambda x: x
    rows = []
    for n in range(len(z_w)):
        a, b, c, d = (change(x[n : n + 1])[0].double() for x in (z_w, z_s, v_w, v_s))
        in_w, in_s = (v[n].softmax(0).max() >= tau for v, tau in zip((v_w, v_s), taus, strict=True))
        rows.append(in_w * 2 * (kl(c, a, 4.0) + kl(d, b, 4.0)))
        rows.append(in_s * 0.5 * (kl(c, b, 4.0) + kl(d, a, 4.0)))
    assert [sum(row > 0 for row in rows[k::2]) for k in (0, 1)] == [4, 2]  # of 6, the others masked
    want = sum(rows).item() / len(z_w)
    assert losses["loss_kd"].item() == pytest.approx(want, rel=1e-4)
    plain = sum(torch.nn.functional.cross_entropy(z, items["target"]).item() for z in (z_w, z_s))
    assert losses["loss_ce"].item() == pytest.approx(0.7 * plain, rel=1e-5)


CE_KEYS = {
    **dict.fromkeys(("RLD", "GDKD", "GDKD3"), "CE_WEIGHT"),
    **dict.fromkeys(("NORMKD", "CORRECTEDKD", "WKD"), "LOSS.CE_WEIGHT"),
}


@pytest.mark.parametrize("name", CE_KEYS)
def test_the_cross_entropy_has_the_weight_of_the_config(name):
    items = batch()
    losses = [
        build(name, f"{name}.{CE_KEYS[name]}", weight)(**items)[1]["loss_ce"].item()
        for weight in (1.0, 0.3)
    ]
    assert losses[1] == pytest.approx(0.3 * losses[0], rel=1e-5)
    assert losses[0] > 0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("GDKD", ["GDKD.TOPK", 0], r"GDKD\.TOPK must be at least 1, got 0"),
        ("GDKD3", ["GDKD3.TOPK", 1], r"GDKD3\.TOPK must be at least 2, got 1"),
        ("GDKD", ["GDKD.KL_TYPE", "back"], r"GDKD\.KL_TYPE 'back'"),
        ("GDKD", ["GDKD.STRATEGY", "worst"], r"GDKD\.STRATEGY 'worst'"),
        ("RLD", ["RLD.ALPHA_T", 0.0], r"RLD\.ALPHA_T must be positive"),
        ("CRLD", ["CRLD.T", -1.0], r"CRLD\.T must be positive"),
        ("NORMKD", ["NORMKD.TEMPERATURE", 0.0], r"NORMKD\.TEMPERATURE must be positive"),
        ("CORRECTEDKD", ["CORRECTEDKD.MODE", "no"], r"CORRECTEDKD\.MODE 'no'"),
        (
            "CORRECTEDKD",
            ["CORRECTEDKD.MODE", "revision", "LSKD.ENABLE", True],
            r"LSKD\.ENABLE: CORRECTEDKD\.MODE revision .* set LSKD\.ENABLE to False",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(name, overrides, message):
    with pytest.raises(UserError, match=message):
        build(name, *overrides)


def test_shipped_configs_hold_the_stated_weights():
    """Of 13 pairs, and digits: of at most 12 lines, two epochs."""
    folders = ("rld", "gdkd", "gdkd3", "crld", "normkd", "swap", "soft_swap", "rc", "revision")
    for name in folders:
        digits = REPO / "configs" / "digits" / f"{name}.yaml"
        assert len(digits.read_text().splitlines()) <= 12
        assert load_config(digits).SOLVER.EPOCHS == 2
        assert len(list((REPO / "configs" / "cifar100" / name).glob("*.yaml"))) == 13
        cfg = load_config(f"configs/cifar100/{name}/vgg13_mv2.yaml")
        assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS, cfg.SOLVER.WEIGHT_DECAY) == (0.01, 240, 5e-4)
        if cfg.DISTILLER.TYPE == "CORRECTEDKD":
            assert numbers(cfg.CORRECTEDKD, "MODE") == [name]
    for pair, stated in GDKD_WEIGHTS.items():
        for node in ("GDKD", "GDKD3"):
            own = load_config(f"configs/cifar100/{node.lower()}/{pair}.yaml")[node]
            assert numbers(own, "W0 W1 W2 T WARMUP") == [1, *stated, 4, 20]
    for pair, beta, low in (("r34_r18", 0.5, 1), ("r50_mv1", 2.0, 2)):
        own = load_config(f"configs/imagenet/{pair}/rld.yaml").RLD
        assert numbers(own, "ALPHA BETA ALPHA_T T WARMUP") == [1, beta, 1, 1, 1]
        own = load_config(f"configs/imagenet/{pair}/gdkd.yaml").GDKD
        assert numbers(own, "W0 W1 W2 T WARMUP") == [0.5, low, low, 1, 1]
    own = load_config("configs/cifar100/rld/vgg13_vgg8.yaml").RLD
    assert numbers(own, "ALPHA BETA ALPHA_T T") == [1, 8, 4, 4]


def numbers(node, names):
    return [node[name] for name in names.split()]


GDKD_WEIGHTS = {  # W1, W2; in all pairs that the authors state
    **dict.fromkeys(("res56_res20", "res110_res32"), (1, 1)),
    **dict.fromkeys(("res32x4_shuv1", "res32x4_shuv2", "res50_mv2"), (1, 8)),
    **dict.fromkeys(("vgg13_vgg8", "vgg13_mv2"), (1, 6)),
    **dict.fromkeys(("wrn40_2_wrn16_2", "wrn40_2_wrn40_1", "wrn40_2_shuv1"), (2, 6)),
    "res32x4_res8x4": (2, 8),
}
