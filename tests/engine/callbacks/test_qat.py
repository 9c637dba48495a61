"""SOLVER.QAT_EPOCHS: what is rounded, when, what is saved, and that a run resumes to the bit."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import same_state, write_config

from mdistiller.cli import export as export_command
from mdistiller.cli import train as train_command
from mdistiller.engine import trainer_dict
from mdistiller.engine.callbacks.qat import QuantizeStudent, RoundedConv2d, Rounding
from mdistiller.models import get_model_entry


def test_rounding_is_that_of_8_bits():
    """Against the definition in float64; a batch norm folded into the weight changes nothing."""
    torch.manual_seed(0)
    x = torch.randn(1000, requires_grad=True)
    rounding = Rounding(torch.tensor([-1.0, 2.0]))
    low, high = -1.0, 2.0
    scale = (high - low) / 255
    zero = round(-low / scale)
    steps = np.clip(np.round(x.detach().double().numpy() / scale) + zero, 0, 255)
    y = rounding.input(x)
    assert np.allclose(y.detach().numpy(), (steps - zero) * scale, atol=1e-6)
    y.sum().backward()
    assert set(x.grad.tolist()) == {0.0, 1.0}  # clipped, and not
    layer = RoundedConv2d(1, 1, 1)
    layer.rounding, rounding.active = rounding, True
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach().view(1, 1, 10, 100)).dtype == torch.float32
    rounding.observing = True
    rounding.input(torch.tensor([5.0, -0.5]))
    assert rounding.range.tolist() == [-1.0, 5.0]
    weight, factor = torch.randn(4, 3, 2, 2), torch.tensor([0.1, -3.0, 7.0, 1.0]).view(-1, 1, 1, 1)
    rounded = Rounding.weight(weight)
    steps = rounded.flatten(1) / (weight.flatten(1).abs().amax(1, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert (rounded - weight).flatten(1).abs().amax(1).gt(0).all()
    assert torch.allclose(Rounding.weight(weight * factor), rounded * factor, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of three epochs, the last two in 8 bits, and one stopped within the third."""

    class Stops(trainer_dict["base"]):
        armed, seen = False, set()

        def batch_inputs(self, data, epoch):
            convolution = self.model.student.conv1
            rounds = isinstance(convolution, RoundedConv2d) and convolution.rounding.active
            Stops.seen.add((epoch, rounds))
            if Stops.armed and (epoch, self.step) == (3, 2):
                raise KeyboardInterrupt
            return super().batch_inputs(data, epoch)

    def train(name, code, *words):
        folder = tmp_path_factory.getbasetemp() / f"qat_{name}"
        folder.mkdir(exist_ok=True)
        path = write_config(folder, epochs=3, text="SOLVER:\n  QAT_EPOCHS: 2\n")
        assert train_command.main(["--cfg", str(path), *words]) == code
        return folder / "out" / "toy" / "run"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainer_dict, "base", Stops)
        whole, seen = train("whole", 0), set(Stops.seen)
        Stops.armed = True
        train("stopped", 130)
        Stops.armed = False
        return whole, train("stopped", 0, "--resume"), seen


def test_the_last_epochs_are_rounded_and_the_files_are_plain(runs):
    whole, _, seen = runs
    assert seen == {(1, False), (2, True), (3, True)}
    rows = list(map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()))
    assert ["int8_test_acc" in row for row in rows] == [False, True, True]
    assert rows[-1]["int8_test_loss"] != rows[-1]["test_loss"]
    latest = torch.load(whole / "latest", weights_only=True)
    student = torch.load(whole / "student_latest", weights_only=True)["model"]
    assert student.keys() == get_model_entry("resnet8", "cifar")(num_classes=10).state_dict().keys()
    ranges = latest["int8_ranges"]
    assert len(ranges) == 10  # nine convolutions and the classifier
    assert all(low <= 0 < high for low, high in ranges.values())


def test_resume_is_exact_to_the_bit(runs):
    first, second = (torch.load(run / "latest", weights_only=True) for run in runs[:2])
    assert same_state(first["model"], second["model"])
    assert same_state(first["int8_ranges"], second["int8_ranges"])


def test_a_run_that_gets_the_key_late_observes_in_its_next_epoch():
    """Else all ranges would stay empty, and all inputs be rounded to zero."""
    for saved, observes in (({}, True), ({"int8_ranges": {"0": torch.ones(2)}}, False)):
        model = SimpleNamespace(student=torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))
        cfg = SimpleNamespace(SOLVER=SimpleNamespace(EPOCHS=3, QAT_EPOCHS=2))
        trainer = SimpleNamespace(cfg=cfg, model=model, epoch=2, stage="", device="cpu")
        hook = QuantizeStudent()
        hook.load_state(trainer, saved)
        hook.before_epoch(trainer, {})  # the third, one after the first of two
        assert hook.roundings["0"].observing is observes


def test_weights_from_before_are_not_exported_in_8_bits(runs, tmp_path, capsys):
    whole = runs[0]
    summary = json.loads((whole / "summary.json").read_text())
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "best_epoch": 1}))
    words = [str(tmp_path / "run"), "--int8", "--formats", "onnx", "--no-latency"]
    assert export_command.main(words) == 2
    assert "best is epoch 1, before SOLVER.QAT_EPOCHS began in epoch 2" in capsys.readouterr().err


def test_what_it_cannot_follow_is_refused(tmp_path, capsys):
    for words, message in (
        (["SOLVER.QAT_EPOCHS", "9"], "are the last of SOLVER.EPOCHS 1"),
        (["SOLVER.QAT_EPOCHS", "1", "SOLVER.COMPILE", "True"], "set SOLVER.COMPILE and"),
    ):
        config = write_config(tmp_path, epochs=1)
        assert train_command.main(["--cfg", str(config), *words]) == 2
        assert message in capsys.readouterr().err
