"""What a run prints: lines of its main process, coloured on a terminal, and progress bars."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from mdistiller.distributed import is_main_process

WIDTH = 100
"""Columns of what a run prints, at most."""
_COLOURS = {"TRAIN": 31, "EVAL": 32, "INFO": 36}


def log_msg(msg: str, mode: str = "INFO") -> str:
    """`msg` behind its [MODE], coloured on a terminal."""
    return coloured(f"[{mode}] {msg}", mode)


def print_log(msg: str, mode: str = "INFO") -> None:
    """Print :func:`log_msg` in the main process, at once."""
    if is_main_process():
        print(log_msg(msg, mode), flush=True)


def width() -> int:
    """Columns for what a run prints: :data:`WIDTH`, or those of a narrower terminal."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    return max(40, min(WIDTH, columns))


def coloured(text: str, mode: str) -> str:
    """`text` in the colour of a mode on a terminal, unless NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else f"\033[{_COLOURS.get(mode, 36)}m{text}\033[0m"


def progress(items: Iterable[Any], title: str, total: int | None = None, done: int = 0) -> tqdm:
    """A progress bar over `items`: on a terminal, in the main process, redrawn by time.

    Args:
        total: their number, where they have no length; `done` are no longer among them.
    """
    return tqdm(
        items,
        desc=title,
        total=total,
        initial=done,
        leave=False,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=None if is_main_process() else True,
    )
