"""KD and DKD against literal numbers of the original and an independent float64 reference."""

import math

import pytest
import torch
from support import golden_values

from mdistiller.distillers.DKD import dkd_loss, dkd_terms
from mdistiller.distillers.KD import kd_loss

# methods.md section 10: logits 4G([8,10],1) and 6G([8,10],2), targets 0..7
STUDENT, TEACHER, TARGET = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2), range(8)


def value_and_gradient_norm(loss):
    student = STUDENT.clone().requires_grad_()
    value = loss(student, TEACHER, torch.tensor(TARGET))
    value.backward()
    return value.item(), student.grad.norm().item()


@pytest.mark.parametrize(
    ("temperature", "want"), [(1, (3.44972102, 0.304369)), (4, (9.23463012, 0.4851301))]
)
def test_kd_equals_the_original(temperature, want):
    got = value_and_gradient_norm(lambda s, t, y: kd_loss(s, t, temperature))
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "want"),
    [
        (1, 8, 4, (72.82914, 3.945475)),
        (1, 0, 4, (1.70279523, 0.2321828)),
        (0, 1, 4, (8.89079309, 0.4911792)),
        (1, 0.5, 1, (2.92363133, 0.2669072)),
    ],
)
def test_dkd_equals_the_original(alpha, beta, temperature, want):
    got = value_and_gradient_norm(lambda s, t, y: dkd_loss(s, t, y, alpha, beta, temperature))
    assert got == pytest.approx(want, rel=1e-6)


def reference(student, teacher, target, alpha, beta, temperature):
    """DKD sample by sample in Python floats, on log-probabilities."""

    def log_parts(row, y):
        row = [value / temperature for value in row]

        def lse(values):
            top = max(values)
            return top + math.log(sum(math.exp(v - top) for v in values))

        rest = [v for j, v in enumerate(row) if j != y]
        return row[y] - lse(row), lse(rest) - lse(row), [v - lse(rest) for v in rest]

    total, count = 0.0, 0
    for s_row, t_row, y in zip(student.tolist(), teacher.tolist(), target, strict=True):
        if y == -100:
            continue
        count += 1
        (s_y, s_not, s_rest), (t_y, t_not, t_rest) = log_parts(s_row, y), log_parts(t_row, y)
        binary = math.exp(t_y) * (t_y - s_y) + math.exp(t_not) * (t_not - s_not)
        within = sum(math.exp(t) * (t - s) for s, t in zip(s_rest, t_rest, strict=True))
        total += alpha * binary + beta * within
    return total * temperature**2 / count


@pytest.mark.parametrize("scale", [1, 30, 1000, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_dkd_in_float32_stays_right_for_extreme_logits(scale, temperature):
    student, teacher = (scale * part for part in (STUDENT, TEACHER))
    got = dkd_loss(student.float(), teacher.float(), torch.tensor(TARGET), 1.0, 8.0, temperature)
    want = reference(student, teacher, TARGET, 1.0, 8.0, temperature)
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student, teacher = (60 * part.to(dtype) for part in (STUDENT, TEACHER))
    target = torch.tensor(TARGET)
    got = dkd_loss(student, teacher, target, 1.0, 8.0, 1.0)
    assert got.dtype == torch.float32
    want = dkd_loss(student.double(), teacher.double(), target, 1.0, 8.0, 1.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_two_classes_leave_only_the_target_term():
    student = STUDENT[:, :2].clone().requires_grad_()
    target = torch.tensor([0, 1] * 4)
    tckd, nckd = dkd_terms(student, TEACHER[:, :2], target, 4.0)
    (gradient,) = torch.autograd.grad(nckd, student, retain_graph=True)
    assert nckd == 0
    assert not gradient.any()
    assert tckd.item() == pytest.approx(kd_loss(student, TEACHER[:, :2], 4.0).item(), rel=1e-9)


def test_kd_is_target_term_plus_weighted_rest():
    """The paper's identity, for one sample: KD = TCKD + (1 - p_t) NCKD."""
    for n, y in enumerate(TARGET):
        row = slice(n, n + 1)
        tckd, nckd = dkd_terms(STUDENT[row], TEACHER[row], torch.tensor([y]), 4.0)
        rest = 1 - (TEACHER[row] / 4.0).softmax(1)[0, y]
        want = kd_loss(STUDENT[row], TEACHER[row], 4.0)
        assert (tckd + rest * nckd).item() == pytest.approx(want.item(), rel=1e-9)


def test_unlabelled_rows_count_neither_in_sum_nor_in_mean():
    target = torch.tensor([0, -100, 2, 3, -100, 5, 6, 7])
    got = dkd_loss(STUDENT, TEACHER, target, 1.0, 8.0, 4.0).item()
    assert got == pytest.approx(reference(STUDENT, TEACHER, target.tolist(), 1.0, 8.0, 4.0))
    student = STUDENT.clone().requires_grad_()
    nothing = dkd_loss(student, TEACHER, torch.full((8,), -100), 1.0, 8.0, 4.0)
    nothing.backward()
    assert nothing == 0
    assert not student.grad.any()


def test_equal_networks_have_nothing_to_distil():
    target = torch.tensor(TARGET)
    student = STUDENT.clone().requires_grad_()
    loss = kd_loss(student, STUDENT, 4.0) + dkd_loss(student, STUDENT, target, 1.0, 8.0, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12
