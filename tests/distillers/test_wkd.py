"""WKD: transport, class costs and moments of maps against their formulas."""

import itertools
import math

import numpy as np
import pytest
import textbook_relations as textbook
import torch
from scipy.optimize import linprog
from support import REPO, golden_values
from test_distillers import batch, networks

from mdistiller.distillers import get_distiller
from mdistiller.distillers.helpers.losses import moments, sinkhorn
from mdistiller.distillers.helpers.losses.moments import wkd_feature_loss
from mdistiller.distillers.helpers.losses.sinkhorn import transport_cost
from mdistiller.distillers.helpers.training.teacher_facts import class_similarity
from mdistiller.distillers.WKD import class_costs, cosine_decay, wkd_logit_terms
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.registry import UserError

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
TARGET = torch.arange(8)
COST = class_costs(class_similarity(golden_values((10, 12, 6), 3)), 1.0)
BOTH = pytest.mark.parametrize("direct", [True, False], ids=["direct", "logarithms"])


@pytest.fixture
def form(monkeypatch, direct):
    """The form that transport takes; on logarithms a few rows at a time."""
    monkeypatch.setattr(sinkhorn, "DIRECT", math.inf if direct else 0.0)
    monkeypatch.setattr(sinkhorn, "CHUNK", 300)


def weighted(student, teacher, cost=COST, temperature=2.0):
    own, moved = wkd_logit_terms(student, teacher, TARGET[: len(student)], cost, temperature)
    return own + 30 * moved


@BOTH
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula(direct, dtype):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    want_at = student.double().clone().requires_grad_()
    want = textbook.wkd_logits(want_at, teacher.double(), TARGET, COST, 2.0, 0.05, 10, 30)
    got_at = student.clone().requires_grad_()
    got = weighted(got_at, teacher)
    for loss in (got, want):
        loss.backward()
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)
    largest = want_at.grad.abs().max().item()
    torch.testing.assert_close(got_at.grad.double(), want_at.grad, rtol=0, atol=tolerance * largest)


def test_with_lambda_to_zero_the_cost_is_that_of_the_cheapest_plan():
    p, q = STUDENT.softmax(1)[:2], TEACHER.softmax(1)[:2]
    classes = p.shape[1]
    sums = np.concatenate(
        [np.kron(np.eye(classes), np.ones(classes)), np.kron(np.ones(classes), np.eye(classes))]
    )
    exact = [
        linprog(COST.flatten().numpy(), A_eq=sums, b_eq=np.concatenate(masses)).fun
        for masses in zip(p, q, strict=True)
    ]
    gaps = []
    for smoothing in (0.1, 0.01, 0.001):
        got = transport_cost(p.log(), q.log(), COST, smoothing, 4000, 1.0)
        gaps.append(np.abs(got.numpy() - exact).max())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_unlabelled_samples_do_not_count():
    labels = TARGET.clone()
    labels[[1, 4]] = -100
    kept = labels != -100
    some = wkd_logit_terms(STUDENT, TEACHER, labels, COST, 2.0)
    alone = wkd_logit_terms(STUDENT[kept], TEACHER[kept], labels[kept], COST, 2.0)
    torch.testing.assert_close(some, alone)


def test_class_costs_are_symmetric_and_zero_on_the_diagonal_and_follow_cka():
    outputs = golden_values((5, 9, 4), 7)
    got, want = class_similarity(outputs), textbook.similarity(outputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for sharpen in (1.0, 2.0):
        cost = class_costs(got, sharpen)
        assert torch.equal(cost, cost.T)
        assert not cost.diagonal().any()
        torch.testing.assert_close(cost, 1 - torch.exp(-sharpen * (1 - want)), atol=1e-12, rtol=0)
    constant = outputs.clone()
    constant[2] = 3.0
    for hostile in (constant, 1e30 * outputs.float()):
        cost = class_costs(class_similarity(hostile), 1.0)
        assert torch.isfinite(cost).all()
        assert not cost.diagonal().any()
    assert class_similarity(constant)[2].sum() == 1


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_moments_of_maps(grid):
    maps = [golden_values((3, 5, 8, 8), 1), golden_values((3, 5, 4, 4), 2)]
    got_at, want_at = (maps[0].clone().requires_grad_() for _ in range(2))
    got = wkd_feature_loss(got_at, maps[0].flip(0), grid, 3.0)
    want = textbook.wkd_maps(want_at, maps[0].flip(0), grid, 3.0)
    for loss in (got, want):
        loss.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_at.grad, want_at.grad)
    assert torch.isfinite(wkd_feature_loss(*maps, grid, 2.0))  # one pixel to a cell, perhaps


def test_cells_of_a_side_that_is_no_multiple_are_those_of_adaptive_pooling():
    student, teacher = golden_values((2, 3, 7, 5), 1), golden_values((2, 3, 7, 5), 2)
    means = [torch.nn.functional.adaptive_avg_pool2d(x, 4) for x in (student, teacher)]
    gap = wkd_feature_loss(student, teacher, 4, 1.0) - wkd_feature_loss(student, teacher, 4, 0.0)
    want = (means[0] - means[1]).square().sum() / (2 * 16)
    torch.testing.assert_close(gap, want)
    rows, columns = [(0, 2), (1, 4), (3, 6), (5, 7)], [(0, 2), (1, 3), (2, 4), (3, 5)]
    want = 0
    for (top, bottom), (left, right) in itertools.product(rows, columns):
        cells = (x[:, :, top:bottom, left:right].flatten(2) for x in (student, teacher))
        one, two = ((cell.var(2, unbiased=True) + 1e-5).sqrt() for cell in cells)
        want = want + (one - two).square().sum() / (2 * 16)
    torch.testing.assert_close(wkd_feature_loss(student, teacher, 4, 0.0), want)
    assert torch.isfinite(wkd_feature_loss(student, golden_values((2, 3, 8, 4), 3), 4, 1.0))
    whole = golden_values((2, 3, 8, 8), 5)
    for grid in (2, 4):  # both ways to the moments of cells that do not overlap
        one = moments.grid_moments(whole, grid)
        cells = torch.stack([c.flatten(2) for c in moments._cells(whole, grid)], 2)
        torch.testing.assert_close(one[0].flatten(2), cells.mean(3))
        torch.testing.assert_close(one[1].flatten(2), (cells.var(3) + 1e-5).sqrt())


def test_the_schedule():
    assert [cosine_decay(e, 150, 240) for e in (1, 150)] == [1.0, 1.0]
    assert cosine_decay(195, 150, 240) == pytest.approx(0.5)
    assert cosine_decay(240, 150, 240) == 0.0
    assert cosine_decay(5, 240, 240) == 1.0


def build(*words):
    cfg = default_config()
    cfg.merge_from_list(list(words))
    return get_distiller("WKD").build(*networks(), cfg, 50, image_size=(32, 32)).train()


LOSS = "WKD.LOSS"


def test_weights_choose_the_terms_and_the_schedule_spares_the_targets():
    settings = ["SOLVER.EPOCHS", 3, f"{LOSS}.COSINE_DECAY_EPOCH", 1, f"{LOSS}.WKD_FEAT_WEIGHT", 0.5]
    both = build(*settings, f"{LOSS}.WKD_LOGIT_WEIGHT", 20.0)
    _, losses = both(**batch())  # epoch 2 of 3: half
    m = {name: value.item() for name, value in both.metrics.items()}
    assert losses["loss_kd"].item() == pytest.approx(
        m["wkd_target"] + 10 * m["wkd_logit"] + 0.25 * m["wkd_feat"], rel=1e-5
    )
    only_l, only_f = build(), build(f"{LOSS}.WKD_FEAT_WEIGHT", 0.5)
    for distiller, names in ((only_l, {"wkd_target", "wkd_logit"}), (only_f, {"wkd_feat"})):
        distiller(**batch())
        assert set(distiller.metrics) == names
    assert not only_l.extra_parameters()
    assert only_l.logit_weight == 30.0


@pytest.mark.parametrize(
    ("layers", "words"),
    [([1], ["WKD.HINT_LAYER", 1]), ([2, 1, -1], ["WKD.HINT_LAYERS", [2, 1, -1]])],
)
def test_the_hint_layers_are_those_of_the_config(layers, words):
    distiller = build(f"{LOSS}.WKD_FEAT_WEIGHT", 0.5, *words)
    items, want = batch(), 0.0
    projectors = [distiller.projector, *distiller.more_projectors]
    with torch.no_grad():
        own = distiller.run_student(items["image"])["feats"]
        other = distiller.run_teacher(items["image"])["feats"]
        distiller(**items)
        for layer, project in zip(layers, projectors, strict=True):
            want += textbook.wkd_maps(project(own[layer]), other[layer], 4, 2.0)
    assert distiller.metrics["wkd_feat"].item() == pytest.approx(want.item(), rel=1e-4)


def test_the_projectors_are_convolutions_with_norm_and_relu():
    for kind, sides in (("conv1x1", [1]), ("bottleneck", [1, 3, 1])):
        layers = list(moments.make_projector(kind, 4, 6, 5))
        assert [layer.kernel_size[0] for layer in layers[::3]] == sides
        assert {type(layer) for layer in layers[1::3]} == {torch.nn.BatchNorm2d}
        assert {type(layer) for layer in layers[2::3]} == {torch.nn.ReLU}
        assert len(layers) == 3 * len(sides)
        assert torch.nn.Sequential(*layers)(torch.ones(2, 4, 7, 7)).shape == (2, 6, 7, 7)


def test_the_cost_of_a_classifier_is_one_minus_cosines():
    cost = build("WKD.SHARPEN", 2.0).class_cost
    rows = torch.nn.functional.normalize(networks()[1].fc.weight.detach())
    want = 1 - torch.exp(-2 * (1 - rows @ rows.T))
    torch.testing.assert_close(cost, want, atol=1e-6, rtol=0)


def test_costs_that_nobody_has_computed_are_an_error_with_advice():
    with pytest.raises(UserError, match=r"WKD needs class_cost of its teacher .*build_distiller"):
        build("WKD.COST", "cka")(**batch())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["WKD.COST", "cosine"], "WKD.COST 'cosine' is not one of cka, cka_feats, fc"),
        ([f"{LOSS}.WKD_LOGIT_WEIGHT", 0.0], "one must be above 0"),
        ([f"{LOSS}.WKD_LOGIT_WEIGHT", -3.0], "neither may be negative"),
        (["WKD.LAMBDA", 0.0], "WKD.LAMBDA must be positive, got 0"),
        ([f"{LOSS}.WKD_FEAT_WEIGHT", 1.0, "WKD.HINT_LAYER", 9], "WKD.HINT_LAYER 9: the networks"),
        (
            [f"{LOSS}.WKD_FEAT_WEIGHT", 1.0, "WKD.HINT_LAYERS", [1, 1.5]],
            r"WKD.HINT_LAYERS \[1, 1\.5\]: the networks",
        ),
        (
            [f"{LOSS}.WKD_FEAT_WEIGHT", 1.0, "DISTILLER.TEACHER_CACHE", "memory"],
            "DISTILLER.TEACHER_CACHE memory: it remembers logits, but",
        ),
    ],
)
def test_settings_without_meaning_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        build(*words)


# What the authors state: temperature, weight of W, of F, ratio, grid, last epoch of full weights
STATED = {
    "cifar100/wkd_l/res32x4_res8x4": ("cka", 8, 600, 0, None, None, 150),
    "cifar100/wkd_f/res32x4_res8x4": (None, None, 0, 0.006, 4, 1, 150),
    "cifar100/wkd_lf/res32x4_res8x4": ("cka", 8, 200, 0.08, 8, 1, 150),
    "cifar100/wkd_l/wrn40_2_shuv1": ("cka_feats", 6, 200, 0, None, None, 150),
    "cifar100/wkd_f/wrn40_2_shuv1": (None, None, 0, 0.3, 3, 4, 150),
    "cifar100/wkd_lf/wrn40_2_shuv1": ("cka_feats", 4, 60, 0.5, 3, 4, 150),
    "imagenet/r34_r18/wkd_l": ("cka", 2, 30, 0, None, None, 0),
    "imagenet/r34_r18/wkd_f": (None, None, 0, 0.02, 2, 4, 0),
    "imagenet/r34_r18/wkd_lf": ("cka", 2, 10, 1.0, 2, 4, 0),
    "imagenet/r50_mv1/wkd_l": ("cka", 2, 25, 0, None, None, 0),
    "imagenet/r50_mv1/wkd_f": (None, None, 0, 0.005, 2, 4, 30),
    "imagenet/r50_mv1/wkd_lf": ("cka", 2, 25, 0.005, 2, 4, 30),
}


def test_the_cost_goes_by_the_teacher():
    """Features of wrn_40_2, logits of others."""
    for path in sorted((REPO / "configs" / "cifar100").glob("wkd_l*/*.yaml")):
        cfg = load_config(path)
        features = cfg.DISTILLER.TEACHER == "wrn_40_2"
        assert ("cka_feats" if features else "cka") == cfg.WKD.COST, path


@pytest.mark.parametrize("name", STATED)
def test_shipped_configs_hold_what_the_authors_state(name):
    node = load_config(REPO / "configs" / f"{name}.yaml").WKD
    found = (
        *(node.COST, node.TEMPERATURE, node.LOSS.WKD_LOGIT_WEIGHT, node.LOSS.WKD_FEAT_WEIGHT),
        *(node.RATIO, node.GRID, node.LOSS.COSINE_DECAY_EPOCH),
    )
    for value, stated in zip(found, STATED[name], strict=True):
        assert stated in (None, value)
    assert (2.0 if "r50_mv1/wkd_l" in name else 1.0) == node.SHARPEN
    assert (node.LAMBDA, node.ITERATIONS) == (0.05, 10)
