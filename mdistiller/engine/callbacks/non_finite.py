"""Non-finite losses and gradients: stop with a report, or skip the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mdistiller.engine.checkpoints.write import save_checkpoint
from mdistiller.engine.hooks import Hook, Trainer
from mdistiller.engine.metrics import NonFiniteLossError, show_terms
from mdistiller.registry import UserError
from mdistiller.runtime import distributed, rank

_SHOWN = 8  # sample numbers in an error


class NonFiniteGuard(Hook):
    """Checks every step's loss and gradient before it moves the weights.

    Reading a value on the host synchronises with the device. On CUDA losses are therefore read only
    every 50 steps; a bad gradient shows in the losses after it. With SOLVER.SKIP_NONFINITE every
    step is checked: a skipped one leaves weights, optimizer and buffers unchanged. On CUDA the
    device decides, and `skipped` is updated when numbers are read.

    Args:
        limit: SOLVER.SKIP_NONFINITE, the most steps of a run that may be skipped.
        device: of the networks.

    Attributes:
        skipped: number of skipped steps so far.
        waits: whether the host reads the result of each check.
    """

    def __init__(self, limit: int, device: torch.device):
        self.limit, self.skipped = limit, 0
        self.looks = limit > 0 or device.type == "cpu"
        self.waits = device.type != "cuda"
        self._unread: Tensor | None = None  # steps skipped by the device
        self._inputs: dict[str, Any] = {}
        self._recent: list[Tensor | None] = []  # sample numbers of the latest micro-batches
        self._remembered = 1 if device.type == "cpu" else 50
        self._terms: list[dict[str, Tensor]] = []
        self._buffers: list[Tensor] = []

    def before_forward(self, trainer: Trainer, inputs: dict[str, Any]) -> None:
        self._recent = [*self._recent, inputs.get("index")][-self._remembered :]
        self._inputs = inputs if self._remembered == 1 else {}
        if trainer.begins_step:
            self._terms = []
            if self.limit:
                self._buffers = [buffer.clone() for buffer in trainer.model.buffers()]

    def after_forward(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if self.looks:
            self._terms.append({name: loss.detach().mean() for name, loss in losses.items()})

    def allows(self, trainer: Trainer, gradients: Sequence[Tensor]) -> bool:
        """Whether the optimizer may step with these gradients.

        Raises:
            NonFiniteLossError: a value is not finite, and no more steps may be skipped.
        """
        if not self._terms:  # not looked at, or of a trainer whose `train_iter` is its own
            return True
        finite = torch.stack([term for terms in self._terms for term in terms.values()]).isfinite()
        good = finite.all()
        if gradients and not trainer.scaler.is_enabled():  # fp16: the scaler handles overflow
            largest = torch._foreach_norm(list(gradients), math.inf)
            good &= torch.stack([norm.to(good.device) for norm in largest]).isfinite().all()
        if self.limit and distributed():
            shared = good.int()
            dist.all_reduce(shared, dist.ReduceOp.MIN)
            good = shared.bool()
        if not self.waits:
            self._leave_to_device(trainer, ~good)
            return True
        if bool(good):
            return True
        self._refuse(trainer)
        return False

    def _leave_to_device(self, trainer: Trainer, bad: Tensor) -> None:
        """Let the fused optimizer's kernel skip the step if it is `bad`."""
        trainer.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # of fused ones
        for buffer, before in zip(trainer.model.buffers(), self._buffers, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))
        self._unread = bad.int() if self._unread is None else self._unread + bad

    def read(self) -> None:
        """Read the device's count of skipped steps; call it where the host synchronises anyway.

        Raises:
            NonFiniteLossError: more than the limit.
        """
        if self._unread is None:
            return
        self.skipped += int(self._unread)
        self._unread = None
        if self.skipped > self.limit:
            raise NonFiniteLossError(
                f"{self.skipped} steps had a loss or gradient that is not finite, and "
                f"SOLVER.SKIP_NONFINITE allows {self.limit}",
                ago=len(self._recent),
            )

    def _refuse(self, trainer: Trainer) -> None:
        terms = {name: float(value) for name, value in self._terms[-1].items()}
        where = f"{trainer.stage} epoch {trainer.epoch + 1}, step {trainer.step}".strip()
        if self.skipped < self.limit:
            self.skipped += 1
            for buffer, before in zip(trainer.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
            if rank() == 0:
                text = f"skipped {where}, not finite: {show_terms(terms)}"
                print(f"{text} ({self.skipped} of at most {self.limit})", flush=True)
            return
        what = "gradient" if all(map(math.isfinite, terms.values())) else "loss"
        many = f" after {self.skipped} skipped steps" if self.skipped else ""
        raise NonFiniteLossError(f"non-finite {what} in {where}{many}: {show_terms(terms)}")

    def after_steps(self, trainer: Trainer, meters: Any) -> None:
        self.read()

    def epoch_numbers(self, trainer: Trainer) -> dict[str, float]:
        self.read()
        return {}

    def epoch_state(self, trainer: Trainer) -> dict[str, Any]:
        self.read()
        return {}

    def state(self, trainer: Trainer) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self.skipped = int(state.get("skipped", 0))

    def before_save(self, trainer: Trainer) -> None:
        """Check the weights: the last step may have had a bad gradient.

        Raises:
            NonFiniteLossError: a trained weight is not finite.
        """
        groups = trainer.optimizer.param_groups
        weights = [p.detach() for group in groups for p in group["params"] if p.numel()]
        largest = [norm.cpu() for norm in torch._foreach_norm(weights, math.inf)] if weights else []
        if not all(map(math.isfinite, map(float, largest))):
            where = f"{trainer.stage} epoch {trainer.epoch}, step {trainer.step}".strip()
            text = f"weights are not finite after {where}: they are not saved"
            raise NonFiniteLossError(text, ago=len(self._recent))

    @contextlib.contextmanager
    def reporting(self, trainer: Trainer) -> Iterator[None]:
        """Raise a :exc:`NonFiniteLossError` of the steps within as :meth:`report` has it."""
        try:
            yield
        except NonFiniteLossError as error:
            raise self.report(trainer, error) from None

    def report(self, trainer: Trainer, error: NonFiniteLossError) -> UserError:
        """The error to raise: with the step's sample numbers and the path of a snapshot.

        If the step was checked at once, the snapshot holds its inputs and the weights before it. If
        numbers are read later, the weights have changed: it holds the sample numbers alone.
        """
        if error.ago >= len(self._recent):  # a trainer that makes its steps without this guard
            return error
        ago = error.ago
        index, step = self._recent[-1 - ago], trainer.step - ago
        numbers = [] if index is None else index.tolist()
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
        text = f"{error}; {len(numbers)} samples ({shown})"
        exact = ago == 0 and self._remembered == 1
        contents = {
            "error": str(error),
            "epoch": trainer.epoch + 1,
            "step": step,
            "index": index,
            "steps_since": 0 if exact else ago + 1,
            **({"inputs": self._inputs, "model": trainer.model.state_dict()} if exact else {}),
        }
        name = "_".join(["nonfinite", *trainer.stage.split(), f"epoch{trainer.epoch + 1}"])
        path = trainer.log_path / f"{name}_step{step}_rank{rank()}.pt"
        try:
            trainer.log_path.mkdir(parents=True, exist_ok=True)
            save_checkpoint(contents, path)
        except (UserError, OSError) as failure:
            return type(error)(f"{text}; no snapshot: {failure}")
        late = "" if exact else f" (noticed {ago} steps later: without inputs and weights)"
        return type(error)(f"{text}; snapshot {path}{late}")
