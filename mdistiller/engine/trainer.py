"""The training loop. Other trainers replace a seam: `batch_inputs`, or `backward` and `update`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mdistiller.distillers.helpers.checks import logits_of, metrics_of, step_of
from mdistiller.engine.callbacks.default import complete_record, default_hooks
from mdistiller.engine.callbacks.guards import Guard
from mdistiller.engine.callbacks.logs import plain
from mdistiller.engine.callbacks.preemption import Pauses, shielded
from mdistiller.engine.checkpoints.resume import (
    Progress,
    begin_epoch,
    capture,
    restore,
    seed_everything,
)
from mdistiller.engine.distributed import (
    broadcast_buffers,
    is_main_process,
    unsynchronized,
    unwrap,
)
from mdistiller.engine.frozen_teacher.cache import TeacherCache
from mdistiller.engine.frozen_teacher.cacheable import is_wanted
from mdistiller.engine.hooks import Hook
from mdistiller.engine.metrics import Meters, NonFiniteLossError
from mdistiller.engine.optim import (
    autocast,
    build_optimizer,
    build_scheduler,
    step_scheduler,
    step_settings,
)
from mdistiller.engine.utils import correct_counts, validate
from mdistiller.engine.utils import progress as progress_bar
from mdistiller.registry import Registry, UserError
from mdistiller.runtime import rank

trainer_dict = Registry("trainer (SOLVER.TRAINER)")


@trainer_dict.register("crd")  # CRD needs no trainer of its own here; the name stays valid
@trainer_dict.register("base")
class BaseTrainer:
    """Trains a distiller by the sum of its loss terms.

    A batch of the loader is a micro-batch: SOLVER.ACCUMULATE of them in a row, the epoch's last
    group perhaps fewer, make one step of the optimizer, whose gradient is that of the mean loss
    over all their samples.

    Attributes that hooks and subclasses read: `cfg`, `distiller` (perhaps wrapped for several
    processes), `model` (never wrapped), `optimizer`, `scheduler`, `log_path`, `epoch` (the last
    finished one), `global_step`, `best_acc` (percent), `best_epoch`, `history` (one record per
    epoch), `hooks`, `stage` ("" but in a method's initialisation stage).

    A trainer that overrides `train_epoch` is saved, and stopped by signals, after epochs only.

    What a step's output says beside its losses, how the student is evaluated and what then counts
    are methods of their own: `measure`, `train_numbers`, `evaluate`, `progress_line`.

    Class attributes:
        selects: the key of the evaluation by which the best epoch is chosen, in percent.
        own_steps: whether the trainer steps the optimizer itself, so that the engine can neither
            accumulate gradients nor follow the weights. It is set by itself where a subclass
            overrides `train_epoch`, `train_iter` or `optimize`; one whose override only adds to
            what it inherits says `own_steps = False`.
        own_inputs: whether the trainer may change the images of a batch, so that logits remembered
            for the loader's would be wrong. Set by itself where a subclass overrides
            `batch_inputs`; one that leaves the images as they are says `own_inputs = False`.
    """

    stage = ""
    selects: ClassVar[str] = "test_acc"
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
        self.optimizer = self.init_optimizer(cfg)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = self.init_scheduler(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.SOLVER.AMP == "fp16")
        self.accumulate = cfg.SOLVER.ACCUMULATE
        self.epoch = 0
        self.step = 0
        self.best_acc = -1.0
        self.best_epoch = 0
        self.history: list[dict[str, float]] = []
        self.init_state: dict[str, Any] | None = None  # of a run that stopped in such a stage
        self.teacher_cache = self.make_cache() if is_wanted(cfg) else None
        self.position: dict[str, Any] | None = None  # in an epoch: to go on from, or to save
        self.guard = Guard(cfg.SOLVER.SKIP_NONFINITE, self.device)
        self.pauses = Pauses(cfg.LOG.SAVE_EVERY_MINUTES, cfg.SOLVER.RANK_TIMEOUT)
        self.hooks = self.make_hooks(cfg)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if {"train_epoch", "train_iter", "optimize"} & set(vars(cls)):
            cls.own_steps = vars(cls).get("own_steps", True)
        if "batch_inputs" in vars(cls):
            cls.own_inputs = vars(cls).get("own_inputs", True)

    @classmethod
    def check(cls, cfg: Any, train_loader: Any = None) -> None:
        """Refuse settings that this trainer, or so short an epoch, cannot follow."""
        solver = cfg.SOLVER
        wanted = [key for key in ("EMA", "SKIP_NONFINITE") if solver[key]]
        wanted += ["ACCUMULATE"] if solver.ACCUMULATE > 1 else []
        if cls.own_steps and wanted:
            raise UserError(
                f"SOLVER.{wanted[-1]} has no effect on SOLVER.TRAINER {solver.TRAINER}, which "
                f"makes its steps itself: leave it out, or set {cls.__name__}.own_steps = False if "
                "it calls super()"
            )
        if is_wanted(cfg) and (cls.own_steps or cls.own_inputs):
            part, flag = ("steps", "own_steps") if cls.own_steps else ("inputs", "own_inputs")
            raise UserError(
                f"DISTILLER.TEACHER_CACHE {cfg.DISTILLER.TEACHER_CACHE}: SOLVER.TRAINER "
                f"{solver.TRAINER} makes its {part} itself; set it to none, or "
                f"{cls.__name__}.{flag} = False if that only adds to what it inherits"
            )
        if solver.ACCUMULATE > 1 and train_loader is not None:
            batches = len(train_loader)
            if batches < solver.ACCUMULATE:
                raise UserError(
                    f"SOLVER.ACCUMULATE {solver.ACCUMULATE} is more than the {batches} batches of "
                    f"an epoch (SOLVER.BATCH_SIZE {solver.BATCH_SIZE} a process); lower it"
                )

    def make_hooks(self, cfg: Any) -> list[Hook]:
        """What happens beside the steps, in order."""
        return default_hooks(cfg, writes=is_main_process())

    def make_cache(self) -> TeacherCache:
        """What remembers the teacher's logits."""
        return TeacherCache(self.cfg, self.model, self.train_loader)

    def init_optimizer(self, cfg: Any) -> Optimizer:
        """The optimizer over the distiller's parameter groups."""
        return build_optimizer(self.model.param_groups(), cfg.SOLVER)

    def init_scheduler(self, cfg: Any) -> LRScheduler:
        """The schedule of the learning rate, which :meth:`end_epoch` moves on."""
        return build_scheduler(self.optimizer, cfg.SOLVER)

    def end_epoch(self, train_loss: float) -> None:
        """Move the schedule on by an epoch, whose mean training loss was `train_loss`."""
        step_scheduler(self.scheduler, train_loss)

    def step_settings(self) -> dict[str, Any]:
        """What of the config decides about steps and rates.

        A run that is resumed with other values goes on by them, its schedule begun anew.
        """
        return step_settings(self.cfg.SOLVER)

    def restart_schedule(self, losses: Sequence[float]) -> None:
        """Begin the schedule anew, and bring it to where it is after epochs with these losses."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        self.scheduler = self.init_scheduler(self.cfg)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for loss in losses:
                self.end_epoch(loss)

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
        for hook in self.hooks:
            hook.before_train(self)
        with shielded():
            if self.epoch == 0 and self.position is None:
                self.initialize()
            epochs = self.cfg.SOLVER.EPOCHS
            for epoch in range(self.epoch + 1, epochs + 1):
                self.train_epoch(epoch)
                self.epoch, self.step = epoch, 0
                if epoch < epochs or self.stage:
                    self.pauses.after_epoch(self, epoch)
        for hook in self.hooks:
            hook.after_train(self)

    @property
    def fresh(self) -> bool:
        """Whether nothing of the run has been trained and saved yet."""
        return self.epoch == 0 and self.init_state is None and self.position is None

    def initialize(self) -> None:
        """Run the stages that the method has before the main one."""
        from mdistiller.engine.init_stage import run_init_stages  # which builds on this trainer

        run_init_stages(self)

    def seed_epoch(self, epoch: int) -> None:
        """Settle all randomness of an epoch by (seed, epoch, rank): a resumed run repeats it."""
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch, rank())
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(epoch)

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training data, then the hooks: evaluate, log, save."""
        progress = begin_epoch(self, epoch)
        if self.teacher_cache is not None:
            self.teacher_cache.begin(self.step, progress.known)
        try:
            self._take_steps(progress)
            means = progress.meters.averages(self.device)
            self.guard.read()
        except NonFiniteLossError as error:
            raise self.guard.report(self, error) from None
        cached = {} if self.teacher_cache is None else self.teacher_cache.finish()
        seconds = progress.seconds
        record = {
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.train_numbers(means),
            "images_per_second": len(self.train_loader.dataset) / seconds,
            "seconds": seconds,
            **cached,
        }
        self.end_epoch(record["train_loss"])
        broadcast_buffers(self.model)
        self.epoch, self.step = epoch, 0
        complete_record(self, epoch, record)

    def _take_steps(self, progress: Progress) -> None:
        """The batches that are left of an epoch."""
        epoch, meters = progress.epoch, progress.meters
        title, batches = f"{self.stage} epoch {epoch}".strip(), len(self.train_loader)
        first = self.step + 1
        bar = progress_bar(progress.batches, title, batches, first - 1)
        for self.step, data in enumerate(bar, start=first):
            message = self.train_iter(data, epoch, meters)
            bar.set_postfix_str(message or f"loss {meters['losses'].avg:.3f}", refresh=False)
            if self.global_step % self.cfg.LOG.TENSORBOARD_FREQ == 0:
                meters.flush()
                self.guard.read()
                for hook in self.hooks:
                    hook.after_steps(self, meters)
            if self.ends_step:
                self.pauses.after_step(self, progress)

    def train_iter(self, data: Sequence[Any], epoch: int, train_meters: Meters) -> str:
        """Learn from a micro-batch; returns what to show beside the bar ("" for the mean loss)."""
        inputs = self.batch_inputs(data, epoch)
        if self.teacher_cache is not None:
            inputs["teacher_logits"] = self.teacher_cache.logits(self.step - 1)
        self.guard.begin(self, inputs)
        with contextlib.nullcontext() if self.ends_step else unsynchronized(self.distiller):
            with autocast(self.device, self.cfg.SOLVER.AMP):
                output, losses = step_of(self.model, self.distiller(**inputs))
            self.guard.see(losses)
            numbers, samples = self.measure(output, inputs)
            train_meters.add(
                f"{self.stage} epoch {epoch}, step {self.step}".strip(),
                losses,
                {**numbers, **metrics_of(self.model, self.device)},
                samples,
            )
            self.optimize(losses)
        return ""

    def measure(self, output: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Means over a micro-batch to average over an epoch, and the number of its samples.

        Args:
            output: what the distiller returned beside its losses: logits.
            inputs: what it was given.
        """
        target = inputs["target"]
        logits = logits_of(self.model, output, len(target))
        hits = correct_counts(logits, target) * (100.0 / len(target))
        return {"top1": hits[0], "top5": hits[1]}, len(target)

    def train_numbers(self, means: dict[str, float]) -> dict[str, float]:
        """An epoch's means as its record names them."""
        accuracy, loss = means.pop("top1", 0.0), means.pop("losses", 0.0)
        others = {f"train_{name}": value for name, value in means.items()}
        return {"train_acc": accuracy, "train_loss": loss, **others}

    def evaluate(self) -> dict[str, float]:
        """How the student does on `val_loader`, for the epoch's record: also :attr:`selects`."""
        top1, top5, loss = validate(self.val_loader, self.distiller)
        return {"test_acc": top1, "test_acc_top5": top5, "test_loss": loss}

    def progress_line(self, record: dict[str, Any]) -> str:
        """What is printed of an epoch, between its learning rate and its speed."""
        known = f"teacher hits {record['teacher_hits']:.0f} %  " if "teacher_hits" in record else ""
        averaged = f"ema acc {record['ema_test_acc']:.2f}  " if "ema_test_acc" in record else ""
        return (
            f"train loss {record['train_loss']:.4f} acc {record['train_acc']:.2f}  "
            f"test loss {record['test_loss']:.4f} acc {record['test_acc']:.2f} "
            f"(best {self.best_acc:.2f})  {averaged}{known}"
        )

    def batch_inputs(self, data: Sequence[Any], epoch: int) -> dict[str, Any]:
        """Keyword arguments of the distiller for a loader's item (image, target, index, ...)."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(self.device, non_blocking=True)
            return [move(item) for item in value]

        names = ("image", "target", "index", "contrastive_index")
        return {"epoch": epoch, **dict(zip(names, map(move, data), strict=False))}

    def optimize(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of a micro-batch; the last one of a step moves the weights."""
        if self.begins_step:
            self.optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        if self.ends_step and self.guard.passes(self, self.gradients()):
            self.update()
            for hook in self.hooks:
                hook.after_update(self)

    @property
    def begins_step(self) -> bool:
        """Whether this micro-batch is the first one of its optimizer step."""
        return (self.step - 1) % self.accumulate == 0

    @property
    def ends_step(self) -> bool:
        """Whether this micro-batch is the last one of its optimizer step."""
        return self.step % self.accumulate == 0 or self.step == len(self.train_loader)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of the summed terms to those at hand."""
        total = torch.stack([loss.mean() for loss in losses.values()]).sum() * self.loss_weight()
        self.scaler.scale(total).backward()

    def gradients(self) -> list[Tensor]:
        """All that the coming step moves the weights by."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p.grad for p in params if p.grad is not None]

    def update(self) -> None:
        """One optimizer step by the gradients at hand."""
        self.clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def loss_weight(self) -> float:
        """Share of this process's micro-batch in the optimizer step, times the processes."""
        weight = getattr(self.train_loader, "loss_weight", None)
        if weight is not None:
            share: float = weight(self.step - 1, self.accumulate)
            return share
        if self.accumulate == 1:
            return 1.0
        done = (self.step - 1) // self.accumulate * self.accumulate
        return 1 / min(self.accumulate, len(self.train_loader) - done)  # taken as equally large

    def clip_gradients(self) -> None:
        """Scale the gradients down to SOLVER.CLIP_GRAD_NORM, if that is set."""
        limit = self.cfg.SOLVER.CLIP_GRAD_NORM
        if limit:
            self.scaler.unscale_(self.optimizer)
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, limit)

    def log(self, lr: float, epoch: int, log_dict: dict[str, float]) -> None:
        """Keep an epoch's numbers, and write them to every log; override to add your own."""
        log_dict = plain(log_dict)  # a user's trainer may give tensors
        accuracy = float(log_dict.get(self.selects, -1.0))
        if accuracy >= self.best_acc:  # ties: the later one, as the files have it
            self.best_acc, self.best_epoch = accuracy, epoch
        self.history.append({"epoch": epoch, "lr": lr, **log_dict})
        for hook in self.hooks:
            hook.write(self, epoch, {"lr": lr, **log_dict})

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain values and tensors; override to add to it."""
        return capture(self)

    def resume(self) -> None:
        """Continue from the run's newest good checkpoint; those of the original work as well."""
        restore(self)

    def save(self) -> None:
        """Have the hooks keep the state, between two steps."""
        for hook in self.hooks:
            hook.save(self)


__all__ = ["BaseTrainer", "Meters", "NonFiniteLossError", "seed_everything", "trainer_dict"]
