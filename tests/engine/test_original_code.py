"""Distillers and trainers written for the original run unchanged."""

import shutil

import pytest
from support import REPO, run_script, saved_teacher, write_config
from test_training import load, metrics, train

from mdistiller.cli import train as train_command
from mdistiller.models import get_model_entry

README_METHOD = """
import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller


class MyDistiller(Distiller):
    def __init__(self, student, teacher, cfg):
        super(MyDistiller, self).__init__(student, teacher)
        self.weight = cfg.MyDistiller.WEIGHT
        self.extra = nn.Linear(10, 10)

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        loss_ce = F.cross_entropy(logits_student, target)
        loss_kd = self.weight * F.mse_loss(self.extra(logits_student), logits_teacher)
        return logits_student, {"loss_ce": loss_ce, "loss_kd": loss_kd}

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.extra.parameters())
"""


ANEW = """
import runpy, sys
from pathlib import Path

for name in [name for name in sys.modules if name.partition(".")[0] == "mdistiller"]:
    del sys.modules[name]
copy = Path(sys.argv.pop(1))
sys.path.insert(0, str(copy))
sys.argv[0] = str(copy / "tools" / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("place", ["imports", "package"])
def test_a_distiller_of_the_original_trains_unchanged(tmp_path, place):
    """One file, no registration: named in IMPORTS, or dropped into distillers/."""
    if place == "imports":
        (tmp_path / "mine.py").write_text(README_METHOD)
        words = ["--import", str(tmp_path / "mine.py")]
    else:
        for folder in ("mdistiller", "tools", "configs"):
            shutil.copytree(REPO / folder, tmp_path / "copy" / folder)
        shutil.copy(REPO / "pyproject.toml", tmp_path / "copy")
        (tmp_path / "copy" / "mdistiller" / "distillers" / "mine.py").write_text(README_METHOD)
        (tmp_path / "anew.py").write_text(ANEW)
    config = write_config(
        tmp_path,
        method="MyDistiller",
        TEACHER="resnet8",
        TEACHER_CKPT=str(saved_teacher(tmp_path)),
        text="MyDistiller:\n  WEIGHT: 0.5\n",
    )
    if place == "imports":
        assert train_command.main(["--cfg", str(config), *words]) == 0
    else:
        done = run_script(tmp_path / "anew.py", tmp_path / "copy", "--cfg", config)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "toy" / "run"
    rows = metrics(run)
    assert rows[-1]["train_loss_kd"] < rows[0]["train_loss_kd"]
    groups = load(run / "latest")["optimizer"]["param_groups"]
    network = get_model_entry("resnet8", "cifar")(num_classes=10)
    assert len(groups[0]["params"]) == len(list(network.parameters())) + 2  # extra counts once
    state = load(run / "latest")["model"]
    assert "extra.weight" in state


OLD_TRAINER = """
import torch
from mdistiller.engine import trainer_dict
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.utils import (
    AverageMeter, accuracy, validate, adjust_learning_rate, save_checkpoint, load_checkpoint,
    log_msg,
)


class OldTrainer(BaseTrainer):
    def __init__(self, experiment_name, distiller, train_loader, val_loader, cfg):
        super(OldTrainer, self).__init__(experiment_name, distiller, train_loader, val_loader, cfg)

    def train_iter(self, data, epoch, train_meters):
        self.optimizer.zero_grad()
        image, target, index = data
        preds, losses_dict = self.distiller(image=image, target=target, epoch=epoch)
        loss = sum([l.mean() for l in losses_dict.values()])
        loss.backward()
        self.optimizer.step()
        batch_size = image.size(0)
        acc1, acc5 = accuracy(preds, target, topk=(1, 5))
        train_meters["losses"].update(loss.cpu().detach().numpy().mean(), batch_size)
        train_meters["top1"].update(acc1[0], batch_size)
        train_meters["top5"].update(acc5[0], batch_size)
        return "Loss:{:.4f}".format(train_meters["losses"].avg)


class OlderTrainer(OldTrainer):
    def train_epoch(self, epoch):
        lr = adjust_learning_rate(epoch, self.cfg, self.optimizer)
        train_meters = {name: AverageMeter() for name in ("losses", "top1", "top5")}
        self.distiller.train()
        for idx, data in enumerate(self.train_loader):
            msg = self.train_iter(data, epoch, train_meters)
        test_acc, test_acc_top5, test_loss = validate(self.val_loader, self.distiller)
        test_acc = torch.tensor([test_acc], dtype=torch.float64)  # as the original's validate
        log_dict = {
            "train_acc": train_meters["top1"].avg,
            "train_loss": train_meters["losses"].avg,
            "test_acc": test_acc,
            "test_acc_top5": test_acc_top5,
            "test_loss": test_loss,
        }
        self.log(lr, epoch, log_dict)
        save_checkpoint({"model": self.distiller.module.state_dict()}, self.log_path / "mine")


trainer_dict["old"] = OldTrainer
trainer_dict["older"] = OlderTrainer
"""


def test_a_trainer_of_the_original_gives_the_same_run(tmp_path):
    """One overrides an iteration, the other the whole epoch."""
    (tmp_path / "old.py").write_text(OLD_TRAINER)
    for name in ("base", "old", "older"):
        (tmp_path / name).mkdir()
    ours = metrics(train(tmp_path / "base"))
    for name in ("old", "older"):
        text = f"SOLVER:\n  TRAINER: {name}\n"
        old = metrics(train(tmp_path / name, "--import", tmp_path / "old.py", text=text))
        for mine, theirs in zip(ours, old, strict=True):
            for key in ("train_loss", "train_acc", "test_acc"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6), name
