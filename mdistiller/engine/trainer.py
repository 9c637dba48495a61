"""The training loop. Other trainers override `batch_inputs`, or `backward` and `update`.

`optimization.py` turns the gradients of micro-batches into optimizer steps; `classification.py`
has the metrics.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mdistiller.console import progress as progress_bar
from mdistiller.distillers.helpers.training.checks import metrics_of, step_of
from mdistiller.distributed import (
    broadcast_buffers,
    is_main_process,
    unsynchronized,
    unwrap,
    wrap,
)
from mdistiller.engine.callbacks.default import complete_record, default_hooks, stage_hooks
from mdistiller.engine.callbacks.logs import AppendedFile, plain
from mdistiller.engine.callbacks.non_finite import NonFiniteGuard
from mdistiller.engine.callbacks.preemption import PreemptionHandler, defer_signals
from mdistiller.engine.callbacks.teacher_cache import TeacherCache
from mdistiller.engine.captured import check_settings, step_function
from mdistiller.engine.checkpoints.resume import (
    begin_epoch,
    capture,
    restore,
    restore_position,
    restore_schedule,
    schedule_state,
    seed_everything,
)
from mdistiller.engine.classification import Classification
from mdistiller.engine.hooks import Hook
from mdistiller.engine.metrics import Meters, NonFiniteLossError
from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.optim.param_groups import student_groups
from mdistiller.engine.optim.schedules import by_step
from mdistiller.engine.optimization import Optimization
from mdistiller.engine.stages import STRIDE, Stage, stages_left
from mdistiller.engine.trainer_checks import check_trainer_settings
from mdistiller.frozen_teacher.cacheable import is_wanted
from mdistiller.registry import Registry
from mdistiller.runtime import autocast, rank, world_size

trainer_dict = Registry("trainer (SOLVER.TRAINER)")


@trainer_dict.register("crd")  # CRD needs no trainer of its own here; the name stays valid
@trainer_dict.register("base")
class BaseTrainer(Classification, Optimization):
    """Trains a distiller by the sum of its loss terms.

    A batch of the loader is a micro-batch: SOLVER.ACCUMULATE of them in a row, the epoch's last
    group perhaps fewer, make one step of the optimizer, whose gradient is that of the mean loss
    over all their samples.

    Attributes that hooks and subclasses read: `cfg`, `distiller` (perhaps wrapped for several
    processes), `model` (never wrapped), `optimizer`, `scheduler`, `log_path`, `epoch` (the last
    finished one), `global_step`, `best_acc` (percent), `best_epoch`, `best_score` (by
    LOG.SELECT_BY), `history` (one record per epoch), `hooks`, `stage` ("" but in a method's
    initialisation stage).

    A trainer that overrides `train_epoch` can be saved, and stopped by signals, only after epochs.

    Override what :class:`Classification` has (`measure`, `evaluate`, ...) for another task's
    metrics, `selects` among them.

    Class attributes:
        own_steps: whether the trainer steps the optimizer itself, so that the engine can neither
            accumulate gradients nor follow the weights. It is set by itself where a subclass
            overrides `train_epoch`, `train_iter` or `optimize`; one whose override only adds to
            what it inherits says `own_steps = False`.
        own_inputs: whether the trainer may change the images of a batch, so that logits remembered
            for the loader's would be wrong. Set by itself where a subclass overrides
            `batch_inputs`; one that leaves the images as they are says `own_inputs = False`.
    """

    stage = ""
    own_steps: ClassVar[bool] = False
    own_inputs: ClassVar[bool] = False

    def __init__(
        self,
        experiment_name: str,
        distiller: nn.Module,
        train_loader: Any,
        val_loader: Any,
        cfg: Any,
    ):
        self.check(cfg, train_loader)
        self.cfg = cfg
        self.distiller = distiller
        self.model: Any = unwrap(distiller)
        self.device = next(self.model.parameters()).device
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.log_path = Path(cfg.LOG.PREFIX) / experiment_name
        self.accumulate = cfg.SOLVER.ACCUMULATE
        self.optimizer = self.init_optimizer(cfg)
        self.check_rates()
        self.schedule_by_step = by_step(self.solver_cfg)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = self.init_scheduler(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.SOLVER.AMP == "fp16")
        self.processes = world_size()
        self.epoch = 0
        self.step = 0
        self.best_acc = -1.0
        self.best_epoch = 0
        self.best_score = -math.inf
        self.history: list[dict[str, float]] = []
        self.init_state: dict[str, Any] | None = None  # of a run that stopped in such a stage
        self.progress: Any = None  # of the epoch under way
        self.position: dict[str, Any] | None = None  # in an epoch: to continue from, or to save
        self.autocast = autocast(self.device, cfg.SOLVER.AMP)
        self.guard = NonFiniteGuard(cfg.SOLVER.SKIP_NONFINITE, self.device)
        self.preemption = PreemptionHandler(cfg.LOG.SAVE_EVERY_MINUTES, cfg.SOLVER.RANK_TIMEOUT)
        self.hooks = [self.guard, *self.make_hooks(cfg), self.preemption]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if {"train_epoch", "train_iter", "optimize"} & set(vars(cls)):
            cls.own_steps = vars(cls).get("own_steps", True)
        if "batch_inputs" in vars(cls):
            cls.own_inputs = vars(cls).get("own_inputs", True)

    @classmethod
    def check(cls, cfg: Any, train_loader: Any = None) -> None:
        """Refuse settings that this trainer, or so short an epoch, cannot follow."""
        check_settings(cfg, plain=cls in (BaseTrainer, InitTrainer))
        check_trainer_settings(cls, cfg, train_loader)

    def make_hooks(self, cfg: Any) -> list[Hook]:
        """The hooks, in order, between the NaN guard and the handler of signals."""
        hooks = default_hooks(cfg, writes=is_main_process())
        if is_wanted(cfg):
            hooks.insert(0, TeacherCache(cfg, self.model, self.train_loader))
        return hooks

    @property
    def global_step(self) -> int:
        """Micro-batches since the start of training."""
        return self.epoch * len(self.train_loader) + self.step

    def train(self, resume: bool = False) -> None:
        """Run all epochs, or those after the last checkpoint."""
        if resume:
            self.resume()
        if is_main_process():
            self.log_path.mkdir(parents=True, exist_ok=True)
        self.call("before_train")
        with defer_signals():
            if self.epoch == 0 and self.position is None:
                self.initialize()
            for epoch in range(self.epoch + 1, self.epochs + 1):
                self.train_epoch(epoch)
                self.epoch, self.step = epoch, 0  # a `train_epoch` of a fork leaves them
                if epoch < self.epochs or self.stage:
                    self.preemption.between_epochs(self, epoch)
        self.call("after_train")

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training data, then the hooks: evaluate, log, save."""
        meters, batches = self.start_epoch(epoch)
        first, take_step = self.step + 1, step_function(self)  # `train_iter`, or replays of it
        before = self.global_step - self.step
        with self.guard.reporting(self):
            for self.step, data in enumerate(batches, start=first):
                message = take_step(data, epoch, meters)
                if not batches.disable:  # on a terminal
                    batches.set_postfix_str(message or f"loss {meters.loss:.3f}", refresh=False)
                if (before + self.step) % self.cfg.LOG.TENSORBOARD_FREQ == 0:
                    meters.flush()
                    self.call("after_steps", meters)  # step curves
                self.call("after_step")  # timed saves, signals
            record = self.epoch_record(meters)
        self.end_epoch(record["train_loss"])
        broadcast_buffers(self.model)
        self.epoch, self.step = epoch, 0
        complete_record(self, epoch, record)  # the hooks' `after_epoch`

    def train_iter(self, data: Sequence[Any], epoch: int, train_meters: Meters) -> str:
        """Learn from a micro-batch; returns what to show beside the bar ("" for the mean loss)."""
        inputs = self.batch_inputs(data, epoch)
        self.call("before_forward", inputs)  # the teacher's cached logits
        with contextlib.nullcontext() if self.ends_step else unsynchronized(self.distiller):
            with self.autocast:
                output, losses = step_of(self.model, self.distiller(**inputs))
            self.call("after_forward", losses)  # the guard against non-finite losses
            numbers, samples = self.measure(output, inputs)
            numbers |= metrics_of(self.model, self.device)
            label = f"{self.stage} epoch {epoch}, step {self.step}".strip()
            train_meters.add(label, losses, numbers, samples)
            self.optimize(losses)  # backward; at a group's end clip and step
        return ""

    def start_epoch(self, epoch: int) -> tuple[Meters, Any]:
        """Begin or resume an epoch; returns its meters, and its batches with a progress bar."""
        self.progress = begin_epoch(self, epoch)
        title, batches = f"{self.stage} epoch {epoch}".strip(), len(self.train_loader)
        bar = progress_bar(self.progress.batches, title, batches, self.step)
        return self.progress.meters, bar

    def epoch_record(self, meters: Meters) -> dict[str, Any]:
        """The epoch's record: learning rate, training means, speed."""
        means = meters.averages(self.device)
        of_hooks: dict[str, float] = {}
        for hook in self.hooks:
            of_hooks |= hook.epoch_numbers(self)
        seconds = self.progress.seconds
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.train_numbers(means),
            "images_per_second": len(self.train_loader.dataset) / seconds,
            "seconds": seconds,
            **of_hooks,
        }

    def call(self, moment: str, *args: Any) -> None:
        """Call a method of every hook that has it, in order (see `hooks.py`)."""
        for hook in self.hooks:
            if moment in hook.moments:
                getattr(hook, moment)(self, *args)

    @property
    def epochs(self) -> int:
        """Epochs of the stage."""
        epochs: int = self.cfg.SOLVER.EPOCHS
        return epochs

    @property
    def fresh(self) -> bool:
        """Whether nothing of the run has been trained and saved yet."""
        return self.epoch == 0 and self.init_state is None and self.position is None

    def initialize(self) -> None:
        """Train the method's initialisation stages, or those that a resumed run has left."""
        saved = self.init_state
        for stage in stages_left(self.model, saved, self.cfg.SOLVER):
            trainer = InitTrainer(self, stage)
            if saved is not None and saved["stage"] == stage.name:
                trainer.load(saved)
            trainer.train()
        self.init_state = None

    def seed_epoch(self, epoch: int) -> None:
        """Seed all generators from (seed, epoch, rank), so that a resumed run repeats the epoch."""
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch, rank())
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(epoch)

    def epochs_left(self, epoch: int) -> int:
        """Epochs of the run after this one."""
        return self.epochs - epoch

    def batch_inputs(self, data: Sequence[Any], epoch: int) -> dict[str, Any]:
        """Keyword arguments of the distiller for a loader's item (image, target, index, ...)."""
        names = ("image", "target", "index", "contrastive_index")
        inputs: dict[str, Any] = {"epoch": epoch}
        for name, value in zip(names, data, strict=False):
            if isinstance(value, Tensor):
                inputs[name] = value.to(self.device, non_blocking=True)
            else:  # two views
                inputs[name] = [view.to(self.device, non_blocking=True) for view in value]
        return inputs

    def log(self, lr: float, epoch: int, log_dict: dict[str, float]) -> None:
        """Append an epoch's record to `history` and write it to every log; override to add your
        own."""
        log_dict = plain(log_dict)  # a user's trainer may give tensors
        score = self.score(log_dict)
        if score >= self.best_score:  # ties: the later one, as the files have it
            self.best_score, self.best_epoch = score, epoch
            self.best_acc = float(log_dict.get(self.selects, -1.0))
        self.history.append({"epoch": epoch, "lr": lr, **log_dict})
        self.call("write", epoch, {"lr": lr, **log_dict})

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain values and tensors; override to add to it."""
        return capture(self)

    def resume(self) -> None:
        """Continue from the run's newest good checkpoint; those of the original work as well."""
        restore(self)

    def save(self) -> None:
        """Save a mid-epoch checkpoint, between two optimizer steps."""
        self.call("save")


class InitTrainer(BaseTrainer):
    """Trains an initialisation stage with its own optimizer, for the run's trainer.

    Its steps are plain ones, SOLVER.TYPE on the sum of the stage's terms, whatever the run's
    trainer does; only `batch_inputs` is that trainer's. Epochs, learning rate and schedule are the
    stage's; all other SOLVER settings hold.
    """

    own_inputs: ClassVar[bool] = False

    def __init__(self, main: BaseTrainer, stage: Stage):
        self.main, self.plan = main, stage
        wrapped = wrap(main.model, main.cfg.SOLVER.FIND_UNUSED_PARAMETERS)
        super().__init__("", wrapped, main.train_loader, main.val_loader, main.cfg)
        self.log_path, self.stage = main.log_path, stage.name

    def make_hooks(self, cfg: Any) -> list[Hook]:
        return stage_hooks(writes=is_main_process())

    def init_optimizer(self, cfg: Any) -> Optimizer:
        groups = student_groups(self.plan.groups, self.plan.solver, self.model)
        return build_optimizer(groups, self.plan.solver)

    @property
    def solver_cfg(self) -> Any:
        return self.plan.solver

    @property
    def epochs(self) -> int:
        epochs: int = self.plan.solver.EPOCHS
        return epochs

    def columns(self, record: dict[str, Any]) -> dict[str, str]:
        """Nothing: the student is not evaluated."""
        return {}

    def epochs_left(self, epoch: int) -> int:
        """Epochs of this stage, of later ones and of the main training."""
        later = list(self.model.init_stages().values())[self.plan.number :]
        return self.epochs - epoch + sum(part.init.epochs for part in later) + self.main.epochs

    def initialize(self) -> None:
        """Does nothing: stages have no stages before them."""

    def seed_epoch(self, epoch: int) -> None:
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch, rank(), self.plan.number)
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(self.plan.number * STRIDE + epoch)

    def batch_inputs(self, data: Sequence[Any], epoch: int) -> dict[str, Any]:
        return self.main.batch_inputs(data, epoch)

    def log(self, lr: float, epoch: int, log_dict: dict[str, float]) -> None:
        """Write an epoch's numbers to the files of the run and to TensorBoard."""
        files = [hook for hook in self.main.hooks if isinstance(hook, AppendedFile)]
        for hook in [*files, *self.hooks]:
            hook.write(self, epoch, {"lr": lr, **log_dict})

    def state(self) -> dict[str, Any]:
        """The run's state, and under "init" what the stage adds to it."""
        names = {"stage": self.stage, "epoch": self.epoch, "position": self.position}
        return {**self.main.state(), "init": {**names, **schedule_state(self)}}

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`state` holds under "init"."""
        self.epoch = saved["epoch"]
        restore_schedule(self, saved, self.log_path)
        restore_position(self, saved.get("position"))


__all__ = ["BaseTrainer", "Meters", "NonFiniteLossError", "seed_everything", "trainer_dict"]
