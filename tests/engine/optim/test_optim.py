"""Optimizers and schedules from a config."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import same_state, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import load_config
from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.optim.schedules import build_scheduler
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import UserError


class StoppedError(Exception):
    """What a test stops a run by."""


def solver(epochs, **more):
    words = [word for key, value in more.items() for word in (f"SOLVER.{key}", str(value))]
    return load_config("", ["SOLVER.EPOCHS", str(epochs), "SOLVER.LR", "1.0", *words]).SOLVER


def parameter():
    return torch.nn.Parameter(torch.zeros(2, 2))


def rates(epochs, **more):
    """Learning rate of each epoch."""
    node = solver(epochs, **more)
    return walk(node, build_optimizer([{"params": [parameter()]}], node), epochs)


def walk(node, optimizer, steps, **more):
    scheduler = build_scheduler(optimizer, node, **more)
    seen = []
    for _ in range(steps):
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


@pytest.mark.parametrize("epochs", [{"SCHEDULE": "cosine", "WARMUP_EPOCHS": 1}, {}])
def test_a_schedule_by_step_passes_through_the_same_rates(epochs):
    """The rate before step 10 k is that of epoch k; of multistep also those between."""
    by_epoch = rates(6, LR_DECAY_STAGES="[2, 4]", **epochs)
    node = solver(6, LR_DECAY_STAGES="[2, 4]", SCHEDULE_BY="step", **epochs)
    by_step = walk(node, build_optimizer([{"params": [parameter()]}], node), 60, per_epoch=10)
    start = 1 if epochs else 0  # a warm-up by step begins lower
    assert by_step[10 * start :: 10] == pytest.approx(by_epoch[start:])
    assert by_step[0] == pytest.approx(1 / 11 if epochs else 1.0)
    assert len(set(by_step)) == (60 if epochs else 3)


def test_a_name_of_timm_is_timms_optimizer_and_ours_stay_ours():
    def made(name, **more):
        return build_optimizer([{"params": [parameter()]}], solver(1, TYPE=name, **more))

    lion = made("Lion", LR=0.3, WEIGHT_DECAY=0.2, OPTIMIZER_ARGS="{'betas': [0.95, 0.98]}")
    assert type(lion).__module__ == "timm.optim.lion"
    assert [lion.defaults[key] for key in ("lr", "weight_decay")] == [0.3, 0.2]
    assert list(lion.defaults["betas"]) == [0.95, 0.98]
    assert made("muon", MOMENTUM=0.8).defaults["momentum"] == 0.8
    assert not made("sgd").defaults["nesterov"]  # timm's has it
    assert type(made("adamw")) is torch.optim.AdamW
    assert made("AdamW", OPTIMIZER_ARGS="{'eps': 1e-5}").defaults["eps"] == 1e-5
    for name, more, message in (
        ("lyon", {}, r"unknown optimizer \(SOLVER.TYPE\) 'lyon'; did you mean 'lion'"),
        ("adahessian", {}, "needs second derivatives"),
        (
            "lion",
            {"OPTIMIZER_ARGS": "{'beta': 1}"},
            r"lion with OPTIMIZER_ARGS {'beta': 1}: ",
        ),
        ("lion", {"OPTIMIZER_ARGS": "{'eps': 1}"}, "OPTIMIZER_ARGS eps has no effect on"),
        ("SGD", {"OPTIMIZER_ARGS": "{'lr': 1}"}, "multiple values for keyword argument 'lr'"),
    ):
        with pytest.raises(UserError, match=message):
            made(name, **more)


def test_a_run_by_step_with_groups_resumes_to_the_bit(tmp_path, monkeypatch):
    """From a checkpoint within the second epoch."""
    text = "SOLVER: {TYPE: lion, LR: 0.001, SCHEDULE: cosine, SCHEDULE_BY: step, ACCUMULATE: 2, "
    text += "LR_BY_NAME: ['layer1=0.5'], FREEZE: [conv1]}\n"

    def train(name, *words):
        config = write_config(tmp_path, text, epochs=2)
        return train_command.main(["--cfg", str(config), "EXPERIMENT.NAME", name, *words])

    def stop(self, data, epoch, meters):
        if (epoch, self.step) == (2, 4):
            raise StoppedError
        return train_iter(self, data, epoch, meters)

    assert train("whole") == 0
    train_iter = BaseTrainer.train_iter
    with monkeypatch.context() as patch:
        patch.setattr(BaseTrainer, "train_iter", stop)
        with pytest.raises(StoppedError):
            train("parts", "LOG.SAVE_EVERY_MINUTES", "1e-9")
    runs = [tmp_path / "out" / "toy" / name / "latest" for name in ("whole", "parts")]
    assert torch.load(runs[1], weights_only=True)["position"]["updates"] == 1
    assert train("parts", "--resume") == 0
    whole, parts = (torch.load(run, weights_only=True) for run in runs)
    assert same_state(whole["model"], parts["model"])
    last = 0.0005 * (1 + np.cos(np.pi * 5 / 6))  # before the sixth step
    rates_left = [group["lr"] for group in parts["optimizer"]["param_groups"]]
    assert rates_left == pytest.approx([last, last / 2])
