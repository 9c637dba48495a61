"""Evaluation and files of the networks that are trained beside the student (DISTILLER.PEERS)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mdistiller.distillers import Vanilla
from mdistiller.distributed import sum_over_ranks
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.metrics import score_of
from mdistiller.engine.utils import evaluate, last_and_best


class EvaluatePeers(Hook):
    """Evaluates each peer after each epoch, and saves it as the student is.

    The record gets `peer1_test_acc` and the like; `student_peer1_latest`, `student_peer1_best` (by
    what LOG.SELECT_BY names) and `student_peer1_N` are files like those of the student.

    Attributes:
        best: score, accuracy in percent and epoch of each peer's best.
    """

    def __init__(self) -> None:
        self.best: dict[str, tuple[float, float, int]] = {}

    @staticmethod
    def _peers(trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
        for number, net in enumerate(trainer.model.students()[1:], start=1):
            yield f"peer{number}", net

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        for name, net in self._peers(trainer):
            numbers = evaluate(trainer.val_loader, Vanilla(net))
            record.update({f"{name}_test_{key}": value for key, value in numbers.items()})
            score = score_of(record, trainer.select_by, f"{name}_")
            if name not in self.best or score >= self.best[name][0]:
                self.best[name] = score, numbers["acc"], epoch
        if getattr(trainer.model, "reads_held_out", False):
            record.update(self._from_held_out(trainer))

    @torch.no_grad()
    def _from_held_out(self, trainer: Trainer) -> dict[str, float]:
        """Have the method learn from the held-out images (`PeerMethod.take_held_out`)."""
        model, sums = trainer.model.eval(), []
        for batch in trainer.val_loader:
            image, target = (item.to(trainer.device, non_blocking=True) for item in batch[:2])
            sums.append(model.held_out_sums(model.all_logits(image), target))
        numbers: dict[str, float] = model.take_held_out(sum_over_ranks(torch.stack(sums).sum(0)))
        return numbers

    def columns(self, trainer: Trainer, record: Record) -> dict[str, str]:
        names = [name for name, _ in self._peers(trainer)]
        return {f"{name} %": f"{record[f'{name}_test_acc']:.2f}" for name in names}

    def networks(self, trainer: Trainer, epoch: int) -> dict[str, nn.Module]:
        numbered = epoch % trainer.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0
        files: dict[str, nn.Module] = {}
        for name, net in self._peers(trainer):
            ends = ["latest", *(["best"] if self.best[name][2] == epoch else [])]
            ends += [str(epoch)] if numbered else []
            files |= {f"student_{name}_{end}": net for end in ends}
        return files

    def state(self, trainer: Trainer) -> dict[str, Any]:
        return {"peers_best": {name: list(best) for name, best in self.best.items()}}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        saved = state.get("peers_best", {})
        self.best = {
            name: (float(score), float(acc), int(epoch))
            for name, (score, acc, epoch) in saved.items()
        }

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for name, net in self._peers(trainer):
            _, best, epoch = self.best.get(name, (None, None, None))
            last = trainer.history[-1].get(f"{name}_test_acc") if trainer.history else None
            numbers = {"last_acc": last, "best_acc": best, "best_epoch": epoch}
            summary |= {f"{name}_{key}": value for key, value in numbers.items()}
            if data.test is not None:
                file = trainer.log_path / f"student_{name}_best"
                summary |= last_and_best(net, file, data.test, f"{name}_", Vanilla(net))
        return summary
