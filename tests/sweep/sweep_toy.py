"""A network and a method for the tests of sweeps, registered from outside the package."""

import os
import time
from pathlib import Path

from torch import nn

from mdistiller.distillers import DISTILLERS, Vanilla
from mdistiller.models.zoo import register_model


class Dot(nn.Module):
    """One linear layer."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, image):
        return self.fc(image.flatten(1)), {}


@register_model("cifar", "Dot")
def dot(num_classes=10):
    return Dot(num_classes)


@DISTILLERS.register("LOGGED", config={"LOG": "", "GATE": "", "CLOSED": False, "FAIL": False})
class Logged(Vanilla):
    """Plain training that appends its process and seed to a file when it starts.

    With CLOSED it stays in epoch 2 until there is a file GATE.
    """

    @classmethod
    def build(cls, student, teacher, cfg, *facts, **more):
        if cfg.LOGGED.FAIL:
            raise RuntimeError("this method fails,\non purpose")
        if cfg.LOGGED.LOG:
            with Path(cfg.LOGGED.LOG).open("a") as log:
                log.write(f"{os.getpid()} {cfg.EXPERIMENT.NAME}\n")
        self = cls(student)
        self.gate = Path(cfg.LOGGED.GATE) if cfg.LOGGED.CLOSED else None
        return self

    def forward_train(self, image, target, **batch):
        while batch["epoch"] == 2 and self.gate and not self.gate.exists():
            time.sleep(0.05)
        return super().forward_train(image, target, **batch)
