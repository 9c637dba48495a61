"""Losses and gradients that are not finite: reports, snapshots, skipped steps."""

import itertools
import types

import pytest
import torch
from support import saved_teacher, write_config
from test_training import load, untimed

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks.non_finite import NonFiniteGuard
from mdistiller.engine.metrics import NonFiniteLossError

BAD = """
import torch
from mdistiller.distillers import DISTILLERS, Distiller

class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum() * 0.0

    @staticmethod
    def backward(ctx, grad):
        return torch.full((32, 10), float("inf"))

@DISTILLERS.register("NAME")
class Bad(Distiller):
    calls, at = 0, WHEN

    def distill(self, student, teacher, target, **batch):
        self.calls += 1
        if self.calls == self.at:
            return WHAT
        return student.logits.sum() * 0.0
"""
LOSS, GRADIENT = 'student.logits.sum() * float("nan")', "Poison.apply(student.logits)"


_numbers = itertools.count()


def run(folder, what, skip=0, when=3, trainer="base"):
    name = f"Bad{next(_numbers)}"
    text = BAD.replace("WHAT", what).replace("WHEN", str(when)).replace("NAME", name)
    (folder / "bad.py").write_text(text)
    config = write_config(
        folder,
        f"SOLVER: {{SKIP_NONFINITE: {skip}, TRAINER: {trainer}}}\n",
        method=name,
        epochs=1,
        student="BabyStudent",
        TEACHER="BabyStudent",
        TEACHER_CKPT=str(saved_teacher(folder, "BabyStudent")),
    )
    words = ["--cfg", str(config), "--import", str(folder / "bad.py")]
    return train_command.main(words), folder / "out" / "toy" / "run"


@pytest.mark.parametrize(("what", "name"), [(LOSS, "loss"), (GRADIENT, "gradient")])
def test_the_report_has_terms_samples_and_a_snapshot(tmp_path, capsys, what, name):
    code, folder = run(tmp_path, what)
    error = capsys.readouterr().err
    assert code == 2
    assert f"non-finite {name} in epoch 1, step 3: loss_ce=" in error
    assert "loss_kd=" in error
    assert error.count("\n") == 1
    path = folder / "nonfinite_epoch1_step3_rank0.pt"
    assert str(path) in error
    snapshot = load(path)
    index = snapshot["index"]
    assert f"32 samples ({index[0]}, {index[1]}, " in error
    assert snapshot["inputs"]["image"].shape == (32, 3, 32, 32)
    assert all(value.isfinite().all() for value in snapshot["model"].values())


@pytest.mark.parametrize("what", [LOSS, GRADIENT])
def test_a_skipped_step_is_none(tmp_path, capsys, what):
    """The last of five: the weights are those after four."""
    (tmp_path / "skip").mkdir()
    (tmp_path / "stop").mkdir()
    code, folder = run(tmp_path / "skip", what, skip=1, when=5)
    assert code == 0
    assert "(1 of at most 1)" in capsys.readouterr().out
    state = load(folder / "latest")
    assert state["skipped"] == 1
    assert torch.isfinite(torch.tensor(untimed(folder)[0]["train_loss"]))
    code, folder = run(tmp_path / "stop", what, when=5)
    assert code == 2
    stopped = load(folder / "nonfinite_epoch1_step5_rank0.pt")["model"]
    assert all(torch.equal(state["model"][key], value) for key, value in stopped.items())


@pytest.mark.parametrize("trainer", ["dot", "crd_dot"])
def test_gradients_of_a_skipped_step_are_in_no_later_one(tmp_path, trainer):
    code, folder = run(tmp_path, GRADIENT, skip=1, when=2, trainer=trainer)
    assert code == 0
    assert load(folder / "latest")["skipped"] == 1


def test_more_than_may_be_skipped_end_the_run():
    guard = NonFiniteGuard(1, torch.device("cpu"))
    guard.skipped, guard._terms = 1, [{"loss": torch.tensor(float("nan"))}]
    trainer = types.SimpleNamespace(
        stage="", epoch=0, step=4, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    with pytest.raises(NonFiniteLossError, match="step 4 after 1 skipped steps: loss=nan"):
        guard.allows(trainer, [])


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_device_leaves_a_step_out_by_itself(kind):
    """What CUDA does, on the CPU: fused kernels, no look from the host until numbers are read."""
    param, buffer = torch.nn.Parameter(torch.ones(3)), torch.zeros(2)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)([param], lr=0.1, fused=True, **options)
    model = types.SimpleNamespace(buffers=lambda: [buffer])
    guard = NonFiniteGuard(1, torch.device("cpu"))
    guard.waits = False
    trainer = types.SimpleNamespace(
        begins_step=True, model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu")
    )
    trainer.scaler._enabled = False
    seen = []
    for gradient in (1.0, float("nan"), 1.0, float("inf")):
        guard.before_forward(trainer, {})
        buffer += gradient
        param.grad = torch.full((3,), gradient)
        guard.after_forward(trainer, {"loss": torch.tensor(1.0)})
        assert guard.allows(trainer, [param.grad])
        optimizer.step()
        seen.append((param[0].item(), buffer[0].item()))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert seen[3][1] == 2.0
    with pytest.raises(NonFiniteLossError, match="2 steps had a loss or gradient"):
        guard.read()


def test_numbers_read_late_name_the_samples_and_say_so(tmp_path):
    guard = NonFiniteGuard(0, torch.device("cpu"))
    guard._remembered = 50  # as on CUDA
    trainer = types.SimpleNamespace(
        begins_step=True, stage="", epoch=2, step=7, log_path=tmp_path, model=None
    )
    for number in range(7):
        guard.before_forward(trainer, {"index": torch.tensor([number])})
    error = guard.report(trainer, NonFiniteLossError("non-finite loss", ago=3))
    assert "1 samples (3)" in str(error)
    assert "noticed 3 steps later: without inputs and weights" in str(error)
    assert load(tmp_path / "nonfinite_epoch3_step4_rank0.pt")["index"].tolist() == [3]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, capsys, monkeypatch):
    """A bad gradient in the last step of an epoch shows in no loss."""
    from mdistiller.engine.trainer import BaseTrainer

    original = BaseTrainer.update

    def update(self):
        original(self)
        if self.epoch == 1 and self.step == 5:
            self.model.student.fc.bias.data[3] = float("nan")

    monkeypatch.setattr(BaseTrainer, "update", update)
    config = write_config(tmp_path, student="BabyStudent", epochs=2)
    assert train_command.main(["--cfg", str(config)]) == 2
    assert "weights are not finite after epoch 2" in capsys.readouterr().err
    assert load(tmp_path / "out" / "toy" / "run" / "latest")["epoch"] == 1
