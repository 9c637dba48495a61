"""The training loop. Other trainers replace a seam: `batch_inputs`, or `backward` and `update`."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mdistiller.engine.cacheable import is_wanted
from mdistiller.engine.checkpoint import load_checkpoint, load_state, strip_prefix
from mdistiller.engine.distributed import (
    broadcast_buffers,
    is_main_process,
    unsynchronized,
    unwrap,
)
from mdistiller.engine.hooks import Hook, default_hooks
from mdistiller.engine.metrics import Meters, NonFiniteLossError
from mdistiller.engine.optim import (
    autocast,
    build_optimizer,
    build_scheduler,
    restart_scheduler,
    step_scheduler,
)
from mdistiller.engine.teacher_cache import TeacherCache
from mdistiller.engine.utils import correct_counts, progress
from mdistiller.models._input import input_norm
from mdistiller.registry import Registry, UserError
from mdistiller.runtime import rank

trainer_dict = Registry("trainer (SOLVER.TRAINER)")


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch from a tuple of whole numbers."""
    words = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


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
        self.optimizer = self.init_optimizer(cfg)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = build_scheduler(self.optimizer, cfg.SOLVER)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.SOLVER.AMP == "fp16")
        self.accumulate = cfg.SOLVER.ACCUMULATE
        self.epoch = 0
        self.step = 0
        self.best_acc = -1.0
        self.best_epoch = 0
        self.history: list[dict[str, float]] = []
        self.init_state: dict[str, Any] | None = None  # of a run that stopped in such a stage
        self.teacher_cache = self.make_cache() if is_wanted(cfg) else None
        self.hooks: list[Hook] = default_hooks(cfg, writes=is_main_process())

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
        if cls.own_steps and (solver.ACCUMULATE > 1 or solver.EMA):
            key = "SOLVER.ACCUMULATE" if solver.ACCUMULATE > 1 else "SOLVER.EMA"
            raise UserError(
                f"{key} has no effect on SOLVER.TRAINER {solver.TRAINER}, which makes its steps "
                f"itself: leave it out, or set {cls.__name__}.own_steps = False if it calls super()"
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

    def make_cache(self) -> TeacherCache:
        """What remembers the teacher's logits."""
        return TeacherCache(self.cfg, self.model, self.train_loader)

    def init_optimizer(self, cfg: Any) -> Optimizer:
        """The optimizer over the distiller's parameter groups."""
        return build_optimizer(self.model.param_groups(), cfg.SOLVER)

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
        if self.epoch == 0:
            self.initialize()
        for epoch in range(self.epoch + 1, self.cfg.SOLVER.EPOCHS + 1):
            self.train_epoch(epoch)
            self.epoch, self.step = epoch, 0
        for hook in self.hooks:
            hook.after_train(self)

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
        self.seed_epoch(epoch)
        self.distiller.train()
        meters = Meters(interval=1 if self.device.type == "cpu" else 50)
        started = time.perf_counter()
        if self.teacher_cache is not None:
            self.teacher_cache.begin()
        bar = progress(self.train_loader, f"{self.stage} epoch {epoch}".strip())
        for self.step, data in enumerate(bar, start=1):
            message = self.train_iter(data, epoch, meters)
            bar.set_postfix_str(message or f"loss {meters['losses'].avg:.3f}", refresh=False)
            if self.global_step % self.cfg.LOG.TENSORBOARD_FREQ == 0:
                meters.flush()
                for hook in self.hooks:
                    hook.after_steps(self, meters)
        means = meters.averages(self.device)
        cached = {} if self.teacher_cache is None else self.teacher_cache.finish()
        seconds = time.perf_counter() - started
        record = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_acc": means.pop("top1", 0.0),
            "train_loss": means.pop("losses", 0.0),
            **{f"train_{name}": value for name, value in means.items()},
            "images_per_second": len(self.train_loader.dataset) / seconds,
            "seconds": seconds,
            **cached,
        }
        step_scheduler(self.scheduler, record["train_loss"])
        broadcast_buffers(self.model)
        self.epoch, self.step = epoch, 0
        for hook in self.hooks:
            hook.after_epoch(self, epoch, record)

    def train_iter(self, data: Sequence[Any], epoch: int, train_meters: Meters) -> str:
        """Learn from a micro-batch; returns what to show beside the bar ("" for the mean loss)."""
        inputs = self.batch_inputs(data, epoch)
        if self.teacher_cache is not None:
            inputs["teacher_logits"] = self.teacher_cache.logits(self.step - 1)
        with contextlib.nullcontext() if self.ends_step else unsynchronized(self.distiller):
            with autocast(self.device, self.cfg.SOLVER.AMP):
                logits, losses = self.distiller(**inputs)
            target = inputs["target"]
            hits = correct_counts(logits, target) * (100.0 / len(target))
            train_meters.add(
                f"{self.stage} epoch {epoch}, step {self.step}".strip(),
                losses,
                {"top1": hits[0], "top5": hits[1], **getattr(self.model, "metrics", {})},
                len(target),
            )
            self.optimize(losses)
        return ""

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
        if (self.step - 1) % self.accumulate == 0:
            self.optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        if self.ends_step:
            self.update()
            for hook in self.hooks:
                hook.after_update(self)

    @property
    def ends_step(self) -> bool:
        """Whether this micro-batch is the last one of its optimizer step."""
        return self.step % self.accumulate == 0 or self.step == len(self.train_loader)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of the summed terms to those at hand."""
        total = torch.stack([loss.mean() for loss in losses.values()]).sum() * self.loss_weight()
        self.scaler.scale(total).backward()

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
        accuracy = float(log_dict.get("test_acc", -1.0))
        if accuracy >= self.best_acc:  # ties: the later one, as the files have it
            self.best_acc, self.best_epoch = accuracy, epoch
        self.history.append({"epoch": epoch, "lr": lr, **log_dict})
        for hook in self.hooks:
            hook.write(self, epoch, {"lr": lr, **log_dict})

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain values and tensors."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "norm": input_norm(self.model.student),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
            "history": self.history,
            "log_sizes": {
                name: size for hook in self.hooks for name, size in hook.sizes(self).items()
            },
            **{key: value for hook in self.hooks for key, value in hook.state(self).items()},
        }

    def resume(self) -> None:
        """Continue from the run's `latest` checkpoint; checkpoints of the original work as well."""
        path = self.log_path / "latest"
        state = load_checkpoint(path)
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer"} <= set(state):
            raise UserError(f"checkpoint {path} is none of a training run (want epoch, model, ...)")
        load_state(self.model, strip_prefix(state["model"], "module."), f"{path} and this config")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise UserError(f"{path}: its optimizer state does not fit: {error}") from None
        self.epoch = int(state["epoch"])
        self.best_acc = float(state.get("best_acc", -1.0))
        self.best_epoch = int(state.get("best_epoch", 0))
        self.history = state.get("history", [])
        self.init_state = state.get("init")
        self.scaler.load_state_dict(state.get("scaler", {}) or self.scaler.state_dict())
        self._restore_schedule(state.get("scheduler"))
        for hook in self.hooks:
            hook.on_resume(self, state.get("log_sizes", {}))
            hook.load_state(self, state)

    def _restore_schedule(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            self.scheduler.load_state_dict(saved)
            return
        if self.cfg.SOLVER.SCHEDULE == "plateau":
            raise UserError(
                f"{self.log_path / 'latest'} holds no schedule, and a plateau depends on all "
                "epochs before: choose another SOLVER.SCHEDULE"
            )
        # The original saved no schedule: run a fresh one up to this epoch.
        self.scheduler = restart_scheduler(
            self.optimizer, self.cfg.SOLVER, self.base_rates, self.epoch
        )


__all__ = ["BaseTrainer", "Meters", "NonFiniteLossError", "seed_everything", "trainer_dict"]
