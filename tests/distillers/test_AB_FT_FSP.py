"""AB, FT, FSP and the Zoo's AT: numbers of their authors' code, the textbook, rough input."""

import pytest
import textbook_two_stage as textbook
import torch
from modern_golden import check_golden
from support import golden_values
from test_feature_losses import features, value_and_gradients

from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.distillers.FT import ft_loss
from mdistiller.registry import UserError

SHAPES = [(4, 8, 8), (6, 8, 8), (8, 4, 4)]


def signed(first_seed):
    return [2 * golden_values((8, *shape), first_seed + i) for i, shape in enumerate(SHAPES)]


# methods.md section 10
S, T = signed(11), signed(21)
RELU_S, RELU_T = [x.relu() for x in S], [x.relu() for x in T]
FACTOR_S, FACTOR_T = [golden_values((8, 5, 8, 8), 111)], [golden_values((8, 7, 4, 4), 112)]
EQUAL_S, WIDE_T = [golden_values((8, 7, 4, 4), 111)], [golden_values((8, 7, 8, 8), 112)]


def ft(p=1, form="attention"):
    return lambda s, t: ft_loss(s[0], t[0], p, form)


GOLDEN = {
    "AB": (S, T, ab_loss, 1.55761521, [0.009897132, 0.02434446, 0.02755547]),
    "AB mean": (S, T, lambda s, t: ab_loss(s, t, 2, "mean"), 3.54691083,
                [0.02784386, 0.02279727, 0.03884156]),
    "FSP": (RELU_S, RELU_T, fsp_loss, 0.0219286233, [0.001357584, 0.002530465, 0.003115996]),
    "FSP mean": (RELU_S, RELU_T, lambda s, t: fsp_loss(s, t, "mean"), 0.0109643116,
                 [0.000678792, 0.001265233, 0.001557998]),
    "FT": (FACTOR_S, FACTOR_T, ft(), 0.115444155, [0.0277819]),
    "FT squared": (FACTOR_S, FACTOR_T, ft(2), 0.0210307392, [0.007845893]),
    "FT factor": (EQUAL_S, FACTOR_T, ft(1, "factor"), 0.161935487, [0.002769944]),
    "AT mean": (FACTOR_S, WIDE_T, lambda s, t: at_loss(s, t, 2, "mean"), 0.00445164417,
                [0.0009686527]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_value_and_gradients_equal_the_authors(name):
    students, teachers, loss, want, norms = GOLDEN[name]
    value, gradients = value_and_gradients(loss, students, teachers)
    assert value.shape == ()
    assert value.item() == pytest.approx(want, rel=1e-8)
    assert [g.norm().item() for g in gradients] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_stages_of_ab_weigh_as_recorded(i):
    want = (0.261208571, 0.790203843, 0.506202801)[i]
    halvings = 2 - i  # alone, a stage is the last, of weight 1
    assert ab_loss(S[i : i + 1], T[i : i + 1]).item() / 2**halvings == pytest.approx(want)


@pytest.mark.parametrize("i", [0, 1])
def test_pairs_of_fsp_are_those_recorded(i):
    want = (0.00793797713, 0.0139906461)[i]
    got = fsp_loss(RELU_S[i : i + 2], RELU_T[i : i + 2])
    assert got.item() == pytest.approx(want)


@pytest.mark.parametrize(("case", "form"), [("fsp_sum", "sum"), ("fsp_mean", "mean")])
def test_fsp_equals_the_other_record(case, form):
    def loss(t, h):
        return fsp_loss([t[f"fs{i}"] for i in (1, 2, 3)], [t[f"ft{i}"] for i in (1, 2, 3)], form)

    check_golden(case, loss)


@pytest.mark.parametrize(("case", "form"), [("at_sum", "sum"), ("at_zoo", "mean")])
def test_at_equals_the_other_record(case, form):
    def loss(t, h):
        return at_loss([t["fs2"], t["fs3"]], [t["ft2"], t["ft3"]], h["p"], form)

    check_golden(case, loss)


UNLIKE = [(4, 12, 12), (6, 8, 8), (8, 4, 4)], [(4, 8, 8), (6, 16, 16), (8, 4, 4)]
TEXTBOOK = {
    "AB": (lambda s, t: ab_loss(s, t, 0.7), lambda s, t: textbook.ab(s, t, 0.7, "sum"),
           SHAPES, SHAPES),
    "AB mean": (lambda s, t: ab_loss(s, t, 2.0, "mean"),
                lambda s, t: textbook.ab(s, t, 2.0, "mean"), SHAPES, SHAPES),
    "FSP": (fsp_loss, lambda s, t: textbook.fsp(s, t, "sum"), *UNLIKE),
    "FSP mean": (lambda s, t: fsp_loss(s, t, "mean"), lambda s, t: textbook.fsp(s, t, "mean"),
                 *UNLIKE),
    "FT": (ft(), lambda s, t: textbook.ft(s[0], t[0], 1, "attention"), [(4, 8, 8)], [(6, 4, 4)]),
    "FT factor": (ft(2, "factor"), lambda s, t: textbook.ft(s[0], t[0], 2, "factor"),
                  [(6, 4, 4)], [(6, 8, 8)]),
    "AT mean": (lambda s, t: at_loss(s, t, 2, "mean"), textbook.at_mean, *UNLIKE),
    "AT mean p=1": (lambda s, t: at_loss(s, t, 1, "mean"),
                    lambda s, t: textbook.at_mean(s, t, 1), *UNLIKE),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_value_and_gradients_equal_the_textbook(name):
    loss, reference, s_shapes, t_shapes = TEXTBOOK[name]
    students, teachers = features(s_shapes, 1), features(t_shapes, 2)
    value, gradients = value_and_gradients(loss, students, teachers)
    want, wanted = value_and_gradients(reference, students, teachers)
    assert value.item() == pytest.approx(want.item(), rel=1e-10)
    for got, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-14)


def test_ab_leaves_neurons_alone_that_are_beyond_the_margin():
    teacher = torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1, 1)
    student = torch.tensor([1.0, -1.0, -1.5]).view(1, 3, 1, 1).requires_grad_()
    loss = ab_loss([student], [teacher], 1.0)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
    near = torch.tensor([0.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    ab_loss([near], [teacher], 1.0).backward()
    assert near.grad.flatten().sign().tolist() == [-1, 1, 1]  # the teacher's 0 is not active


def test_ab_averages_a_larger_map_of_the_teacher():
    student, teacher = features([(3, 4, 4)], 1)[0], features([(3, 8, 8)], 2)[0]
    pooled = torch.nn.functional.avg_pool2d(teacher, 2)
    assert ab_loss([student], [teacher]) == ab_loss([student], [pooled])


@pytest.mark.parametrize("loss", [ab_loss, fsp_loss, at_loss])
def test_an_unknown_form_is_refused(loss):
    maps = features(SHAPES, 1)
    with pytest.raises(UserError, match="form 'mine' is not one of sum, mean"):
        loss(maps, maps, *([] if loss is fsp_loss else [1]), form="mine")
