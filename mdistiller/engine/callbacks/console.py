"""The table that a run prints: a line an epoch, aligned below a header."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from mdistiller.engine.distributed import is_main_process
from mdistiller.engine.hooks import Record, Trainer
from mdistiller.engine.utils import WIDTH, coloured

BEST = "*"
"""Behind the score of the best epoch so far."""
_REPEAT = 40  # lines from one header to the next
_LONGEST = 9  # columns of a title
_LEAST = {"lr": 8, "loss": 7}  # columns of a cell; 6 of the others
_PREFIX = "train_loss_"  # of a term of the loss in a record


class EpochTable:
    """Prints the lines of a stage, or of the main training, and estimates the time left."""

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}
        self.lines = 0
        self.started, self.begun = time.monotonic(), 0.0

    def begin(self, trainer: Trainer) -> None:
        """Start the clock, before the first step of this process."""
        within = trainer.step / max(len(trainer.train_loader), 1) if trainer.position else 0.0
        self.started, self.begun = time.monotonic(), trainer.epoch + within

    def show(self, trainer: Trainer, epoch: int, record: Record) -> None:
        """Print the line of an epoch."""
        if not is_main_process():
            return
        cells = {"stage": trainer.stage} if trainer.stage else {}
        cells |= {
            "epoch": f"{epoch}/{trainer.epochs}",
            "lr": f"{record['lr']:.3g}",
            "loss": _number(record["train_loss"]),
        }
        rest = {**trainer.columns(record), "img/s": f"{record['images_per_second']:.0f}"}
        rest["left"] = self._left(trainer, epoch)
        lines = self._lines(*_fitted(cells, _terms(record), rest))
        print("\n".join(lines), flush=True)

    def _left(self, trainer: Trainer, epoch: int) -> str:
        each = (time.monotonic() - self.started) / max(epoch - self.begun, 1e-3)
        minutes, seconds = divmod(round(each * trainer.epochs_left(epoch)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def _lines(self, cells: Mapping[str, str], labelled: bool) -> list[str]:
        if labelled:
            return ["  ".join(f"{title} {text}" for title, text in cells.items())]
        header = list(cells) != list(self.widths) or self.lines % _REPEAT == 0
        if list(cells) != list(self.widths):
            self.widths, self.lines = _widths(cells), 0
        self.lines += 1
        titles = "  ".join(f"{title:>{width}}" for title, width in self.widths.items())
        row = []
        for title, width in self.widths.items():
            text = f"{cells[title]:>{width}}"
            row.append(coloured(text, "EVAL") if BEST in text else text)
        return [*([coloured(titles, "INFO")] if header else []), "  ".join(row)]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _terms(record: Record) -> dict[str, str]:
    """The terms of the loss by name, where it has several."""
    terms = {key: record[key] for key in record if key.startswith(_PREFIX)}
    if len(terms) < 2:
        return {}
    return {key.removeprefix(_PREFIX)[:_LONGEST]: _number(terms[key]) for key in terms}


def _widths(cells: Mapping[str, str]) -> dict[str, int]:
    return {
        title: max(len(title), len(text), _LEAST.get(title, 6)) for title, text in cells.items()
    }


def _fitted(
    first: dict[str, str], terms: dict[str, str], rest: dict[str, str]
) -> tuple[dict[str, str], bool]:
    """All cells, as many as fit into :data:`WIDTH`; and whether each line must name them.

    The speed goes first, then terms of the loss, which then are in metrics.jsonl alone.
    """
    several = hasattr(sys.stdout, "prefix")  # of runs in lock-step, whose lines alternate
    while True:
        cells = {**first, **terms, **rest}
        widths = _widths(cells).values()
        if sum(widths) + 2 * (len(widths) - 1) <= WIDTH or not (terms or "img/s" in rest):
            return cells, several
        if rest.pop("img/s", None) is None:
            terms.popitem()
