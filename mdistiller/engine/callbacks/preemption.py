"""Preemption: signals save and end a run between two steps. Also timed mid-epoch checkpoints.

SIGTERM, SIGINT and SIGUSR1 set a flag during training. With several processes each has its own
flag; every few steps they exchange them, and all stop at the same step.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mdistiller.console import print_log
from mdistiller.distributed import barrier, is_main_process, world_size
from mdistiller.engine.checkpoints.resume import current_position
from mdistiller.engine.hooks import Hook, Trainer
from mdistiller.engine.metrics import NonFiniteLossError
from mdistiller.registry import UserError
from mdistiller.runtime import side_group

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
EXIT_CODE = 75
"""Of a run that a signal ended: EX_TEMPFAIL, "try again later"."""
LOOK = 1.0
"""Seconds between two exchanges of several processes, roughly."""
FARTHEST = 100
"""Steps between them at most."""
TOGETHER = 5.0
"""Under a launcher, seconds in which signals count as one: the sender may reach the processes
directly, and the launcher hands it on to them as well."""


class Preempted(KeyboardInterrupt):
    """A signal ended the run; the text says what was saved."""

    code = EXIT_CODE


class _Asked:
    """The first signal received, and the depth of `defer_signals`."""

    def __init__(self) -> None:
        self.signal, self.at, self.shields, self.listens = 0, 0.0, 0, False
        self.begun = False  # whether steps have been taken

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name

    def note(self, number: int, frame: Any) -> None:
        """The signal handler."""
        now = time.monotonic()
        if self.signal:
            if now - self.at >= (TOGETHER if "LOCAL_RANK" in os.environ else 0.0):
                os._exit(128 + number)  # files are replaced in one move: none is harmed
            return
        self.signal, self.at = number, now
        if not self.shields:
            when = "when no step is taken, all is saved" if self.begun else "before the first step"
            raise Preempted(f"stopped by {self.name} {when}; start again with\n{same_command()}")
        if os.environ.get("RANK", "0") == "0":
            text = f"{self.name}: stopping after this step; a second signal stops at once\n"
            os.write(2, text.encode())  # print may be what was interrupted


_asked = _Asked()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Install the handlers in this context; does nothing in a thread or in a nested context."""
    if _asked.listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _asked.note) for number in wanted}
    _asked.listens = True
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.__init__()  # type: ignore[misc]


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Let signals wait for the end of a step in this context; elsewhere they end the process."""
    _asked.shields, _asked.begun = _asked.shields + 1, True
    try:
        yield
    finally:
        _asked.shields -= 1


class PreemptionHandler(Hook):
    """Saves and stops, if it is time to, after each optimizer step and each epoch.

    Args:
        minutes: between timed saves within epochs; 0: save only on signals.
        patience: minutes to wait for the other processes.
    """

    def __init__(self, minutes: float, patience: float):
        self.every, self.patience = minutes * 60, patience * 60
        self.processes = world_size()
        self._saved = self._looked = time.monotonic()
        self._interval = self._left = 1  # steps from one exchange to the next, and to the next one

    def after_step(self, trainer: Trainer) -> None:
        """Save or stop, if it is time to.

        Raises:
            Preempted: the state is saved.
            UserError: the state could not be saved.
            NonFiniteLossError: the weights are not finite, so they are not saved.
        """
        if not trainer.ends_step:
            return
        stop, save = self._agree()
        if not (stop or save):
            return
        trainer.position = current_position(trainer)
        try:
            trainer.save()
        except UserError as error:
            if stop or isinstance(error, NonFiniteLossError):
                raise
            print_log(f"{error}; training goes on")
        trainer.position = None
        self._saved = time.monotonic()
        if stop:
            self._stop(f"in {trainer.stage} epoch {trainer.epoch + 1}, step {trainer.step}")

    def between_epochs(self, trainer: Trainer, epoch: int) -> None:
        """Stop, if it is time to; the hooks have saved the epoch."""
        self._saved, self._left = time.monotonic(), 1
        if self._agree()[0]:
            self._stop(f"after {trainer.stage} epoch {epoch}")

    def _stop(self, where: str) -> None:
        barrier()  # a launcher ends all when one has ended
        by = _asked.name if _asked.signal else "a signal to another process"
        text = f"stopped by {by} {' '.join(where.split())}; continue with"
        raise Preempted(f"{text}\n{same_command()}")

    def _agree(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, agreed by all processes."""
        now = time.monotonic()
        stop, save = bool(_asked.signal), bool(self.every) and now - self._saved >= self.every
        if self.processes == 1:
            return stop, save
        self._left -= 1
        if self._left > 0:
            return False, False
        flags = [stop, save and is_main_process(), (now - self._looked) / self._interval]
        shared = torch.tensor(flags, dtype=torch.float64)
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, group=side_group(), async_op=True)
        work.wait(datetime.timedelta(seconds=self.patience))
        stop, save, seconds = bool(shared[0]), bool(shared[1]), float(shared[2])
        self._looked = time.monotonic()
        self._interval = self._left = int(min(max(LOOK / max(seconds, 1e-6), 1), FARTHEST))
        return stop, save


def same_command() -> str:
    """The command line of this process, as a shell reads it; one that trains also resumes.

    Of a program that is not the library's: the argument for it.
    """
    script, words = Path(sys.argv[0]), sys.argv[1:]
    packaged = script.stem in ("mdistiller", "__main__")
    name = next(iter(words), "") if packaged else script.stem
    if name not in ("train", "train_detection", "sweep", "demo"):
        return "resume='auto'"
    if name.startswith("train") and not any(word.startswith("--resume") for word in words):
        words = [*words, "--resume", "auto"]
    program = ["-m", "mdistiller"] if packaged else [str(script)]
    local, processes = (int(os.environ.get(k, 1)) for k in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if processes > 1:
        nodes = ["--nnodes", str(processes // local)] if processes > local else []
        program = ["torchrun", *nodes, "--nproc-per-node", str(local), *program]
    else:
        program = ["mdistiller"] if script.stem == "mdistiller" else ["python", *program]
    return shlex.join([*program, *words])
