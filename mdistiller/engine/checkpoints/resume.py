"""What a checkpoint holds, and how a run resumes from one: after an epoch, or within one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mdistiller.console import print_log
from mdistiller.dataset import first_difference
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.distributed import (
    barrier,
    from_main_process,
    of_all_processes,
    rank,
    world_size,
)
from mdistiller.engine.checkpoints.store import Store
from mdistiller.engine.checkpoints.write import file_entries, load_state, strip_prefix
from mdistiller.engine.hooks import Trainer
from mdistiller.engine.metrics import Meters
from mdistiller.models.normalize import input_norm
from mdistiller.registry import UserError

Position = dict[str, Any]


_waited = threading.local()


def run_clock() -> float:
    """Seconds, as of `time.perf_counter`, in which the run of this thread did not wait for others.

    Runs in lock-step each count their own time.
    """
    return time.perf_counter() - getattr(_waited, "seconds", 0.0)


def add_waited(seconds: float) -> None:
    """Subtract seconds of waiting from :func:`run_clock`."""
    _waited.seconds = getattr(_waited, "seconds", 0.0) + seconds


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch from a tuple of whole numbers."""
    words = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of Python, numpy, torch and the device, as plain values."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":  # perhaps not the current one
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the result of :func:`random_state`, as far as the kind of device is the same."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


@dataclass
class Progress:
    """An epoch under way.

    Attributes:
        epoch: its number.
        meters: running means.
        started: on :func:`run_clock`, moved back by the time before an interruption.
        batches: the remaining ones.
    """

    epoch: int
    meters: Meters
    started: float
    batches: Iterable[Any] = field(default_factory=tuple)

    @property
    def seconds(self) -> float:
        """Seconds of the epoch so far."""
        return run_clock() - self.started


def begin_epoch(trainer: Trainer, epoch: int) -> Progress:
    """Seed and begin an epoch, or continue it from the checkpoint's position."""
    trainer.seed_epoch(epoch)
    meters = Meters(
        interval=1 if trainer.device.type == "cpu" else 50,
        tolerant=trainer.cfg.SOLVER.SKIP_NONFINITE > 0,
    )
    progress = Progress(epoch, meters, run_clock(), trainer.train_loader)
    position, trainer.position = trainer.position, None
    trainer.distiller.train()
    if position is None or position["epoch"] != epoch:
        trainer.step = 0
        trainer.call("before_epoch", {})
        return progress
    progress.batches = _batches_after(trainer.train_loader, trainer.step)
    progress.started -= position["seconds"]
    processes = position["processes"]
    saved: Mapping[str, Any] = {}
    if len(processes) == world_size():
        saved = processes[rank()]
        meters.restore([saved["meters"]])
        set_random_state(saved["random"], trainer.device)
    else:  # other processes draw other numbers
        seed_everything(trainer.cfg.EXPERIMENT.SEED, epoch, rank(), trainer.step)
        sums = [process["meters"] for process in processes]
        meters.restore(sums if rank() == 0 else [dict.fromkeys(sums[0], (0.0, 0.0, 0.0))])
    trainer.call("before_epoch", saved)
    return progress


def _batches_after(loader: Any, start: int) -> Iterable[Any]:
    """The batches of an epoch without the first `start`."""
    if isinstance(loader, TrainLoader):
        loader.set_epoch(loader.epoch, start)
        return iter(loader)
    batches = iter(loader)
    if not hasattr(loader, "load_state_dict"):  # a loader that cannot skip makes them all
        for _ in islice(batches, start):
            pass
    return batches


def current_position(trainer: Trainer) -> Position:
    """The position of all processes in an epoch, between two optimizer steps; all call this
    together.

    Raises:
        NonFiniteLossError: an earlier step had a non-finite loss.
    """
    progress = trainer.progress
    progress.meters.flush()
    state: dict[str, Any] = {}
    for hook in trainer.hooks:
        state |= hook.epoch_state(trainer)
    state |= {"meters": progress.meters.sums(), "random": random_state(trainer.device)}
    return {
        "epoch": progress.epoch,
        "updates": -(-trainer.step // trainer.accumulate),
        "seconds": progress.seconds,
        "processes": of_all_processes(state),
    }


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state that a resumed run needs, as plain values and tensors."""
    return {
        "epoch": trainer.epoch,
        "position": trainer.position,
        "model": trainer.model.state_dict(),
        "norm": input_norm(trainer.model.student),
        **{k: v for k, v in file_entries(trainer.model.student).items() if k == "data"},
        **schedule_state(trainer),
        "best_acc": trainer.best_acc,
        "best_epoch": trainer.best_epoch,
        "best_score": trainer.best_score,
        "history": trainer.history,
        "log_sizes": {
            name: size for hook in trainer.hooks for name, size in hook.sizes(trainer).items()
        },
        **{key: value for hook in trainer.hooks for key, value in hook.state(trainer).items()},
    }


def schedule_state(trainer: Trainer) -> dict[str, Any]:
    """State of optimizer, schedule and scaler, and the settings it belongs to."""
    names = ("optimizer", "scheduler", "scaler")
    state = {name: getattr(trainer, name).state_dict() for name in names}
    return {**state, "settings": _settings(trainer)}


def _settings(trainer: Trainer) -> dict[str, Any]:
    return {"optimizer": type(trainer.optimizer).__name__, **trainer.step_settings()}


def restore_schedule(trainer: Trainer, saved: Mapping[str, Any], path: Path) -> None:
    """Restore the result of :func:`schedule_state`, as far as the config has not changed since.

    Weight decay, momentum and the like come from the config; so does the schedule, which is set to
    where it would be now. Another kind of optimizer starts without state.
    """
    optimizer, now = trainer.optimizer, _settings(trainer)
    before = saved.get("settings", now)  # older files do not say
    configured = [dict(group) for group in optimizer.param_groups]
    if before["optimizer"] == now["optimizer"]:
        for group, own in zip(saved["optimizer"]["param_groups"], configured, strict=False):
            if "capturable" in own:  # SOLVER.CUDA_GRAPHS sets it for as long as it is on
                group["capturable"] = own["capturable"]
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise UserError(f"{path}: its optimizer state does not fit: {error}") from None
    else:
        print_log("another optimizer: it starts without state")
    trainer.scaler.load_state_dict(saved.get("scaler", {}) or trainer.scaler.state_dict())
    if "scheduler" in saved and before == now:
        trainer.scheduler.load_state_dict(saved["scheduler"])
        return
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update({key: settings[key] for key in settings if key != "params"})
    losses = [record.get("train_loss", 0.0) for record in trainer.history]
    unknown = trainer.epoch - len(losses)  # of runs of the original, and in stages
    if unknown and isinstance(trainer.scheduler, ReduceLROnPlateau):
        raise UserError(
            f"{path} holds no schedule, and a plateau depends on all epochs before: choose another "
            "SOLVER.SCHEDULE"
        )
    trainer.restart_schedule([*[0.0] * unknown, *losses])


def restore(trainer: Trainer) -> None:
    """Continue from the newest good checkpoint; those of the original work as well."""
    store = Store(trainer.log_path)
    name = from_main_process(lambda: store.newest()[0])
    path, state = trainer.log_path / name, store.load(name)
    barrier()
    if rank() == 0:
        store.put_aside(name)
    _check_classes(trainer, state, path)
    load_state(trainer.model, strip_prefix(state["model"], "module."), f"{path} and this config")
    trainer.epoch = int(state["epoch"])
    trainer.best_acc = float(state.get("best_acc", -1.0))
    trainer.best_epoch = int(state.get("best_epoch", 0))
    trainer.best_score = float(state.get("best_score", trainer.best_acc))
    trainer.history = state.get("history", [])
    trainer.init_state = state.get("init")
    restore_position(trainer, state.get("position"))
    restore_schedule(trainer, state, path)
    for hook in trainer.hooks:
        hook.on_resume(trainer, state.get("log_sizes", {}))
        hook.load_state(trainer, state)
    within = f", within epoch {trainer.position['epoch']}" if trainer.position else ""
    print_log(f"continuing from {path}: epoch {trainer.epoch} done{within}")


def _check_classes(trainer: Trainer, state: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume with data whose class names or their order have changed."""
    before, now = (
        (entries.get("data") or {}).get("classes")
        for entries in (state, file_entries(trainer.model.student))
    )
    difference = first_difference(now, before) if before and now else ""
    if difference:
        raise UserError(f"{path} is of a run on other classes: {difference}")


def restore_position(trainer: Trainer, position: Position | None) -> None:
    """Continue at a checkpoint's position within an epoch."""
    trainer.position = position
    if position is not None:
        batches = len(trainer.train_loader)
        trainer.step = min(int(position["updates"]) * trainer.accumulate, batches)
