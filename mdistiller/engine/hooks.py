"""What happens around the training loop: evaluation, logs, checkpoints. Hooks run in list order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from mdistiller.engine.disk import warn_of_low_disk
from mdistiller.engine.distributed import is_main_process
from mdistiller.engine.store import LATEST, PREVIOUS, Store
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

    def networks(self, trainer: BaseTrainer, epoch: int) -> dict[str, nn.Module]:
        """Networks to be kept in files of their own after an epoch, by the files' names."""
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
    """Saves `latest`, then what else an epoch leaves: `best`, `epoch_N`, and networks alone.

    So no file is of an epoch that a run which dies here would do again; it writes those that are
    lacking when it goes on. Within an epoch only `latest` is saved.
    """

    def __init__(self, cfg: Any):
        self.log = cfg.LOG

    def before_train(self, trainer: BaseTrainer) -> None:
        warn_of_low_disk(trainer)
        if trainer.epoch and trainer.position is None:
            self._write_beside(trainer, trainer.epoch)

    def after_epoch(self, trainer: BaseTrainer, epoch: int, record: Record) -> None:
        store = self._store(trainer)
        store.save(saved_state(trainer), LATEST, epoch=epoch)
        self._write_beside(trainer, epoch)
        store.prune(self.log.KEEP_CHECKPOINTS, epoch)

    def _write_beside(self, trainer: BaseTrainer, epoch: int) -> None:
        """Write what `latest` of an epoch has beside it, as far as it is not there."""
        store, student = self._store(trainer), trainer.model.student
        wholes, networks = [], {"student_latest": student}
        if trainer.best_epoch == epoch:
            wholes.append("best")
            networks["student_best"] = student
        if epoch % self.log.SAVE_CHECKPOINT_FREQ == 0:
            wholes.append(f"epoch_{epoch}")
            networks[f"student_{epoch}"] = student
        for hook in trainer.hooks:
            networks |= hook.networks(trainer, epoch)
        this = (store.entry(LATEST) or store.entry(PREVIOUS) or {}).get("sha256", "")
        if not this:  # a run of the original, whose files stay as they are
            return
        found = {name: store.entry(name) or {} for name in (*wholes, *networks)}
        done = [name for name in found if found[name].get("of") == this]
        for name in wholes:
            if name not in done:
                store.save(saved_state(trainer), name, epoch=epoch, of=this)
        for name, network in networks.items():
            if name not in done:
                store.save_network(network, name, epoch=epoch, of=this)

    def save(self, trainer: BaseTrainer) -> None:
        state = saved_state(trainer)
        self._store(trainer).save(state, LATEST, epoch=trainer.epoch, step=trainer.step)

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
