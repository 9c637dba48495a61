"""What happens around the training loop: evaluation, logs, checkpoints. Hooks run in list order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mdistiller.engine.disk import warn_of_low_disk
from mdistiller.engine.distributed import is_main_process
from mdistiller.engine.store import Store
from mdistiller.engine.utils import log_msg

if TYPE_CHECKING:
    from mdistiller.dataset import Data
    from mdistiller.engine.metrics import Meters
    from mdistiller.engine.trainer import BaseTrainer

Record = dict[str, Any]


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

    def before_save(self, trainer: BaseTrainer) -> None:
        """Before a checkpoint is written: make durable what was logged."""

    def save(self, trainer: BaseTrainer) -> None:
        """Between two steps, when the state of the run is to be kept."""

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
    """Adds to the epoch's record how the student does on the validation set."""

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        record.update(trainer.evaluate())


class Log(Hook):
    """Hands each epoch's numbers to `trainer.log` and prints a line."""

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        numbers = dict(record)
        trainer.log(numbers.pop("lr"), epoch, numbers)
        if is_main_process():
            print(
                log_msg(
                    f"epoch {epoch}/{trainer.cfg.SOLVER.EPOCHS}  lr {record['lr']:.3g}  "
                    f"{trainer.progress_line(record)}{record['images_per_second']:.0f} images/s",
                    "TRAIN",
                ),
                flush=True,
            )


class Checkpoint(Hook):
    """Saves `best`, `epoch_N` and, last of all, `latest`; each with the bare student beside it.

    A run that dies between two files resumes from the older `latest` and writes both again. Within
    an epoch only `latest` is saved.
    """

    def __init__(self, cfg: Any):
        self.log = cfg.LOG

    def before_train(self, trainer: BaseTrainer) -> None:
        warn_of_low_disk(trainer)

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        store = self._store(trainer)
        state = saved_state(trainer)
        names = [("latest", "student_latest")]
        if epoch % self.log.SAVE_CHECKPOINT_FREQ == 0:
            names.insert(0, (f"epoch_{epoch}", f"student_{epoch}"))
        if trainer.best_epoch == epoch:
            names.insert(0, ("best", "student_best"))
        for whole, bare in names:
            store.save_network(trainer.model.student, bare)
            store.save(state, whole, epoch=epoch)
        store.prune(self.log.KEEP_CHECKPOINTS)

    def save(self, trainer: BaseTrainer) -> None:
        state = saved_state(trainer)
        self._store(trainer).save(state, "latest", epoch=trainer.epoch, step=trainer.step)

    def _store(self, trainer: BaseTrainer) -> Store:
        return Store(trainer.log_path, self.log.SAFETENSORS)


def saved_state(trainer: BaseTrainer) -> dict[str, Any]:
    """The state of a run whose logs, up to here, are durable, and whose weights are numbers."""
    trainer.guard.check_weights(trainer)
    for hook in trainer.hooks:
        hook.before_save(trainer)
    return trainer.state()


def default_hooks(cfg: Any, writes: bool = True) -> list[Hook]:
    """The hooks of a run; only one of its processes `writes` files."""
    from mdistiller.engine.ema import AverageStudent  # hooks themselves
    from mdistiller.engine.logs import MetricsFile, TensorBoard, Wandb, WorkLog

    common: list[Hook] = [Evaluate(), *([AverageStudent()] if cfg.SOLVER.EMA else []), Log()]
    if not writes:
        return common
    writers: list[Hook] = [WorkLog(), MetricsFile(), TensorBoard()]
    if cfg.LOG.WANDB:
        writers.append(Wandb())
    return [*common, *writers, Checkpoint(cfg)]
