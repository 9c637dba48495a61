"""What happens around the training loop: evaluation, logs, checkpoints. Hooks run in list order."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboardX import SummaryWriter

from mdistiller.engine.checkpoint import network_contents, save_checkpoint
from mdistiller.engine.distributed import is_main_process
from mdistiller.engine.utils import log_msg, validate

if TYPE_CHECKING:
    from mdistiller.dataset import Data
    from mdistiller.engine.metrics import Meters
    from mdistiller.engine.trainer import BaseTrainer

Record = dict[str, Any]
EPOCH_KEYS = ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")


class Hook:
    """Base of all hooks: does nothing. A subclass overrides the moments it cares about."""

    def before_train(self, trainer: BaseTrainer) -> None:
        """Once, before the first epoch of this process."""

    def on_resume(self, trainer: BaseTrainer, log_sizes: Mapping[str, int]) -> None:
        """After a checkpoint was loaded; `log_sizes` are the bytes of each log at its time."""

    def load_state(self, trainer: BaseTrainer, state: Mapping[str, Any]) -> None:
        """After a checkpoint was loaded: take what :meth:`state` once gave, if it is there."""

    def after_update(self, trainer: BaseTrainer) -> None:
        """After every step of the optimizer in the main stage."""

    def after_steps(self, trainer: BaseTrainer, meters: Meters) -> None:
        """Every LOG.TENSORBOARD_FREQ steps, with the means of the epoch so far."""

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        """After each epoch; `record` holds its numbers and may be added to."""

    def write(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        """Log an epoch's numbers."""

    def sizes(self, trainer: BaseTrainer) -> dict[str, int]:
        """Bytes of the log files that this hook appends to, by name."""
        return {}

    def state(self, trainer: BaseTrainer) -> dict[str, Any]:
        """What a checkpoint is to hold beside the trainer's own entries."""
        return {}

    def after_train(self, trainer: BaseTrainer) -> None:
        """Once, after the last epoch."""

    def summarize(self, trainer: BaseTrainer, data: Data) -> dict[str, Any]:
        """What the run's summary is to hold beside the trainer's own entries."""
        return {}

    def abandon(self, trainer: BaseTrainer) -> None:
        """Instead of `after_train` where an exception ends the training."""


class Evaluate(Hook):
    """Adds validation accuracy and loss to the epoch's record."""

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        top1, top5, loss = validate(trainer.val_loader, trainer.distiller)
        record.update(test_acc=top1, test_acc_top5=top5, test_loss=loss)


class Log(Hook):
    """Hands each epoch's numbers to `trainer.log` and prints a line."""

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        numbers = dict(record)
        trainer.log(numbers.pop("lr"), epoch, numbers)
        known = f"teacher hits {record['teacher_hits']:.0f} %  " if "teacher_hits" in record else ""
        averaged = f"ema acc {record['ema_test_acc']:.2f}  " if "ema_test_acc" in record else ""
        if is_main_process():
            print(
                log_msg(
                    f"epoch {epoch}/{trainer.cfg.SOLVER.EPOCHS}  lr {record['lr']:.3g}  "
                    f"train loss {record['train_loss']:.4f} acc {record['train_acc']:.2f}  "
                    f"test loss {record['test_loss']:.4f} acc {record['test_acc']:.2f} "
                    f"(best {trainer.best_acc:.2f})  {averaged}{known}"
                    f"{record['images_per_second']:.0f} images/s",
                    "TRAIN",
                ),
                flush=True,
            )


class AppendedFile(Hook):
    """A text log that continues where the checkpoint left it. Subclasses set `name`."""

    name = ""

    def path(self, trainer: BaseTrainer) -> Path:
        return trainer.log_path / self.name

    def before_train(self, trainer: BaseTrainer) -> None:
        if trainer.epoch == 0 and not trainer.init_state:
            # what a run left behind that died before its first checkpoint
            self.path(trainer).unlink(missing_ok=True)

    def on_resume(self, trainer: BaseTrainer, log_sizes: Mapping[str, int]) -> None:
        path = self.path(trainer)
        if self.name in log_sizes and path.is_file() and path.stat().st_size > log_sizes[self.name]:
            os.truncate(path, log_sizes[self.name])

    def append(self, trainer: BaseTrainer, text: str) -> None:
        with self.path(trainer).open("a", encoding="utf-8") as handle:
            handle.write(text)

    def sizes(self, trainer: BaseTrainer) -> dict[str, int]:
        path = self.path(trainer)
        return {self.name: path.stat().st_size if path.is_file() else 0}


class WorkLog(AppendedFile):
    """`worklog.txt`, in the original's format."""

    name = "worklog.txt"

    def write(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        numbers = [f"{key}: {record[key]:.2f}" for key in ("lr", *EPOCH_KEYS) if key in record]
        rule = "-" * 25
        title = f"{trainer.stage} epoch: {epoch}".strip()
        self.append(trainer, "\n".join([rule, title, *numbers, rule, ""]))

    def after_train(self, trainer: BaseTrainer) -> None:
        self.append(trainer, f"best_acc\t{trainer.best_acc:.2f}")


class MetricsFile(AppendedFile):
    """`metrics.jsonl`: one JSON object an epoch, with every number and the time of day (UTC).

    Those of an initialisation stage have `stage` and `stage_epoch` in place of `epoch`.
    """

    name = "metrics.jsonl"

    def write(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        stage = {"stage": trainer.stage, "stage_epoch": epoch}
        head = stage if trainer.stage else {"epoch": epoch}
        self.append(trainer, json.dumps({**head, **record, "time": now}) + "\n")


class TensorBoard(Hook):
    """Event files in `train.events/` (x axis: epochs) and `train.events/steps/`.

    Those of an initialisation stage are in a folder of its name below.
    """

    def __init__(self) -> None:
        self.epochs: SummaryWriter | None = None
        self.steps: SummaryWriter | None = None

    def before_train(self, trainer: BaseTrainer) -> None:
        # purge_step hides what an interrupted run wrote after its last checkpoint.
        folder = trainer.log_path / "train.events" / trainer.stage
        self.epochs = SummaryWriter(str(folder), purge_step=trainer.epoch + 1)
        self.steps = SummaryWriter(str(folder / "steps"), purge_step=trainer.global_step + 1)

    def after_steps(self, trainer: BaseTrainer, meters: Meters) -> None:
        if self.steps is not None:
            for name, meter in meters.items():
                self.steps.add_scalar(f"step/{name}", meter.avg, trainer.global_step)

    def write(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        if self.epochs is not None:
            for name, value in record.items():
                self.epochs.add_scalar(name, value, epoch)
            self.epochs.flush()

    def after_train(self, trainer: BaseTrainer) -> None:
        for writer in (self.epochs, self.steps):
            if writer is not None:
                writer.close()

    def abandon(self, trainer: BaseTrainer) -> None:
        self.after_train(trainer)


class Wandb(Hook):
    """Weights & Biases, on by LOG.WANDB; whatever goes wrong there, training goes on."""

    def __init__(self) -> None:
        self.run: Any = None

    def before_train(self, trainer: BaseTrainer) -> None:
        experiment = trainer.cfg.EXPERIMENT
        try:
            import wandb

            self.run = wandb.init(
                project=experiment.PROJECT,
                name=trainer.log_path.name,
                tags=[tag.strip() for tag in experiment.TAG.split(",") if tag.strip()],
                dir=str(trainer.log_path),
            )
        except Exception as error:  # network, login, version: none of it is worth a lost run
            self._give_up(error)

    def write(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        if self.run is None:
            return
        try:
            named = {"current lr" if key == "lr" else key: value for key, value in record.items()}
            self.run.log(named, step=epoch)
            self.run.summary["best_acc"] = trainer.best_acc
        except Exception as error:
            self._give_up(error)

    def after_train(self, trainer: BaseTrainer) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def abandon(self, trainer: BaseTrainer) -> None:
        self.after_train(trainer)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        first = (str(error).splitlines() or [""])[0]
        print(log_msg(f"wandb is off: {type(error).__name__}: {first}"), flush=True)


class Checkpoint(Hook):
    """Saves `best`, `epoch_N` and, last of all, `latest`; each with the bare student beside it.

    A run that dies between two files resumes from the older `latest` and writes both again.
    """

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        state = trainer.state()
        student = network_contents(trainer.model.student)
        names = [("latest", "student_latest")]
        if epoch % trainer.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0:
            names.insert(0, (f"epoch_{epoch}", f"student_{epoch}"))
        if trainer.best_epoch == epoch:
            names.insert(0, ("best", "student_best"))
        for whole, bare in names:
            save_checkpoint(student, trainer.log_path / bare)
            save_checkpoint(state, trainer.log_path / whole)


def default_hooks(cfg: Any, writes: bool = True) -> list[Hook]:
    """The hooks of a run; only one of its processes `writes` files."""
    from mdistiller.engine.ema import AverageStudent  # a hook itself

    common: list[Hook] = [Evaluate(), *([AverageStudent()] if cfg.SOLVER.EMA else []), Log()]
    if not writes:
        return common
    writers: list[Hook] = [WorkLog(), MetricsFile(), TensorBoard()]
    if cfg.LOG.WANDB:
        writers.append(Wandb())
    return [*common, *writers, Checkpoint()]
