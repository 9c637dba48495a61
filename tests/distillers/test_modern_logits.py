"""DIST, NKD, USKD, TTM, WTTM, DGKD and DKD's modes: recorded values, and independent references."""

import math

import pytest
import torch
import torch.nn.functional as F
from modern_golden import CASES, check_golden, golden_inputs
from support import golden_values
from test_distillers import batch, networks

from mdistiller.distillers import distiller_dict, get_distiller
from mdistiller.distillers.DGKD import dgkd_loss, gradient_metrics, term_gradients
from mdistiller.distillers.DIST import dist_loss
from mdistiller.distillers.DKD import dkd_loss, dkd_terms, mode_weights
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.TTM import ttm_loss
from mdistiller.distillers.USKD import uskd_terms
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
TARGET = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])


def build(name, *overrides):
    cfg = default_config()
    cfg.merge_from_list(overrides)
    return get_distiller(name).build(*networks(), cfg, 50, (32, 32)).train()


def gradient(loss, logits=STUDENT):
    """Value and gradient of `loss` at the student's logits."""
    student = logits.clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.item(), student.grad


@pytest.mark.parametrize("case", ["dist_tau1", "dist_tau4", "dist_tau1_sharp"])
def test_dist(case):
    def loss(t, h):
        logits = (h.get("input_scale", 1.0) * t[name] for name in ("zs", "zt"))
        return dist_loss(*logits, h["beta"], h["gamma"], h["tau"], h["eps"])

    check_golden(case, loss)


@pytest.mark.parametrize("case", ["nkd_imagenet", "nkd_cifar"])
def test_nkd(case):
    check_golden(case, lambda t, h: nkd_loss(t["zs"], t["zt"], t["y"], h["temp"], h["gamma"]))


@pytest.mark.parametrize("case", ["ttm_g0.1", "ttm_g0.3", "wttm_g0.1", "wttm_g0.3"])
def test_ttm(case):
    weighted = case.startswith("wttm")
    check_golden(case, lambda t, h: ttm_loss(t["zs"], t["zt"], h["gamma"], weighted))


@pytest.mark.parametrize(
    "case", ["uskd_imagenet", "uskd_imagenet_paper", "uskd_cifar", "uskd_cifar_paper"]
)
def test_uskd(case):
    rank = "prob" if case.endswith("paper") else "log"

    def loss(t, h):
        weak = t["mid"] @ t["mid_W"].T + t["mid_b"]
        terms = uskd_terms(t["zs"], weak, t["y"], rank)
        weighted = dict(zip(("target", "nontarget", "weak"), terms, strict=True))
        weighted["target"] = weighted["target"] * h["alpha"]
        weighted["nontarget"] = weighted["nontarget"] * h["beta"]
        weighted["weak"] = weighted["weak"] * h["mu"]
        for name, want in CASES[case]["terms"].items():
            assert weighted[name].item() == pytest.approx(want, rel=1e-8), name
        return sum(weighted.values())

    check_golden(case, loss)


@pytest.mark.parametrize(
    ("case", "term"), [("dgkd_normalised", "log"), ("dgkd_plain", "plain"), ("dgkd_off", "off")]
)
def test_dgkd(case, term):
    def loss(t, h):
        weights = h["alpha"], h["beta"], h["epsilon"]
        return dgkd_loss(t["zs"], t["zt"], t["y"], *weights, h["temperature"], term)

    check_golden(case, loss)


def test_dgkd_metrics_equal_the_recorded():
    t, recorded = golden_inputs("dgkd_normalised"), dict(CASES["dgkd_normalised"]["extra"])
    recorded["avg_grad_similarity"] = recorded.pop("grad_cos")
    metrics = gradient_metrics(t["zs"], t["zt"], t["y"], 4.0)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(recorded)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("mode", ["dkd", "tckd", "nckd"])
def test_dkd_modes(mode):
    def loss(t, h):
        weights = mode_weights(mode, h["alpha"], h["beta"])
        return dkd_loss(t["zs"], t["zt"], t["y"], *weights, h["temperature"])

    check_golden("seed_dkd_both" if mode == "dkd" else f"seed_dkd_{mode}_only", loss)


def test_dkd_mode_is_a_config_key():
    losses = {}
    for mode in ("dkd", "tckd", "nckd"):
        distiller = build("DKD", "DKD.MODE", mode, "DKD.ALPHA", 3.0, "DKD.WARMUP", 0)
        losses[mode] = distiller(**batch())[1]["loss_kd"].item()
    assert losses["tckd"] == pytest.approx(3 * distiller.metrics["tckd"].item(), rel=1e-6)
    assert losses["nckd"] == pytest.approx(8 * distiller.metrics["nckd"].item(), rel=1e-6)
    assert losses["dkd"] == pytest.approx(losses["tckd"] + losses["nckd"], rel=1e-6)


def double_backward(student, teacher, temperature):
    """Both terms' gradients in the logits by autograd, themselves differentiable."""
    terms = dkd_terms(student, teacher, TARGET, temperature)
    return [torch.autograd.grad(term, student, create_graph=True)[0] for term in terms]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dgkd_needs_no_double_backward(temperature):
    student = STUDENT.clone().requires_grad_()
    by_autograd = double_backward(student, TEACHER, temperature)
    closed = term_gradients(student, TEACHER, TARGET, temperature)
    torch.testing.assert_close(list(closed), by_autograd, rtol=1e-9, atol=1e-12)

    distance = (by_autograd[0] - by_autograd[1]).square().mean()
    want = torch.autograd.grad(distance, student)[0]

    def difference(logits):
        settings = {"alpha": 1.0, "beta": 8.0, "epsilon": -1.0, "temperature": temperature}
        with_term, without = (
            dgkd_loss(logits, TEACHER, TARGET, **settings, term=term) for term in ("plain", "off")
        )
        return with_term - without

    value, got = gradient(difference)
    assert value == pytest.approx(distance.item(), rel=1e-9)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-14)


def test_dgkd_leaves_unlabelled_samples_out():
    labels = TARGET.clone()
    labels[[1, 4]] = -100
    kept = labels != -100
    settings = {"alpha": 1.0, "beta": 8.0, "epsilon": 6.0, "temperature": 4.0, "term": "plain"}
    value, got = gradient(lambda z: dgkd_loss(z, TEACHER, labels, **settings))
    want, part = gradient(
        lambda z: dgkd_loss(z, TEACHER[kept], labels[kept], **settings), STUDENT[kept]
    )
    assert value == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(got[kept], part)
    assert not got[~kept].any()
    metrics = gradient_metrics(STUDENT, TEACHER, labels, 4.0)
    of_part = gradient_metrics(STUDENT[kept], TEACHER[kept], labels[kept], 4.0)
    torch.testing.assert_close(metrics, of_part)


def test_dgkd_without_its_term_is_dkd():
    _, plain = build("DKD")(**batch())
    distiller = build("DGKD", "DGKD.TERM", "off")
    _, losses = distiller(**batch())
    assert losses["loss_kd"].item() == pytest.approx(plain["loss_kd"].item(), rel=1e-6)
    assert set(distiller.metrics) == {
        *("avg_grad_similarity", "covariance"),
        *("target_norm", "nontarget_norm", "target_gradmag", "nontarget_gradmag"),
    }


def test_dist_relations_by_hand():
    """Samples 1 and 2 as rows: P = softmax(log(...)), correlations from numpy-free arithmetic."""
    p, q = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]

    def rho(a, b):
        a, b = ([v - sum(x) / len(x) for v in x] for x in (a, b))
        product = sum(v * w for v, w in zip(a, b, strict=True))
        return product / (math.hypot(*a) * math.hypot(*b) + 1e-8)

    inter = 1 - sum(map(rho, p, q)) / 2
    intra = 1 - sum(map(rho, zip(*p, strict=True), zip(*q, strict=True))) / 3
    logits = (torch.tensor(rows, dtype=torch.float64).log() for rows in (p, q))
    got = dist_loss(*logits, beta=2.0, gamma=3.0, tau=1.0)
    assert got.item() == pytest.approx(2 * inter + 3 * intra, rel=1e-9)


def test_equal_networks():
    """No loss for DIST and TTM, a stationary point of NKD's second term, D = 0 for DGKD."""
    value, slope = gradient(lambda z: dist_loss(z, STUDENT, tau=4.0))
    assert value == pytest.approx(0, abs=1e-3)  # EPS keeps faint classes from correlating fully
    assert slope.abs().max() < 1e-4
    for weighted in (False, True):  # gamma 1: nothing is flattened
        value, slope = gradient(lambda z, w=weighted: ttm_loss(z, STUDENT, 1.0, w))
        assert value == pytest.approx(0, abs=1e-12)
        assert slope.abs().max() < 1e-12
    others = gradient(
        lambda z: nkd_loss(z, STUDENT, TARGET, 2.0, 1.0) - nkd_loss(z, STUDENT, TARGET, 2.0, 0.0)
    )[1]
    assert others.abs().max() < 1e-12
    for term in ("plain", "log"):
        value, slope = gradient(
            lambda z, t=term: dgkd_loss(z, STUDENT, TARGET, 1.0, 8.0, 6.0, 4.0, t)
        )
        assert value == pytest.approx(0, abs=1e-12)
        assert slope.abs().max() < 1e-12


def test_nkd_differs_from_dkds_second_term_by_a_constant():
    """A cross-entropy has the gradient of the divergence."""
    with_others = gradient(lambda z: nkd_loss(z, TEACHER, TARGET, 2.0, 1.0))[1]
    without = gradient(lambda z: nkd_loss(z, TEACHER, TARGET, 2.0, 0.0))[1]
    nckd = gradient(lambda z: dkd_terms(z, TEACHER, TARGET, 2.0)[1])[1]
    torch.testing.assert_close(with_others - without, nckd, rtol=1e-9, atol=1e-12)


def test_nkd_takes_the_largest_of_soft_labels_and_leaves_out_the_unlabelled():
    soft = 0.6 * F.one_hot(TARGET, 10).double() + 0.4 * F.one_hot(TARGET.flip(0), 10)
    hard = nkd_loss(STUDENT, TEACHER, TARGET, 3.0, 3.5)
    assert nkd_loss(STUDENT, TEACHER, soft, 3.0, 3.5).item() == hard.item()
    labels = TARGET.clone()
    labels[4:] = -100
    some = nkd_loss(STUDENT, TEACHER, labels, 3.0, 3.5)
    assert some.item() == nkd_loss(STUDENT[:4], TEACHER[:4], TARGET[:4], 3.0, 3.5).item()


def test_ttm_is_a_divergence_from_a_flattened_teacher():
    power = TEACHER.softmax(1) ** 0.3
    flat = power / power.sum(1, keepdim=True)
    rows = (flat * (flat / STUDENT.softmax(1)).log()).sum(1)
    assert ttm_loss(STUDENT, TEACHER, 0.3).item() == pytest.approx(rows.mean().item())
    weighted = (rows * power.sum(1)).mean().item()
    assert ttm_loss(STUDENT, TEACHER, 0.3, weighted=True).item() == pytest.approx(weighted)


def test_ttm_and_wttm_have_settings_of_their_own():
    overrides = ["TTM.GAMMA", 0.5, "TTM.BETA", 2.0, "WTTM.GAMMA", 0.25, "WTTM.BETA", 3.0]
    for name, gamma, beta in (("TTM", 0.5, 2.0), ("WTTM", 0.25, 3.0)):
        distiller = build(name, *overrides)
        logits, losses = distiller(**batch())
        teacher = distiller.teacher(batch()["image"])[0]
        want = beta * ttm_loss(logits, teacher, gamma, name == "WTTM")
        assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-6)


def uskd_by_hand(logits, weak, labels, rank):
    """USKD's terms sample by sample; labels: a dict class -> share for each sample."""
    count, classes = len(logits), len(logits[0])
    s, w = (
        [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
        for rows in (logits, weak)
    )
    ordered = [sorted(y, key=y.get, reverse=True) for y in labels]
    own = others = faint = 0.0
    for n, y in enumerate(labels):
        for place, k in enumerate(ordered[n]):
            peers = [s[m][ordered[m][place]] ** 2 for m in range(count) if len(labels[m]) > place]
            own -= (s[n][k] ** 2 + y[k] - sum(peers) / len(peers)) * math.log(s[n][k])
        x = [math.log(v) for v in s[n]] if rank == "log" else s[n]
        w_t, x_t = (sum(values[k] for k in y) for values in (w[n], x))
        score = [w[n][c] / (1 - w_t + 1e-6) + x[c] / (1 - x_t + 1e-6) for c in range(classes)]
        places = sorted(range(classes), key=score.__getitem__, reverse=True)
        zipf = {c: 1 / (1 + places.index(c)) for c in range(classes) if c not in y}
        rest = sum(s[n][c] for c in zipf)
        others -= sum(z / sum(zipf.values()) * math.log(s[n][c] / rest) for c, z in zipf.items())
        smooth = [0.9 * y.get(c, 0.0) + 0.1 / classes for c in range(classes)]
        faint -= sum(a * math.log(b) for a, b in zip(smooth, w[n], strict=True))
    return [total / count for total in (own, others, faint)]


@pytest.mark.parametrize("rank", ["log", "prob"])
def test_uskd_by_hand_for_hard_and_mixed_labels(rank):
    weak = 2 * golden_values((8, 10), 3)
    hard = [{int(y): 1.0} for y in TARGET]
    mixed = [{int(y): 0.7, (int(y) + 3) % 10: 0.3} for y in TARGET]
    mixed[2] = {2: 1.0}  # a sample mixed with one of its own class
    for labels in (hard, mixed):
        soft = torch.zeros(8, 10, dtype=torch.float64)
        for n, y in enumerate(labels):
            soft[n, list(y)] = torch.tensor(list(y.values()), dtype=torch.float64)
        want = uskd_by_hand(STUDENT.tolist(), weak.tolist(), labels, rank)
        got = uskd_terms(STUDENT, weak, soft, rank)
        assert [value.item() for value in got] == pytest.approx(want, rel=1e-9)
        if labels is hard:
            same = uskd_terms(STUDENT, weak, TARGET, rank)
            assert [v.item() for v in same] == [v.item() for v in got]


def test_uskd_leaves_out_the_unlabelled():
    weak = 2 * golden_values((8, 10), 3)
    labels = TARGET.clone()
    labels[4:] = -100
    got = uskd_terms(STUDENT, weak, labels)
    want = uskd_terms(STUDENT[:4], weak[:4], TARGET[:4])
    assert [v.item() for v in got] == pytest.approx([v.item() for v in want], rel=1e-12)


def test_uskd_has_no_teacher_and_trains_its_head_and_the_stage_below():
    distiller = build("USKD", "USKD.ALPHA", 0.0, "USKD.BETA", 0.0, "USKD.LOSS.CE_WEIGHT", 0.0)
    assert distiller.teacher is None
    assert distiller.head.in_features == distiller.student.get_stage_channels()[-2]
    assert distiller.get_extra_parameters() == 10 * distiller.head.in_features + 10
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert distiller.head.weight.grad.any()
    assert distiller.student.layer2[0].conv1.weight.grad.any()
    assert not distiller.student.layer3[0].conv1.weight.grad.any()  # above the head's stage
    assert distiller.metrics["weak"].item() == pytest.approx(10 * losses["loss_kd"].item())


@pytest.mark.parametrize("name", ["NKD+AT", "DIST+AT", "TTM+DGKD", "CTKD+AT"])
def test_logit_methods_add_up_with_others(name):
    _, both = build(name)(**batch())
    alone = [build(part)(**batch())[1]["loss_kd"].item() for part in name.split("+")]
    assert both["loss_kd"].item() == pytest.approx(sum(alone), rel=1e-6)


def test_uskd_does_not_combine():
    with pytest.raises(UserError, match="USKD cannot be combined, since it has no teacher"):
        get_distiller("KD+USKD")


BAD = {
    "DIST.TAU 0": "DIST.TAU must be positive, got 0",
    "DIST.EPS 0": "DIST.EPS must be positive, got 0",
    "NKD.T -1": "NKD.T must be positive, got -1",
    "TTM.GAMMA 0": "TTM.GAMMA must be positive, got 0",
    "WTTM.GAMMA 0": "WTTM.GAMMA must be positive, got 0",
    "USKD.RANK rank": "USKD.RANK 'rank' is not one of log, prob",
    "DGKD.TERM on": "DGKD.TERM 'on' is not one of off, plain, log",
    "DGKD.T 0": "DGKD.T must be positive, got 0",
    "DKD.MODE both": "DKD.MODE 'both' is not one of dkd, tckd, nckd",
    "CTKD.MODE local": "CTKD.MODE 'local' is not one of global, instance",
    "CTKD.BASE dist": "CTKD.BASE 'dist' is not one of kd, dkd",
    "CTKD.T_START 0": "CTKD.T_START must be positive, got 0",
    "CTKD.T_RANGE 0": "CTKD.T_RANGE must be positive, got 0",
}


@pytest.mark.parametrize("words", BAD)
def test_a_setting_without_meaning_is_refused(words):
    with pytest.raises(UserError) as caught:
        build(words.split(".")[0], *words.split())
    assert BAD[words] in str(caught.value)


def test_methods_are_registered_by_name():
    assert {"DIST", "CTKD", "NKD", "USKD", "TTM", "WTTM", "DGKD"} <= set(distiller_dict)
