"""Optimizers and schedules from a config."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import load_config
from mdistiller.engine.optim import build_optimizer, build_scheduler


def rates(epochs, **solver):
    """Learning rate of each epoch."""
    words = [word for key, value in solver.items() for word in (f"SOLVER.{key}", str(value))]
    node = load_config("", ["SOLVER.EPOCHS", str(epochs), "SOLVER.LR", "1.0", *words]).SOLVER
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], node)
    scheduler = build_scheduler(optimizer, node)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "dot"])
@pytest.mark.parametrize("norms", [True, False])
def test_norms_and_biases_decay_unless_told_otherwise(kind, norms):
    """With gradients of zero only weight decay moves anything."""
    words = ["SOLVER.NORM_DECAY", norms, "SOLVER.LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.5]
    words += ["SOLVER.TRAINER", "dot"] if kind == "dot" else ["SOLVER.TYPE", kind]
    cfg = load_config("", words)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    own = {"params": list(net.parameters()), "weight_decay": 0.5}
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = SimpleNamespace(param_groups=lambda: [own])
    optimizer = trainer.init_optimizer(cfg)
    before = [param.detach().clone() for param in net.parameters()]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    if kind == "dot":
        optimizer.step_kd()
    optimizer.step()
    moved = [
        not torch.equal(old, param) for old, param in zip(before, net.parameters(), strict=True)
    ]
    assert moved == [True, norms, norms, False]  # the norm's bias is 0 and stays


def test_schedules():
    assert rates(5, LR_DECAY_STAGES="[2,4]") == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert rates(3, SCHEDULE="constant") == [1, 1, 1]
    cosine = [0.5 * (1 + np.cos(np.pi * e / 4)) for e in range(4)]
    assert rates(4, SCHEDULE="cosine") == pytest.approx(cosine)
    assert rates(6, SCHEDULE="cosine", WARMUP_EPOCHS=2) == pytest.approx([1 / 3, 2 / 3, *cosine])
    warm = rates(5, LR_DECAY_STAGES="[3]", WARMUP_EPOCHS=2)
    assert warm == pytest.approx([1 / 3, 2 / 3, 1, 0.1, 0.1])
