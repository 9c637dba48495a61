"""Evaluation and files of the networks that are trained beside the student (DISTILLER.PEERS)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mdistiller.distillers import Vanilla
from mdistiller.engine.checkpoints.write import load_checkpoint
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.utils import validate


class EvaluatePeers(Hook):
    """Evaluates each peer after each epoch, and saves it as the student is.

    The record gets `peer1_test_acc` and the like; `student_peer1_latest`, `student_peer1_best` (by
    its accuracy) and `student_peer1_N` are files like those of the student.

    Attributes:
        best: accuracy in percent and epoch of each peer's best.
    """

    def __init__(self) -> None:
        self.best: dict[str, tuple[float, int]] = {}

    @staticmethod
    def _peers(trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
        for number, net in enumerate(trainer.model.students()[1:], start=1):
            yield f"peer{number}", net

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        for name, net in self._peers(trainer):
            top1, top5, loss = validate(trainer.val_loader, Vanilla(net))
            numbers = {"test_acc": top1, "test_acc_top5": top5, "test_loss": loss}
            record.update({f"{name}_{key}": value for key, value in numbers.items()})
            if top1 >= self.best.get(name, (-1.0, 0))[0]:
                self.best[name] = top1, epoch

    def networks(self, trainer: Trainer, epoch: int) -> dict[str, nn.Module]:
        numbered = epoch % trainer.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0
        files: dict[str, nn.Module] = {}
        for name, net in self._peers(trainer):
            ends = ["latest", *(["best"] if self.best[name][1] == epoch else [])]
            ends += [str(epoch)] if numbered else []
            files |= {f"student_{name}_{end}": net for end in ends}
        return files

    def state(self, trainer: Trainer) -> dict[str, Any]:
        return {"peers_best": {name: list(best) for name, best in self.best.items()}}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        saved = state.get("peers_best", {})
        self.best = {name: (float(acc), int(epoch)) for name, (acc, epoch) in saved.items()}

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for name, net in self._peers(trainer):
            best, epoch = self.best.get(name, (None, None))
            last = trainer.history[-1].get(f"{name}_test_acc") if trainer.history else None
            numbers = {"last_acc": last, "best_acc": best, "best_epoch": epoch}
            if data.test is not None:
                numbers["test_acc_last"] = validate(data.test, Vanilla(net))[0]
                kept = {key: value.clone() for key, value in net.state_dict().items()}
                file = trainer.log_path / f"student_{name}_best"
                net.load_state_dict(load_checkpoint(file)["model"])
                numbers["test_acc_best"] = validate(data.test, Vanilla(net))[0]
                net.load_state_dict(kept)
            summary |= {f"{name}_{key}": value for key, value in numbers.items()}
        return summary
