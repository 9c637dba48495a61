"""The table that a run prints: a line an epoch, aligned below a header."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from mdistiller.console import coloured, width
from mdistiller.distributed import is_main_process
from mdistiller.engine.hooks import Record, Trainer

BEST = "*"
"""Behind the score of the best epoch so far."""
_REPEAT = 40  # lines from one header to the next
_LONGEST, _SHORT = 9, 6  # columns of a term's title, and where lines would be too long
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
            "epoch": f"{epoch:>{len(str(trainer.epochs))}}/{trainer.epochs}",
            "lr": f"{record['lr']:.3g}",
            "loss": _number(record["train_loss"]),
        }
        rest = trainer.columns(record)
        for hook in trainer.hooks:
            rest |= hook.columns(trainer, record)
        rest["img/s"] = f"{record['images_per_second']:.0f}"
        rest["left"] = self._left(trainer, epoch)
        terms = _terms(record)
        if hasattr(sys.stdout, "prefix"):  # of runs in lock-step, whose lines alternate
            cells = {**cells, **terms, **rest}
            lines = ["  ".join(f"{title} {text.strip()}" for title, text in cells.items())]
        else:
            lines = self._lines(_fitted(cells, terms, rest))
        print("\n".join(lines), flush=True)

    def _left(self, trainer: Trainer, epoch: int) -> str:
        each = (time.monotonic() - self.started) / max(epoch - self.begun, 1e-3)
        minutes, seconds = divmod(round(each * trainer.epochs_left(epoch)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def _lines(self, cells: Mapping[str, str]) -> list[str]:
        """An epoch's line, and before it the header where that is due."""
        header = list(cells) != list(self.widths) or self.lines % _REPEAT == 0
        if list(cells) != list(self.widths):
            self.widths, self.lines = _widths(cells), 0
        self.lines += 1
        titles = "  ".join(f"{title:>{columns}}" for title, columns in self.widths.items())
        row = []
        for title, columns in self.widths.items():
            text = f"{cells[title]:>{columns}}"
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


def _fitted(first: dict[str, str], terms: dict[str, str], rest: dict[str, str]) -> dict[str, str]:
    """All cells, as far as they fit into :func:`width`.

    The speed goes first, then the ends of the terms' names, the iteration of a detector, and the
    last terms, which then are in metrics.jsonl alone.
    """
    short = {title[:_SHORT]: text for title, text in terms.items()}
    short = short if len(short) == len(terms) else terms
    fewer = [dict(list(short.items())[:count]) for count in range(len(short), -1, -1)]
    choices: list[tuple[dict[str, str], tuple[str, ...]]] = [(terms, ()), (terms, ("img/s",))]
    choices += [(short, ("img/s",)), *((some, ("img/s", "iter")) for some in fewer)]
    for some, left_out in choices:
        others = {title: text for title, text in rest.items() if title not in left_out}
        cells = {**first, **some, **others}
        widths = _widths(cells).values()
        if sum(widths) + 2 * (len(widths) - 1) <= width():
            break
    return cells
