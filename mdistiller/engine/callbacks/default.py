"""The hooks of every run: evaluate, print and log, save; and which hooks a config asks for."""

from __future__ import annotations

import shutil
from typing import Any

from mdistiller.console import print_log
from mdistiller.distillers import get_distiller
from mdistiller.engine.callbacks.console import EpochTable
from mdistiller.engine.callbacks.ema import AverageStudent
from mdistiller.engine.callbacks.logs import (
    MetricsFile,
    TensorBoard,
    Wandb,
    WorkLog,
    numbers_of,
    plain,
)
from mdistiller.engine.callbacks.peers import EvaluatePeers
from mdistiller.engine.callbacks.probe import Probe
from mdistiller.engine.callbacks.qat import QuantizeStudent
from mdistiller.engine.checkpoints.store import LATEST, PREVIOUS, Store
from mdistiller.engine.hooks import Hook, Record, Trainer

_SLOTS = {"SGD": 1, "Adam": 2, "AdamW": 2}
"""Values that an optimizer keeps for each weight; 2 for any other."""


def complete_record(trainer: Trainer, epoch: int, record: Record) -> None:
    """Call the hooks after an epoch; each may add to its record.

    Numbers stay numbers: an entry that a hook removes, or replaces by something else, is restored,
    and a line is printed.
    """
    numbers = numbers_of(record)
    for hook in trainer.hooks:
        if "after_epoch" not in hook.moments:
            continue
        hook.after_epoch(trainer, epoch, record)
        now = numbers_of(record)
        for key in numbers.keys() - now.keys():
            name, value = type(hook).__name__, numbers[key]
            text = f"the hook {name} replaced the number {key!r}: it stays {value:.4g}"
            print_log(f"WARNING: {text}; choose another key")
            record[key] = now[key] = value
        numbers = now


class Evaluate(Hook):
    """Evaluates the student and adds the results to the epoch's record."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        record.update(trainer.evaluate())


class Log(Hook):
    """Passes each epoch's record to `trainer.log` and prints its line.

    Of an initialisation stage the accuracy is left out: the classifier is not trained, or did not
    run.
    """

    def __init__(self) -> None:
        self.table = EpochTable()

    def before_train(self, trainer: Trainer) -> None:
        self.table.begin(trainer)

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        left_out = ("train_acc", "train_top5") if trainer.stage else ()
        record = plain({key: value for key, value in record.items() if key not in left_out})
        numbers = dict(record)
        trainer.log(numbers.pop("lr"), epoch, numbers)
        self.table.show(trainer, epoch, record)


class Checkpoint(Hook):
    """Saves `latest`, then the epoch's other files: `best`, `epoch_N`, and the student's weights
    alone.

    In this order no file is of an epoch that a run which dies here has to repeat; the resumed run
    writes the missing ones. Within an epoch only `latest` is saved.
    """

    def __init__(self, cfg: Any):
        self.log = cfg.LOG

    def before_train(self, trainer: Trainer) -> None:
        warn_of_low_disk(trainer)
        if trainer.epoch and trainer.position is None:
            self._write_beside(trainer, trainer.epoch)

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        store = self._store(trainer)
        store.save(saved_state(trainer), LATEST, epoch=epoch)
        self._write_beside(trainer, epoch)
        store.prune(self.log.KEEP_CHECKPOINTS, epoch)

    def _write_beside(self, trainer: Trainer, epoch: int) -> None:
        """Write the epoch's other files, as far as they do not exist."""
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
        entries = {name: store.entry(name) or {} for name in (*wholes, *networks)}
        done = [name for name in entries if entries[name].get("of") == this]
        for name in wholes:
            if name not in done:
                store.save(saved_state(trainer), name, epoch=epoch, of=this)
        for name, network in networks.items():
            if name not in done:
                store.save_network(network, name, epoch=epoch, of=this)

    def save(self, trainer: Trainer) -> None:
        state = saved_state(trainer)
        self._store(trainer).save(state, LATEST, epoch=trainer.epoch, step=trainer.step)

    def _store(self, trainer: Trainer) -> Store:
        return Store(trainer.log_path, self.log.SAFETENSORS)


def saved_state(trainer: Trainer) -> dict[str, Any]:
    """The state of a run to save; flushes its logs and checks its weights first."""
    trainer.call("before_save")
    return trainer.state()


def warn_of_low_disk(trainer: Trainer) -> None:
    """Print a warning if the run folder's disk has less space than the remaining checkpoints need.

    They are `latest`, `previous`, `best`, the numbered ones, and one that is being written.
    """
    log = trainer.cfg.LOG
    numbered = trainer.cfg.SOLVER.EPOCHS // log.SAVE_CHECKPOINT_FREQ
    numbered = min(numbered, log.KEEP_CHECKPOINTS or numbered)
    there = [trainer.log_path / name for name in ("latest", "previous", "best")]
    there += trainer.log_path.glob("epoch_*")
    count = 4 + numbered - sum(path.is_file() for path in there)
    wanted = max(count, 1) * _checkpoint_bytes(trainer)
    free = shutil.disk_usage(trainer.log_path).free
    if free < wanted:
        print_log(
            f"low disk: {trainer.log_path} has {free / 1e6:.0f} MB left, and about {count} "
            f"checkpoints still to come take {wanted / 1e6:.0f} MB (LOG.SAVE_CHECKPOINT_FREQ "
            "and KEEP_CHECKPOINTS make them fewer)"
        )


def _checkpoint_bytes(trainer: Trainer) -> int:
    """The size of a checkpoint: networks, optimizer, moving average."""
    weights = sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
    student = sum(p.numel() * p.element_size() for p in trainer.model.student.parameters())
    groups = trainer.optimizer.param_groups
    trained = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
    slots = _SLOTS.get(type(trainer.optimizer).__name__, 2)
    return weights + slots * trained + (student if trainer.cfg.SOLVER.EMA else 0)


def default_hooks(cfg: Any, writes: bool = True) -> list[Hook]:
    """The hooks of a run; only one of its processes `writes` files."""
    common: list[Hook] = [QuantizeStudent()] if cfg.SOLVER.get("QAT_EPOCHS") else []
    common.append(Evaluate())
    common += [Probe()] if cfg.LOG.get("PROBE") else []
    common += [AverageStudent()] if cfg.SOLVER.EMA else []
    common += [EvaluatePeers()] if get_distiller(cfg.DISTILLER.TYPE).trains_peers else []
    common.append(Log())
    if not writes:
        return common
    writers: list[Hook] = [WorkLog(), MetricsFile(), TensorBoard()]
    if cfg.LOG.WANDB:
        writers.append(Wandb())
    return [*common, *writers, Checkpoint(cfg)]


class CheckpointStage(Hook):
    """Saves `latest`, from which an initialisation stage continues."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        facts = {"stage": trainer.stage, "stage_epoch": trainer.epoch, "step": trainer.step}
        Store(trainer.log_path).save(saved_state(trainer), LATEST, **facts)


def stage_hooks(writes: bool = True) -> list[Hook]:
    """The hooks of an initialisation stage; only one of its processes `writes` files."""
    return [Log(), *([TensorBoard(), CheckpointStage()] if writes else [])]
