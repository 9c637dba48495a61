"""A small run, trained again and again in forked processes, and compared with one left alone.

Forked: a child begins to train within a fraction of a second, and has the parent's imports.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from faults.compare import differences
from mdistiller.cli.support.command import guarded
from mdistiller.dataset import DATASETS, DataSource, ImageSet
from mdistiller.dataset.data_source import Options, Split
from mdistiller.engine.cfg import Config, load_config
from mdistiller.models import ModelEntry, cifar_model_dict
from mdistiller.models.cifar.baby import BabyNet
from mdistiller.run.train import train

NAME = "faults"
Before = Callable[[], Callable[[], object] | None]


@DATASETS.register(NAME)
class FewDigits(DataSource):
    """A part of the digits."""

    root = "."
    mean, std = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
    augment = "crop"
    zoo = "cifar"

    def load(self, root: Path, split: Split, options: Options) -> ImageSet:
        return _digits()[0 if split == "train" else 1]


@cache
def _digits() -> tuple[ImageSet, ImageSet]:
    """180 for training, 60 for evaluation; the parent has them before it forks."""
    digits = DATASETS["digits"]().load(Path(), "train", Options())
    return digits.select(torch.arange(180)), digits.select(torch.arange(180, 240))


def tiny_net(num_classes: int = 10) -> BabyNet:
    """A network with batch norm and dropout, of a few hundred weights."""
    return BabyNet((2, 4), (8,), num_classes, norm=True, dropout=0.2)


cifar_model_dict.setdefault(NAME, ModelEntry(tiny_net, None))
_SETTINGS: dict[str, Any] = {
    "DEVICE": "cpu",
    "EXPERIMENT.PROJECT": "faults",
    "DATASET.TYPE": NAME,
    "DISTILLER.TYPE": "KD",
    "DISTILLER.TEACHER": NAME,
    "DISTILLER.STUDENT": NAME,
    "SOLVER.BATCH_SIZE": 16,
    "SOLVER.ACCUMULATE": 2,
    "SOLVER.EMA": 0.9,
    "SOLVER.EPOCHS": 3,
    "SOLVER.LR": 0.02,
    "SOLVER.LR_DECAY_STAGES": [2],
    "LOG.TENSORBOARD_FREQ": 3,
    "LOG.SAVE_CHECKPOINT_FREQ": 2,
    "LOG.SAVE_EVERY_MINUTES": 0.0005,  # nearly every step
}


@dataclass
class Outcome:
    """What a suite found.

    Attributes:
        claim: what went well, in words.
        tried: faults that were made.
        losses: what was lost or wrong, each in a line.
    """

    claim: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)

    def line(self) -> str:
        """`kills survived 53/53`."""
        return f"{self.claim} {max(self.tried - len(self.losses), 0)}/{self.tried}"


@dataclass
class Work:
    """Where the suites train, and how much.

    Args:
        folder: for all files.
        quick: few faults, for a minute's test.
        seed: of the moments at which things go wrong.
    """

    folder: Path
    quick: bool = False
    seed: int = 0

    @cached_property
    def teacher(self) -> Path:
        """Weights of an untrained network."""
        _digits()
        torch.manual_seed(1)
        path = self.folder / "teacher.pth"
        torch.save({"model": tiny_net().state_dict()}, path)
        return path

    def config(self, name: str, **changes: Any) -> Config:
        """The run's config, in a folder of this name."""
        settings = self.settings(name, **changes)
        return load_config("", [word for pair in settings.items() for word in pair])

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """What is other than by default in the config of a run."""
        return {
            **_SETTINGS,
            "LOG.PREFIX": str(self.folder),
            "EXPERIMENT.NAME": name,
            "DISTILLER.TEACHER_CKPT": str(self.teacher),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }

    def run_folder(self, name: str) -> Path:
        return self.folder / "faults" / name

    def output(self, name: str) -> str:
        """What the processes of a run have printed."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def start(
        self,
        name: str,
        before: Before | None = None,
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> BaseProcess:
        """Begin or continue a run in a forked process.

        Args:
            before: called there first, to lay a trap; what it returns is called at the end.
        """
        cfg = self.config(name, **changes)
        log = self.folder / f"{name}.log"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_child, args=(cfg, log, before, environment or {}))
        process.start()
        return process

    def finish(self, name: str, **changes: Any) -> int:
        """Train a run to its end, undisturbed; returns the exit code."""
        process = self.start(name, **changes)
        process.join()
        return process.exitcode or 0

    @cached_property
    def whole(self) -> Path:
        """The folder of a run that nothing has disturbed, and that saved within no epoch."""
        code = self.finish("whole", LOG__SAVE_EVERY_MINUTES=0.0)
        if code:
            raise RuntimeError(f"the undisturbed run failed:\n{self.output('whole')}")
        return self.run_folder("whole")

    def differences(self, name: str, whole: Path | None = None) -> list[str]:
        """What a finished run has otherwise than the one that was left alone."""
        found = differences(self.run_folder(name), whole or self.whole)
        return [f"{name}: {text}" for text in found]

    def forget(self, name: str) -> None:
        """Remove a run."""
        shutil.rmtree(self.run_folder(name), ignore_errors=True)
        (self.folder / f"{name}.log").unlink(missing_ok=True)


def _child(cfg: Config, log: Path, before: Before | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)  # makes torch's pool anew, before autograd's threads do so all at once
    with log.open("a", buffering=1) as out:
        sys.stdout = sys.stderr = out
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            after = None if before is None else before()
            code = guarded(lambda: _train(cfg))
            if after is not None:
                after()
        except BaseException:
            traceback.print_exc()
            code = 1
        out.flush()
        os._exit(code)  # as an exit, without what the parent would have done at its own


def _train(cfg: Config) -> None:
    train(cfg, resume="auto")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
