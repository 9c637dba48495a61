"""DISTILLER.TYPE "KD+DKD": what the sum shares, and what it refuses."""

import pytest
import torch
from test_distillers import batch, networks

from mdistiller.distillers import DISTILLERS, Distiller, get_distiller
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError

FACTS = {"num_data": 50, "image_size": (32, 32), "targets": torch.arange(50) % 10}


def build(name, *overrides):
    cfg = default_config()
    cfg.merge_from_list(overrides)
    return get_distiller(name).build(*networks(), cfg, **FACTS).train()


def test_the_terms_add_up_over_one_cross_entropy():
    overrides = ["DISTILLER.CE_WEIGHT", 0.3, "KD.LOSS.KD_WEIGHT", 2.0, "DKD.BETA", 4.0]
    _, both = build("KD+DKD", *overrides)(**batch())
    _, kd = build("KD", *overrides)(**batch())
    _, dkd = build("DKD", *overrides)(**batch())
    assert set(both) == {"loss_ce", "loss_kd"}
    assert both["loss_kd"].item() == pytest.approx((kd["loss_kd"] + dkd["loss_kd"]).item())
    assert both["loss_ce"].item() == pytest.approx(0.3 * dkd["loss_ce"].item())


def test_each_network_runs_once_and_is_saved_once():
    distiller = build("KD + DKD")
    calls = []
    for role in ("student", "teacher"):
        net = getattr(distiller, role)
        net.register_forward_hook(lambda *_, role=role: calls.append(role))
    distiller(**batch())
    assert sorted(calls) == ["student", "teacher"]
    names = {key.split(".")[0] for key in distiller.state_dict()}
    assert names == {"student", "teacher"}
    assert len(distiller.get_learnable_parameters()) == len(list(distiller.student.parameters()))
    assert not distiller.teacher.training
    assert {"tckd", "loss_KD", "loss_DKD"} <= set(distiller.metrics)


def test_modules_and_wishes_of_the_parts_are_kept():
    distiller = build("KD+OFD+CRD")
    assert distiller.teacher.training  # OFD's wish, whatever the others say
    assert not distiller.eval().teacher.training
    distiller.train()
    alone = [build(name).get_extra_parameters() for name in ("OFD", "CRD")]
    learnable = len(distiller.extra_parameters())
    assert learnable == sum(len(build(name).extra_parameters()) for name in ("OFD", "CRD"))
    assert distiller.get_extra_parameters() <= sum(alone)
    state = distiller.state_dict()
    assert any(key.startswith("parts.CRD.contrast.memory_v1") for key in state)
    assert "parts.CRD.contrast." in distiller.own_state
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())


def test_what_cannot_be_combined_says_so():
    class Own(Distiller):
        def forward_train(self, image, target, **batch):
            raise AssertionError

    DISTILLERS["OWN"] = Own
    try:
        for name, says in (
            ("KD+NONE", "NONE cannot be combined, since it has no teacher"),
            ("KD+OWN", "OWN cannot be combined, since it has a training step of its own"),
            ("KD+KD", "names a method twice"),
            ("KD+ATT", "unknown distiller"),
        ):
            with pytest.raises(UserError, match=says):
                get_distiller(name)
    finally:
        del DISTILLERS["OWN"]
