"""CTKD: the learned temperature, its reversed gradient, its weight decay, and a resumed run."""

import math

import pytest
import torch
from modern_golden import CASES, check_golden, golden_inputs
from support import golden_values
from test_distillers import batch, networks

from mdistiller.distillers import get_distiller
from mdistiller.distillers.CTKD import instance_kd_loss, reversal, scale_gradient
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.cfg import default_config
from mdistiller.engine.optim import build_optimizer

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
TARGET = torch.arange(8)


def build(*overrides, name="CTKD"):
    cfg = default_config()
    cfg.merge_from_list(overrides)
    return get_distiller(name).build(*networks(), cfg, 50, (32, 32)).train()


def losses_at(distiller, epoch):
    """The distillation loss after its backward pass."""
    distiller.zero_grad(set_to_none=True)
    image = batch()["image"].to(next(distiller.parameters()).dtype)
    loss = distiller(**{**batch(), "image": image, "epoch": epoch})[1]["loss_kd"]
    loss.backward()
    return loss.item()


def golden_loss(t, h):
    raw = scale_gradient(t["param"], reversal(h["epoch"], h["loops"]))
    return kd_loss(t["zs"], t["zt"], h["t_start"] + h["t_range"] * raw.sigmoid())


@pytest.mark.parametrize("case", ["ctkd_kd_e1", "ctkd_kd_e3", "ctkd_kd_e10"])
def test_value_and_gradients_are_the_recorded(case):
    check_golden(case, golden_loss)
    hyper, extra = CASES[case]["hyper"], CASES[case]["extra"]
    assert reversal(hyper["epoch"], hyper["loops"]) == pytest.approx(hyper["coefficient"])
    # the teacher's softmax has its part in the gradient: without it another number is recorded
    tensors = golden_inputs(case)
    (got,) = torch.autograd.grad(golden_loss(tensors, hyper), tensors["param"])
    assert abs(got.item() - extra["grad_param_without_teacher_path"]) > 1e-3 * abs(got.item())


def test_reversal_grows_to_its_full_size_and_stays():
    assert [reversal(e, 4) for e in (1, 2, 4, 100)] == pytest.approx(
        [-(1 - math.cos(math.pi / 4)) / 2, -0.5, -1, -1]
    )
    assert reversal(1, 0) == -1


@pytest.mark.parametrize("base", ["kd", "dkd"])
@pytest.mark.parametrize("mode", ["global", "instance"])
def test_the_temperature_climbs_the_loss_and_the_student_does_not_notice(mode, base):
    distiller = build("CTKD.MODE", mode, "CTKD.BASE", base).double()
    late = losses_at(distiller, 10)
    slopes = [p.grad.clone() for p in distiller.temperature.parameters()]
    student = [p.grad.clone() for p in distiller.student.parameters()]
    assert losses_at(distiller, 1) == late
    for at_first, slope in zip(distiller.temperature.parameters(), slopes, strict=True):
        torch.testing.assert_close(at_first.grad, -reversal(1, 10) * slope)
    for at_first, slope in zip(distiller.student.parameters(), student, strict=True):
        assert torch.equal(at_first.grad, slope)
    with torch.no_grad():  # a step down the reversed gradient is a step up the loss
        for parameter, slope in zip(distiller.temperature.parameters(), slopes, strict=True):
            parameter -= 0.1 * slope
    assert losses_at(distiller, 10) > late


def test_loops_of_zero_reverse_at_once():
    distiller, usual = build("CTKD.LOOPS", 0), build()
    losses_at(distiller, 1)
    losses_at(usual, 10)
    assert distiller.temperature.value.grad.item() == usual.temperature.value.grad.item() != 0


def test_the_bases_weights_and_metric():
    """At the start T is 1 + 20 sigmoid(1) for every sample, in both modes."""
    temperature = 1 + 20 / (1 + math.exp(-1))
    net, teacher = networks()
    z, v = (n.train(mode)(batch()["image"])[0] for n, mode in ((net, True), (teacher, False)))
    overrides = ["CTKD.LOSS.KD_WEIGHT", 3.0, "CTKD.ALPHA", 0.5, "CTKD.BETA", 4.0]
    kd = kd_loss(z, v, temperature)
    dkd = dkd_loss(z, v, batch()["target"], 0.5, 4.0, temperature)
    for mode in ("global", "instance"):
        for base, want in (("kd", kd), ("dkd", dkd)):
            distiller = build(*overrides, "CTKD.MODE", mode, "CTKD.BASE", base)
            rel = 2e-3 if (mode, base) == ("instance", "kd") else 1e-5  # 1e-7 on probabilities
            assert losses_at(distiller, 5) == pytest.approx(3 * want.item(), rel=rel)
            assert distiller.metrics["temperature"].item() == pytest.approx(temperature)
    warm = build(*overrides, "CTKD.WARMUP", 10)
    assert losses_at(warm, 5) == pytest.approx(1.5 * kd.item(), rel=1e-5)


def instance_by_hand(student, teacher, temperatures, eps=1e-7):
    """The instance-wise loss sample by sample, in Python floats."""

    def soft(row, t):
        total = sum(math.exp(v / t) for v in row)
        return [math.exp(v / t) / total for v in row]

    rows = [
        t * t
        * sum(
            (p + eps) * (math.log(p + eps) - math.log(q))
            for p, q in zip(soft(v, t), soft(z, t), strict=True)
        )
        for z, v, t in zip(student.tolist(), teacher.tolist(), temperatures.tolist(), strict=True)
    ]  # fmt: skip
    return sum(rows) / len(rows)


def test_instance_loss_and_its_gradient_by_hand():
    temperatures = torch.linspace(1.5, 15, 8, dtype=torch.float64)
    student, t = STUDENT.clone().requires_grad_(), temperatures[:, None].requires_grad_()
    value = instance_kd_loss(student, TEACHER, t)
    value.backward()
    assert value.item() == pytest.approx(instance_by_hand(STUDENT, TEACHER, temperatures), rel=1e-9)
    step = 1e-5
    for row, column in ((0, 3), (5, 9)):
        sides = []
        for sign in (1, -1):
            moved = STUDENT.clone()
            moved[row, column] += sign * step
            sides.append(instance_by_hand(moved, TEACHER, temperatures.detach()))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert student.grad[row, column].item() == pytest.approx(slope, rel=1e-6)
        sides = []
        for sign in (1, -1):
            moved = temperatures.detach().clone()
            moved[row] += sign * step
            sides.append(instance_by_hand(STUDENT, TEACHER, moved))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert t.grad[row].item() == pytest.approx(slope, rel=1e-6)


def test_dkd_with_a_temperature_for_every_sample_is_the_mean_of_the_samples():
    temperatures = torch.linspace(1.5, 15, 8, dtype=torch.float64)[:, None]
    got = dkd_loss(STUDENT, TEACHER, TARGET, 1.0, 2.0, temperatures)
    rows = [
        dkd_loss(STUDENT[n, None], TEACHER[n, None], TARGET[n, None], 1.0, 2.0, t.item())
        for n, t in enumerate(temperatures)
    ]
    assert got.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-9)


def test_the_networks_get_no_gradient_through_the_instance_temperature():
    distiller = build("CTKD.MODE", "instance")
    torch.nn.init.normal_(distiller.temperature.out.weight)
    losses_at(distiller, 10)
    before = [p.grad.clone() for p in distiller.student.parameters()]
    fixed = distiller.temperature
    distiller.temperature = torch.nn.Identity()
    distiller.temperature.forward = lambda *logits: fixed(*logits).detach()
    losses_at(distiller, 10)
    after = [p.grad for p in distiller.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["CTKD", "CTKD+CRD"])
def test_the_temperature_has_its_own_weight_decay(name):
    distiller = build("CTKD.PARAM_WD", 0.25, "CRD.NCE.K", 8, name=name)
    part = distiller.parts["CTKD"] if "+" in name else distiller
    optimizer = build_optimizer(distiller.param_groups(), default_config().SOLVER)
    rest, own = optimizer.param_groups
    assert [id(p) for p in own["params"]] == [id(part.temperature.value)]
    assert (own["weight_decay"], rest["weight_decay"]) == (0.25, 0.0001)
    listed = {id(p) for group in (rest, own) for p in group["params"]}
    assert listed == {id(p) for p in distiller.get_learnable_parameters()}
    saved = [key for key in distiller.state_dict() if key.endswith("temperature.value")]
    assert len(saved) == 1  # a resumed run goes on with it
