"""Checkpoints that are not what was written, and disks that take no more."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.kills import die_in_operation
from faults.mount import can_mount, small_disk, take_out
from faults.work import Before, Outcome, Work
from mdistiller.engine.checkpoints.store import PREVIOUS, Store
from mdistiller.registry import UserError


def _flip(path: Path, share: float) -> None:
    contents = bytearray(path.read_bytes())
    contents[int(share * (len(contents) - 1))] ^= 1
    path.write_bytes(contents)


def _cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def _damages(other: Path) -> dict[str, Callable[[Path], object]]:
    """What is done to `latest`; `other` is the one of another run."""
    return {
        "empty": lambda latest: _cut(latest, 0),
        "cut to a tenth": lambda latest: _cut(latest, 0.1),
        "cut to half": lambda latest: _cut(latest, 0.5),
        "cut by a byte": lambda latest: os.truncate(latest, latest.stat().st_size - 1),
        "a bit flipped at the start": lambda latest: _flip(latest, 0.0),
        "a bit flipped in a tensor": lambda latest: _flip(latest, 0.3),
        "a bit flipped in the middle": lambda latest: _flip(latest, 0.5),
        "a bit flipped at the end": lambda latest: _flip(latest, 1.0),
        "zeros": lambda latest: latest.write_bytes(bytes(latest.stat().st_size)),
        "text": lambda latest: latest.write_text("no checkpoint"),
        "that of another run": lambda latest: shutil.copy(other, latest),
        "removed": lambda latest: latest.unlink(),
    }


def corruptions(work: Work) -> Outcome:
    """Damage `latest` of a run that died: it must be named, and the one before be used."""
    outcome = Outcome("corruptions detected")
    work.finish("other", EXPERIMENT__SEED=5, SOLVER__EPOCHS=1)
    process = work.start("half", before=die_in_operation(150, True))
    process.join()
    if process.exitcode != -signal.SIGKILL:
        outcome.losses.append(f"the run to damage did not die: {process.exitcode}")
    half = work.run_folder("half")
    damages = _damages(work.run_folder("other") / "latest")
    chosen = list(damages)[2::4] if work.quick else list(damages)
    for text in chosen:
        name = f"damaged {text}"
        outcome.tried += 1
        shutil.copytree(half, work.run_folder(name))
        damages[text](work.run_folder(name) / "latest")
        code, said = work.finish(name), work.output(name)
        if code:
            outcome.losses.append(f"{name}: ended with {code}\n{said[-2000:]}")
        elif f"going back to {PREVIOUS}" not in said and text != "removed":
            outcome.losses.append(f"{name}: not noticed")
        outcome.losses += work.differences(name)
        work.forget(name)
    return outcome


class _FullDisk:
    """A file layer on which no write succeeds after the first `left`."""

    def __init__(self, folder: Path, left: int, number: int):
        self.folder, self.left, self.number = str(folder), left, number
        self.fsync, self.replace, self.open = os.fsync, os.replace, io.open

    def lay(self) -> None:
        """Take the place of the real one in this process."""
        io.open = builtins.open = self._open  # type: ignore[assignment]
        os.fsync, os.replace = self._fsync, self._replace  # type: ignore[assignment]

    def _fsync(self, handle: int) -> None:
        self._spend()
        self.fsync(handle)

    def _replace(self, *paths: Any) -> None:
        self._spend()
        self.replace(*paths)

    def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = self.open(file, mode, *args, **kwargs)
        if not str(file).startswith(self.folder) or not set(mode) & set("wax+"):
            return handle
        return _Writes(handle, self._spend)


class _Writes:
    """A file whose writes count."""

    def __init__(self, handle: Any, spend: Callable[[], None]):
        self._handle, self._spend = handle, spend

    def write(self, data: Any) -> Any:
        self._spend()
        return self._handle.write(data)

    def __enter__(self) -> _Writes:
        return self

    def __exit__(self, *error: Any) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def full_disk(work: Work) -> Outcome:
    """Let every write from some moment on fail: one line reports it, and all that is saved is good.

    A third of the disks are real ones, in memory, where the system lets anybody mount some.
    """
    real = can_mount()
    kinds = "a third in memory, else " if real else ""
    outcome = Outcome(f"full disks survived ({kinds}by a file layer)")
    draw = random.Random(work.seed + 1)
    count = 2 if work.quick else 27
    room = sum(path.stat().st_size for path in work.whole.rglob("*") if path.is_file())
    for number in range(count):
        name = f"full{number}"
        kind = errno.EACCES if number % 5 == 4 else errno.ENOSPC
        first = int(number / count * 4000) + draw.randrange(1, 4000 // count)
        folder = work.run_folder(name)
        before: Before = _FullDisk(folder, first, kind).lay
        if real and number % 3 == 1:
            kind, before = errno.ENOSPC, small_disk(folder, int(draw.uniform(0.1, 0.9) * room))
        process = work.start(name, before=before)
        process.join()
        take_out(folder)
        said = work.output(name)
        if process.exitcode == 0 and "training goes on" not in said:
            work.forget(name)  # it needed fewer writes
            continue
        outcome.tried += 1
        outcome.losses += [f"{name}: {text}" for text in _complaints(process.exitcode, said, kind)]
        store = Store(work.run_folder(name))
        try:
            for file in store.candidates():
                store.load(file)
        except UserError as error:
            outcome.losses.append(f"{name}: {error}")
        if code := work.finish(name):
            outcome.losses.append(f"{name}: continued to {code}\n{work.output(name)[-2000:]}")
        outcome.losses += work.differences(name)
        work.forget(name)
    return outcome


def _complaints(code: int | None, said: str, kind: int) -> list[str]:
    found = []
    if code not in (0, 2):
        found.append(f"ended with {code}\n{said[-3000:]}")
    if os.strerror(kind) not in said:
        found.append(f"it does not say why it ended\n{said[-2000:]}")
    if "Traceback" in said:
        found.append(f"a traceback\n{said[-3000:]}")
    return found
