"""The modern logit losses on rough input: finite, and of a gradient that shows no division by 0."""

import pytest
import torch
from support import saved_teacher, write_config
from test_distillers import batch, networks
from test_logit_losses import hostile_logits

from mdistiller.cli import train as train_command
from mdistiller.distillers import get_distiller
from mdistiller.distillers.CTKD import instance_kd_loss
from mdistiller.distillers.DGKD import dgkd_loss
from mdistiller.distillers.DIST import dist_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.helpers.standardize import standardize
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.TTM import ttm_loss
from mdistiller.distillers.USKD import uskd_terms
from mdistiller.engine.cfg import default_config

TARGET = torch.full((5,), 3)


def learned(loss):
    """A loss at a trained temperature, whose gradient has to be finite as well."""

    def at(student, teacher):
        raw = torch.ones(5, 1, requires_grad=True)
        value = loss(student, teacher, 1 + 20 * raw.sigmoid())
        (slope,) = torch.autograd.grad(value, raw, retain_graph=True)
        assert torch.isfinite(slope).all()
        return value

    return at


def dgkd(term, epsilon=6.0):
    return lambda s, t: dgkd_loss(s, t, TARGET, 1.0, 8.0, epsilon, 4.0, term)


LOSSES = {
    "DIST tau=4": lambda s, t: dist_loss(s, t, tau=4.0),
    "DIST tau=1": dist_loss,
    "NKD": lambda s, t: nkd_loss(s, t, TARGET, 1.0, 1.5),
    "NKD T=3": lambda s, t: nkd_loss(s, t, TARGET, 3.0, 3.5),
    "USKD": lambda s, t: sum(uskd_terms(s, t, TARGET)),
    "USKD prob": lambda s, t: sum(uskd_terms(s, t, TARGET, "prob")),
    "TTM": lambda s, t: ttm_loss(s, t, 0.1),
    "WTTM": lambda s, t: ttm_loss(s, t, 0.1, weighted=True),
    "DGKD": dgkd("log"),
    "DGKD plain": dgkd("plain"),
    "CTKD": learned(lambda s, t, at: kd_loss(s, t, at.mean())),
    "CTKD dkd": learned(lambda s, t, at: dkd_loss(s, t, TARGET, 1.0, 2.0, at)),
    "CTKD instance": learned(instance_kd_loss),
    "LSKD": lambda s, t: kd_loss(standardize(s), standardize(t), 2.0),
    "LSKD DIST": lambda s, t: dist_loss(standardize(s), standardize(t)),
}


def inputs():
    noise = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    return {**hostile_logits(), "random": noise, "1e4-fold": 1e4 * noise}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite(name, dtype):
    limits = torch.finfo(dtype).min, torch.finfo(dtype).max
    for student_kind, rows in inputs().items():
        for teacher_kind, others in inputs().items():
            student = rows.clamp(*limits).to(dtype).requires_grad_()
            value = LOSSES[name](student, others.clamp(*limits).to(dtype))
            value.backward()
            where = student_kind, teacher_kind
            assert value.dtype == torch.float32
            assert torch.isfinite(value), where
            assert torch.isfinite(student.grad).all(), where
            assert student.grad.abs().max() < 3e3, where  # 1e-7 or so in a denominator shows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DIST", "CTKD", "NKD", "USKD", "TTM", "WTTM", "DGKD"])
def test_under_autocast_the_loss_is_that_of_the_networks_outputs_in_float32(name, dtype):
    """The terms come out in float32, near those of a float32 step."""
    values = []
    for enabled in (True, False):
        distiller = get_distiller(name).build(*networks(), default_config(), 50, (32, 32)).train()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            _, losses = distiller(**batch())
        total = sum(losses.values())
        total.backward()
        assert total.dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() for p in distiller.get_learnable_parameters())
        values.append(total.item())
    assert values[0] == pytest.approx(values[1], rel=0.05)


@pytest.mark.parametrize(
    "words",
    [
        *("DIST", "CTKD", "NKD", "USKD", "TTM", "WTTM", "DGKD"),
        "CTKD CTKD.MODE instance CTKD.BASE dkd LSKD.ENABLE True",
        "DKD DKD.MODE nckd LSKD.ENABLE True",
    ],
)
def test_one_command_trains_an_epoch(tmp_path, words):
    method, *overrides = words.split()
    config = write_config(
        tmp_path,
        method=method,
        student="BabyStudent",
        epochs=1,
        TEACHER="BabyTeacher",
        TEACHER_CKPT=str(saved_teacher(tmp_path, "BabyTeacher")),
    )
    # Untrained networks say nearly the same of all images, where DIST's gradient is largest: at the
    # toy's rate of 0.05 a run may diverge.
    words = [*overrides, "SOLVER.LR", "0.001", "EXPERIMENT.NAME", "run"]
    assert train_command.main(["--cfg", str(config), *words]) == 0
    state = torch.load(tmp_path / "out" / "toy" / "run" / "latest", weights_only=True)
    assert state["epoch"] == 1
    assert 0 < abs(state["history"][0]["train_loss_kd"]) < 1e4  # DGKD's may be negative
