"""DOT against the numbers of methods.md section 10, and its trainer on real digits."""

import json

import pytest
import torch
from support import golden_values, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine.cfg import load_config
from mdistiller.engine.dot import DistillationOrientedTrainer

AFTER = {
    1: "-0.110630772 0.092123712 0.323437026  0.924850501 -0.830145792 -0.571109122 "
    "-0.079060895 0.136347542 0.396143636",
    4: "-0.156462065 -0.00455957 0.410903474  0.800925849 -0.666519069 -0.460828962 "
    "-0.068775572 0.119168148 0.322081326",
}


def test_four_steps_on_shared_task_only_and_kd_only_parameters():
    a, b, c = (golden_values((3,), seed).requires_grad_() for seed in (1, 2, 3))
    dot = DistillationOrientedTrainer(
        [a, b, c], lr=0.1, momentum=0.825, momentum_kd=0.975, weight_decay=5e-4
    )
    for t in range(1, 5):
        dot.param_groups[0]["lr"] = 0.1 if t <= 2 else 0.01
        w, u = golden_values((3,), 10 + t), golden_values((3,), 20 + t)
        dot.zero_grad()
        ((a * w).sin() + (c * u) ** 2).sum().backward()
        dot.step_kd()
        dot.zero_grad()
        ((a - u) ** 2 + (b * w) ** 2).sum().backward()
        dot.step()
        if t in AFTER:
            want = torch.tensor([float(x) for x in AFTER[t].split()], dtype=torch.float64)
            torch.testing.assert_close(torch.cat([a, b, c]).detach(), want, rtol=0, atol=1e-8)
    assert set(dot.state[a]) == {"momentum_buffer", "momentum_kd_buffer"}
    assert set(dot.state[b]) == {"momentum_buffer"}
    assert set(dot.state[c]) == {"momentum_kd_buffer"}


@pytest.mark.parametrize("name", ["lr", "momentum", "momentum_kd", "weight_decay"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        DistillationOrientedTrainer([torch.zeros(1)], **{"lr": 0.1, name: -1.0})


def kd_settings(folder, student="resnet8", epochs=1):
    teacher = str(saved_teacher(folder))
    return {
        "method": "KD",
        "student": student,
        "epochs": epochs,
        "TEACHER": "resnet8",
        "TEACHER_CKPT": teacher,
    }


def rows(folder):
    log = folder / "out" / "toy" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def train(folder, text, **settings):
    folder.mkdir(exist_ok=True)
    config = write_config(folder, text=text, **settings)
    assert train_command.main(["--cfg", str(config)]) == 0
    return rows(folder)


def test_without_difference_of_momenta_the_step_is_that_of_two_sgds(tmp_path):
    """With Delta = 0 and no weight decay, V_task + V_kd is the buffer of SGD on the summed loss."""
    text = "SOLVER:\n  TRAINER: {}\n  WEIGHT_DECAY: 0.0\n  DOT: {{DELTA: 0.0}}\n"
    plain = train(tmp_path / "base", text.format("base"), **kd_settings(tmp_path))
    dot = train(tmp_path / "dot", text.format("dot"), **kd_settings(tmp_path))
    delta = train(
        tmp_path / "d", text.format("dot").replace("0.0}", "0.075}"), **kd_settings(tmp_path)
    )
    assert dot[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-3)
    assert delta[0]["train_loss"] != pytest.approx(dot[0]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_follows_full_precision(tmp_path, amp):
    text = "SOLVER:\n  TRAINER: dot\n  CLIP_GRAD_NORM: 50.0\n  AMP: {}\n"
    full = train(tmp_path / "full", text.format("none"), **kd_settings(tmp_path))
    half = train(tmp_path / amp, text.format(amp), **kd_settings(tmp_path))
    assert half[0]["train_loss"] == pytest.approx(full[0]["train_loss"], rel=0.05)


def test_an_overflow_of_either_gradient_skips_the_step_and_lowers_the_scale(tmp_path):
    from mdistiller.dataset import load_data
    from mdistiller.engine.dot import DOTTrainer
    from mdistiller.run.build import build_distiller

    text = "SOLVER:\n  TRAINER: dot\n  AMP: fp16\n"
    cfg = load_config(write_config(tmp_path, text=text, **kd_settings(tmp_path)))
    data = load_data(cfg, torch.device("cpu"))
    trainer = DOTTrainer(
        "x", build_distiller(cfg, data, torch.device("cpu")), data.train, data.val, cfg
    )
    trainer.step = 1
    weight = trainer.model.student.fc.weight
    for bad in ("loss_ce", "loss_kd"):
        before, scale = weight.detach().clone(), trainer.scaler.get_scale()
        losses = {
            name: weight.sum() * (1e38 if name == bad else 1.0) for name in ("loss_ce", "loss_kd")
        }
        trainer.optimize(losses)
        assert torch.equal(weight, before)
        assert trainer.scaler.get_scale() < (scale or 1e9)
    trainer.optimize({"loss_ce": weight.sum(), "loss_kd": weight.sum()})
    assert not torch.equal(weight, before)


def test_clipping_bounds_the_sum_of_both_gradients(tmp_path):
    text = (
        "SOLVER:\n  TRAINER: dot\n  BATCH_SIZE: 160\n  WEIGHT_DECAY: 0.0\n  LR: 0.5\n"
        "  CLIP_GRAD_NORM: 0.01\n"
    )
    train(tmp_path, text, **kd_settings(tmp_path))
    from mdistiller.engine.trainer import seed_everything
    from mdistiller.models import get_model_entry

    seed_everything(0)
    start = get_model_entry("resnet8", "cifar")(num_classes=10)
    end = torch.load(tmp_path / "out" / "toy" / "run" / "student_latest")["model"]
    moved = sum(((end[k] - p.detach()) ** 2).sum() for k, p in start.named_parameters()) ** 0.5
    assert moved.item() == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SOLVER: {TRAINER: dot, TYPE: Adam}\n", "needs SOLVER.TYPE SGD"),
        ("SOLVER: {TRAINER: dot, DOT: {DELTA: 0.95}}\n", "SOLVER.DOT.DELTA 0.95 must lie between"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, capsys, text, says):
    config = write_config(tmp_path, text=text, **kd_settings(tmp_path))
    assert train_command.main(["--cfg", str(config)]) == 2
    assert says in capsys.readouterr().err


def test_plain_training_has_one_loss_and_is_refused(tmp_path, capsys):
    config = write_config(tmp_path, text="SOLVER:\n  TRAINER: dot\n")
    assert train_command.main(["--cfg", str(config)]) == 2
    error = capsys.readouterr().err
    assert "needs the two terms loss_ce and loss_kd, but NONE gives loss_ce" in error


class TwoTerms(torch.nn.Module):
    """Parameters that both losses reach, the task's alone, and distillation's alone."""

    def __init__(self):
        super().__init__()
        self.both, self.task, self.kd = (
            torch.nn.Parameter(golden_values((3,), seed)) for seed in (1, 2, 3)
        )

    def param_groups(self):
        return [{"params": list(self.parameters())}]

    def losses(self, w, u):
        return {
            "loss_ce": ((self.both - u) ** 2 + (self.task * w) ** 2).sum(),
            "loss_kd": ((self.both * w).sin() + (self.kd * u) ** 2).sum(),
        }


STEPS = [(golden_values((3,), 10 + t), golden_values((3,), 20 + t)) for t in (1, 2, 3)]


def by_hand(swapped=False, lr=0.1, momentum=0.9, delta=0.075, decay=0.01):
    """TwoTerms after STEPS of DOT, gradients and updates written out.

    Args:
        swapped: take each loss for the other.
    """
    theta = {
        name: golden_values((3,), seed) for name, seed in (("both", 1), ("task", 2), ("kd", 3))
    }
    v_task, v_kd = {}, {}
    for w, u in STEPS:
        both = theta["both"]
        task = {"both": 2 * (both - u), "task": 2 * theta["task"] * w**2}
        kd = {"both": w * (both * w).cos(), "kd": 2 * theta["kd"] * u**2}
        if swapped:
            task, kd = kd, task
        for name, gradient in task.items():
            step = gradient + decay * theta[name]
            keep = momentum - delta if name in kd else momentum
            v_task[name] = keep * v_task[name] + step if name in v_task else step
            theta[name] = theta[name] - lr * v_task[name]
        for name, gradient in kd.items():
            if name not in v_kd:
                v_kd[name] = gradient
            elif name in task:
                v_kd[name] = (momentum + delta) * v_kd[name] + gradient
            else:
                v_kd[name] = momentum * v_kd[name] + gradient + decay * theta[name]
            theta[name] = theta[name] - lr * v_kd[name]
    return theta


def test_the_trainer_gives_each_loss_its_own_momentum(tmp_path):
    from mdistiller.engine.cfg import default_config
    from mdistiller.engine.dot import DOTTrainer

    cfg = default_config()
    words = {"TRAINER": "dot", "LR": 0.1, "MOMENTUM": 0.9, "WEIGHT_DECAY": 0.01, "DOT.DELTA": 0.075}
    cfg.merge_from_list([x for key, value in words.items() for x in (f"SOLVER.{key}", value)])
    cfg.merge_from_list(["LOG.PREFIX", str(tmp_path)])
    model = TwoTerms()
    trainer = DOTTrainer("x", model, None, None, cfg)
    for w, u in STEPS:
        trainer.optimize(model.losses(w, u))
    got, want, swapped = dict(model.named_parameters()), by_hand(), by_hand(swapped=True)
    for name, param in got.items():
        torch.testing.assert_close(param.detach(), want[name], rtol=1e-9, atol=1e-12)
        assert (param - swapped[name]).abs().max() > 1e-4, name
