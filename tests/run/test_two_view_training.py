"""Runs on pairs of views: MLKD, and a distiller and a trainer as forks have them."""

import pytest
from support import same_state, saved_teacher
from test_training import load, metrics, train, untimed

from mdistiller.cli import train as train_command

FORK = """
import torch
import torch.nn.functional as F
from mdistiller.distillers._base import Distiller
from mdistiller.engine import trainer_dict
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.utils import accuracy


class TwoViews(Distiller):
    def __init__(self, student, teacher, cfg):
        super(TwoViews, self).__init__(student, teacher)

    def forward_train(self, image_weak, image_strong, target, **kwargs):
        logits_weak, _ = self.student(image_weak)
        logits_strong, _ = self.student(image_strong)
        with torch.no_grad():
            teacher_weak, _ = self.teacher(image_weak)
            teacher_strong, _ = self.teacher(image_strong)
        loss_ce = F.cross_entropy(logits_weak, target) + F.cross_entropy(logits_strong, target)
        loss_kd = F.mse_loss(logits_weak, teacher_weak) + F.mse_loss(logits_strong, teacher_strong)
        return logits_weak, {"loss_ce": loss_ce, "loss_kd": loss_kd}


class AugTrainer(BaseTrainer):
    def train_iter(self, data, epoch, train_meters):
        self.optimizer.zero_grad()
        (image_weak, image_strong), target, index = data
        preds, losses_dict = self.distiller(
            image_weak=image_weak, image_strong=image_strong, target=target, epoch=epoch)
        loss = sum([l.mean() for l in losses_dict.values()])
        loss.backward()
        self.optimizer.step()
        acc1, acc5 = accuracy(preds, target, topk=(1, 5))
        train_meters["losses"].update(loss.cpu().detach().numpy().mean(), image_weak.size(0))
        train_meters["top1"].update(acc1[0], image_weak.size(0))
        return ""


trainer_dict["aug"] = AugTrainer
"""


@pytest.fixture
def folder(tmp_path):
    """Makes a named folder for a run."""

    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


@pytest.fixture
def teacher(tmp_path):
    return {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(tmp_path))}


def test_a_resumed_run_is_exact_to_the_bit(folder, teacher):
    whole = train(folder("whole"), method="MLKD", epochs=2, **teacher)
    half = train(folder("half"), method="MLKD", epochs=1, **teacher)
    words = ["--cfg", str(half.parents[2] / "toy.yaml"), "SOLVER.EPOCHS", "2"]
    assert train_command.main([*words, "EXPERIMENT.NAME", "run", "--resume"]) == 0
    assert same_state(load(whole / "latest")["model"], load(half / "latest")["model"])
    assert untimed(whole) == untimed(half)
    rows = metrics(whole)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert {"train_kd_weak", "train_kd_strong", "train_cc", "train_bc"} <= rows[0].keys()


def test_a_distiller_and_a_trainer_of_a_fork_see_what_ours_do(tmp_path, folder, teacher):
    (tmp_path / "fork.py").write_text(FORK)
    words = ["--import", tmp_path / "fork.py"]
    runs = [
        metrics(train(folder(trainer), *words, method="TwoViews", text=text, epochs=1, **teacher))
        for trainer in ("base", "aug")
        for text in [f"SOLVER:\n  TRAINER: {trainer}\n"]
    ]
    for ours, theirs in zip(*runs, strict=True):
        for key in ("train_loss", "train_acc", "test_acc"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
