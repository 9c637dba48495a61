"""SOLVER.CHANNELS_LAST: how tensors lie in memory, and that nothing else depends on it."""

import pytest
import torch
from support import saved_teacher, write_config
from torch import nn

from mdistiller.engine.cfg import load_config
from mdistiller.engine.hooks import Hook
from mdistiller.run.train import train

ROLES = ("student", "teacher")


class Spy(Hook):
    """Notes of every call of a network's second convolution what came, what went, by what."""

    def __init__(self):
        self.seen = {}

    def before_train(self, trainer):
        for role in ROLES:
            convolutions = [m for m in getattr(trainer.model, role).modules() if is_conv(m)]
            convolutions[0].register_forward_hook(self.note(f"{role} image"))
            convolutions[1].register_forward_hook(self.note(role))

    def note(self, name):
        def hook(layer, inputs, output):
            where = f"{name}, {'train' if torch.is_grad_enabled() else 'no grad'}"
            tensors = (inputs[0], layer.weight, output)
            self.seen.setdefault(where, []).extend(map(lies_last, tensors))

        return hook


def is_conv(module):
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def lies_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def run(folder, last, *words, resume=False, **config):
    """History of a run, what its spy saw, and its `latest`."""
    folder.mkdir(exist_ok=True)
    teacher = saved_teacher(folder, "resnet8")
    config = {"student": "BabyStudent", "epochs": 1, **config}  # no batch norm to blow up rounding
    path = write_config(folder, TEACHER="resnet8", TEACHER_CKPT=str(teacher), **config)
    cfg = load_config(path, ["SOLVER.CHANNELS_LAST", last, "SOLVER.LR", 0.01, *words])
    spy = Spy()
    train(cfg, resume=resume, hooks=[spy])
    latest = torch.load(folder / "out" / "toy" / "run" / "latest", weights_only=True)
    return latest["history"], spy.seen, latest


def assert_same(plain, other):
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-6)


@pytest.mark.filterwarnings("ignore:student and teacher have 1 and 3 stages")
@pytest.mark.parametrize("method", ["MLKD", "REVIEWKD"])
def test_tensors_lie_so_in_both_networks_and_losses_stay(tmp_path, method):
    """Of one view or two, in training and validation, of the moving average as well."""
    words = ["SOLVER.EMA", 0.5]
    (plain,), seen, before = run(tmp_path / "plain", False, *words, method=method)
    assert not any(map(all, seen.values()))
    (last,), seen, after = run(tmp_path / "last", True, *words, method=method)
    assert set(seen) >= {f"student{what}, train" for what in ("", " image")}
    assert set(seen) >= {f"{role}{what}, no grad" for role in ROLES for what in ("", " image")}
    assert all(map(all, seen.values()))
    assert sum(map(len, seen.values())) > 3 * 2 * (5 + 2)  # steps, and batches of validation
    for key in ("train_loss", "train_loss_kd", "test_loss", "ema_test_loss"):
        assert last[key] == pytest.approx(plain[key], rel=1e-4), key
    assert_same(before["model"], after["model"])
    assert_same(before["ema"]["model"], after["ema"]["model"])


def test_a_run_may_be_resumed_with_the_other_setting(tmp_path):
    whole, _, want = run(tmp_path / "whole", False, method="KD", epochs=2)
    run(tmp_path / "parts", True, method="KD", epochs=1)
    parts, seen, found = run(tmp_path / "parts", False, method="KD", epochs=2, resume=True)
    assert not all(map(all, seen.values()))
    assert parts[1]["train_loss"] == pytest.approx(whole[1]["train_loss"], rel=1e-4)
    assert_same(want["model"], found["model"])
