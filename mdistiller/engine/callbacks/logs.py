"""Logs of a run: text files, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, image, scalar
from torch import Tensor

from mdistiller.config.tasks import TASKS
from mdistiller.config.values import flatten, lookup
from mdistiller.console import print_log
from mdistiller.distillers import DISTILLERS, part_names
from mdistiller.engine.callbacks.mistakes import mistakes_picture
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.registry import UserError, first_line

EPOCH_KEYS = ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")


def plain(value: Any) -> Any:
    """A record's value in a form that JSON can hold: tensors become numbers or lists."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        count = value.numel() if isinstance(value, Tensor) else value.size
        return plain(value.item() if count == 1 else value.tolist())
    return str(value)


def numbers_of(record: Record) -> dict[str, float]:
    """The scalar entries of a record; text, lists and the like are left out."""
    entries: dict[str, Any] = plain(record)
    return {key: value for key, value in entries.items() if isinstance(value, (int, float))}


def settings_of(cfg: Any) -> dict[str, Any]:
    """The values of a config by dotted key, without the sections of methods that it does not use;
    text for what is neither text nor a number."""
    unused = set(DISTILLERS) - set(part_names(cfg.DISTILLER.TYPE))
    values = {k: lookup(cfg, k) for k in flatten(cfg) if k.partition(".")[0] not in unused}
    return {
        key: value if isinstance(value, (str, int, float)) else str(value)
        for key, value in values.items()
    }


class AppendedFile(Hook):
    """A text log that resuming cuts back to the checkpoint. Subclasses set `name`."""

    name = ""

    def path(self, trainer: Trainer) -> Path:
        return trainer.log_path / self.name

    def before_train(self, trainer: Trainer) -> None:
        if trainer.fresh:
            # what a run left behind that died before its first checkpoint
            self.path(trainer).unlink(missing_ok=True)

    def on_resume(self, trainer: Trainer, log_sizes: Mapping[str, int]) -> None:
        path = self.path(trainer)
        if self.name in log_sizes and path.is_file() and path.stat().st_size > log_sizes[self.name]:
            os.truncate(path, log_sizes[self.name])

    def append(self, trainer: Trainer, text: str) -> None:
        with self.path(trainer).open("a", encoding="utf-8") as handle:
            handle.write(text)

    def before_save(self, trainer: Trainer) -> None:
        if self.path(trainer).is_file():
            with self.path(trainer).open("rb") as handle:
                os.fsync(handle.fileno())

    def sizes(self, trainer: Trainer) -> dict[str, int]:
        path = self.path(trainer)
        return {self.name: path.stat().st_size if path.is_file() else 0}


class WorkLog(AppendedFile):
    """`worklog.txt`, in the original's format."""

    name = "worklog.txt"

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        values = numbers_of(record)
        keys = ["lr", *EPOCH_KEYS, *(key for task in TASKS.values() for key in task.logged)]
        numbers = [f"{key}: {values[key]:.2f}" for key in keys if key in values]
        rule = "-" * 25
        title = f"{trainer.stage} epoch: {epoch}".strip()
        self.append(trainer, "\n".join([rule, title, *numbers, rule, ""]))

    def after_train(self, trainer: Trainer) -> None:
        lines = (f"{name}\t{value:.2f}" for name, value in trainer.best().items())
        self.append(trainer, "\n".join(lines))


class MetricsFile(AppendedFile):
    """`metrics.jsonl`: one JSON object an epoch, with the whole record and the time of day (UTC).

    Those of an initialisation stage have `stage` and `stage_epoch` in place of `epoch`.
    """

    name = "metrics.jsonl"

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        stage = {"stage": trainer.stage, "stage_epoch": epoch}
        head = stage if trainer.stage else {"epoch": epoch}
        self.append(trainer, json.dumps({**head, **plain(record), "time": now}) + "\n")


class _Events:
    """An event file for TensorBoard, written by this thread.

    tensorboardX's own writer has a queue, which is lost when the process dies and hangs on a full
    disk.

    Args:
        purge: steps from this one on, of earlier files in the folder, are hidden.
    """

    def __init__(self, folder: Path, purge: int):
        folder.mkdir(parents=True, exist_ok=True)
        unique = f".{os.getpid()}.{time.time_ns()}"  # two starts in a second are two files
        self._file = EventsWriter(str(folder / "events"), unique)
        log = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(step=purge, session_log=log, wall_time=time.time()))

    def add(self, name: str, value: float, step: int) -> None:
        self.add_summary(scalar(name, value), step)

    def add_summary(self, summary: Any, step: int) -> None:
        """Add a summary in TensorBoard's format."""
        self._file.write_event(Event(step=step, summary=summary, wall_time=time.time()))

    def flush(self) -> None:
        """Flush the file to disk."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard(Hook):
    """Event files in `train.events/` (x axis: epochs) and `train.events/steps/`.

    Those of an initialisation stage are in a folder of its name below.
    """

    def __init__(self) -> None:
        self.epochs: _Events | None = None
        self.steps: _Events | None = None

    def before_train(self, trainer: Trainer) -> None:
        if trainer.cfg.LOG.get("MISTAKES", 0) and not hasattr(trainer.val_loader, "normalize"):
            raise UserError(
                "LOG.MISTAKES draws images of the library's own evaluation loader, which this run "
                "does not have: set it to 0"
            )
        folder = trainer.log_path / "train.events" / trainer.stage
        self.epochs = _Events(folder, trainer.epoch + 1)
        self.steps = _Events(folder / "steps", trainer.global_step + 1)

    def after_steps(self, trainer: Trainer, meters: Any) -> None:
        if self.steps is not None:
            for name, meter in meters.items():
                self.steps.add(f"step/{name}", meter.avg, trainer.global_step)

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        if self.epochs is not None:
            for name, value in numbers_of(record).items():
                self.epochs.add(name, value, epoch)
            self.epochs.flush()

    def before_save(self, trainer: Trainer) -> None:
        if self.steps is not None:
            self.steps.flush()

    def after_train(self, trainer: Trainer) -> None:
        for writer in (self.epochs, self.steps):
            if writer is not None:
                writer.close()

    def after_summary(self, trainer: Trainer, summary: Mapping[str, Any]) -> None:
        """Add the settings and the final numbers for the HParams tab, and mistakes if asked for."""
        events = _Events(trainer.log_path / "train.events", trainer.epoch + 1)
        numbers = {f"final/{key}": value for key, value in numbers_of(dict(summary)).items()}
        for part in hparams(settings_of(trainer.cfg), numbers):
            events.add_summary(part, trainer.epoch)
        for key, value in numbers.items():
            events.add(key, value, trainer.epoch)
        count = trainer.cfg.LOG.get("MISTAKES", 0)
        picture = mistakes_picture(trainer.model, trainer.val_loader, count) if count else None
        if picture is not None:
            events.add_summary(image("mistakes", picture, dataformats="HWC"), trainer.epoch)
        events.close()

    def abandon(self, trainer: Trainer) -> None:
        with contextlib.suppress(OSError):  # a full disk, which has ended the run already
            self.after_train(trainer)


class Wandb(Hook):
    """Weights & Biases, switched on by LOG.WANDB; its errors never stop the training.

    Attributes:
        id: of the run there, which a resumed run continues.
    """

    def __init__(self) -> None:
        self.run: Any = None
        self.id = uuid.uuid4().hex[:12]

    def state(self, trainer: Trainer) -> dict[str, Any]:
        return {"wandb": self.id}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self.id = state.get("wandb", self.id)

    def before_train(self, trainer: Trainer) -> None:
        experiment = trainer.cfg.EXPERIMENT
        tags = experiment.TAG.split("," if "," in experiment.TAG else "-")
        try:
            import wandb

            self.run = wandb.init(
                project=experiment.PROJECT,
                name=trainer.log_path.name,
                tags=[tag.strip() for tag in tags if tag.strip()],
                dir=str(trainer.log_path),
                config=settings_of(trainer.cfg),
                id=self.id,
                resume="allow",
            )
        except Exception as error:  # network, login, version: none of it is worth a lost run
            self._give_up(error)

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        if self.run is None:
            return
        try:
            values = numbers_of(record)
            named = {"current lr" if key == "lr" else key: value for key, value in values.items()}
            self.run.log(named, step=epoch)
            self.run.summary.update(trainer.best())
        except Exception as error:
            self._give_up(error)

    def after_train(self, trainer: Trainer) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def abandon(self, trainer: Trainer) -> None:
        self.after_train(trainer)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        first = first_line(error)
        print_log(f"wandb is off: {type(error).__name__}: {first}")
