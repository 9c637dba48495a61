"""DATASET.SKIP_CORRUPT: images that cannot be read are found before a run, and left out of it.

Every file is decoded once, then remembered: names, sizes and times of change of all files together
say whether the answer still holds. What is left out follows from the files alone, so it is the same
in every process and every run; indices number the images that remain, in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from mdistiller.dataset.files.file_set import FileSet
from mdistiller.registry import UserError
from mdistiller.runtime import first_on_machine, local_rank

_SHOWN = 5  # names in the message
_known: dict[str, list[int]] = {}  # of this process, where nothing can be written


def drop_corrupt(files: FileSet, threads: int) -> FileSet:
    """The files that can be read as images; what is left out is named on stderr.

    Raises:
        UserError: a class has none left.
    """
    bad = corrupt(files, threads)
    if not bad:
        return files
    keep = torch.ones(len(files), dtype=torch.bool)
    keep[torch.tensor(bad)] = False
    rest = files.select(keep.nonzero().squeeze(1))
    require_classes(files.targets, rest.targets, files.classes, str(files.folder))
    return rest


def corrupt(files: FileSet, threads: int) -> list[int]:
    """Positions of the files that cannot be read as images; they are named on stderr."""
    digest = _digest(files)
    place = Path.home() / ".cache" / "mdistiller" / f"{digest}-corrupt.json"
    with first_on_machine():
        if digest not in _known:
            found = _remembered(place, len(files))
            if found is None:
                found = _find(files, threads)
                _remember(place, found)
            _known[digest] = found
            report([str(files.path(i)) for i in found], len(files))
    return _known[digest]


def require_classes(
    before: torch.Tensor, after: torch.Tensor, classes: list[str], where: str
) -> None:
    """Refuse to leave out all images of a class."""
    lost = sorted(set(before.tolist()) - set(after.tolist()))
    if lost:
        raise UserError(
            f"no image of class {classes[lost[0]]} in {where} can be read; mend or remove them"
        )


def report(bad: list[str], total: int) -> None:
    """Say what is left out, once on each machine."""
    if bad and local_rank() == 0:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        print(
            f"DATASET.SKIP_CORRUPT: {len(bad)} of {total} images cannot be read and are left out: "
            f"{', '.join(bad[:_SHOWN])}{more}",
            file=sys.stderr,
            flush=True,
        )


def _digest(files: FileSet) -> str:
    """What tells one state of the files from another."""
    digest = hashlib.sha256(f"2 {files.scale_16_bit} {files.folder.resolve()}".encode())
    for i in range(len(files)):
        with contextlib.suppress(OSError):
            facts = os.stat(files.path(i))
            digest.update(files.names[i] + f"\0{facts.st_size} {facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:24]


def _find(files: FileSet, threads: int) -> list[int]:
    from mdistiller.dataset.files.images import UnreadableError

    def readable(i: int) -> bool:
        try:
            files.image(i)
        except UnreadableError:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(readable, range(len(files)))
        bar = tqdm(found, "reading images", len(files), leave=False, disable=None)
        return [i for i, good in enumerate(bar) if not good]


def _remembered(place: Path, num: int) -> list[int] | None:
    """Positions of bad files as once found; None if that is not known."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        found = json.loads(place.read_text())
        if isinstance(found, list) and all(type(i) is int and 0 <= i < num for i in found):
            return found
    return None


def _remember(place: Path, bad: list[int]) -> None:
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_text(json.dumps(bad))
        temporary.replace(place)
