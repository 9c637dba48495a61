"""The logit and feature losses that were here before, against the recorded values."""

import pytest
from modern_golden import check_golden

from mdistiller.distillers.CC import cc_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.LOGITS import logits_loss


@pytest.mark.parametrize("case", ["kd_T4", "soft_target_T4"])
def test_kd(case):
    check_golden(case, lambda t, h: kd_loss(t["zs"], t["zt"], h["temperature"]))


@pytest.mark.parametrize("case", ["dkd_T4", "dkd_T1_extreme"])
def test_dkd(case):
    def loss(t, h):
        student = t["zs"] * h.get("student_scale", 1.0)
        return dkd_loss(student, t["zt"], t["y"], h["alpha"], h["beta"], h["temperature"])

    check_golden(case, loss)


def test_logits():
    check_golden("logit_mse", lambda t, h: logits_loss(t["zs"], t["zt"]))


def test_cc():
    check_golden("cc_neighbour", lambda t, h: cc_loss(t["es"], t["et"]))
    check_golden("cc_rbf", lambda t, h: cc_loss(t["es"], t["et"], form="kernel"))
