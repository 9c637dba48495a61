"""DATASET.SKIP_CORRUPT: find unreadable images before a run and skip them.

Every file is decoded once. The result is cached under a hash of names, sizes and modification times
of all files, so every process and every run skips the same ones; indices number the remaining
images in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from mdistiller.dataset.files.file_set import FileSet
from mdistiller.files.atomic import write_cache
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank, local_rank_zero_first

_SHOWN = 5  # file names in the message
_cache: dict[str, list[int]] = {}  # of this process, for when no file can be written


def drop_corrupt(files: FileSet, threads: int) -> FileSet:
    """The files that can be read as images; the others are listed on stderr.

    Raises:
        UserError: a class has no readable image.
    """
    bad = find_corrupt(files, threads)
    if not bad:
        return files
    keep = torch.ones(len(files), dtype=torch.bool)
    keep[torch.tensor(bad)] = False
    rest = files.select(keep.nonzero().squeeze(1))
    require_classes(files.targets, rest.targets, files.classes, str(files.folder))
    return replace(rest, left_out=(*rest.left_out, f"{len(bad)} unreadable"))


def find_corrupt(files: FileSet, threads: int) -> list[int]:
    """Positions of the files that cannot be read as images, which are listed on stderr."""
    digest = _digest(files)
    path = Path.home() / ".cache" / "mdistiller" / f"{digest}-corrupt.json"
    with local_rank_zero_first():
        if digest not in _cache:
            bad = _read_cache(path, len(files))
            if bad is None:
                bad = _scan(files, threads)
                write_cache(path, json.dumps(bad))
            _cache[digest] = bad
            report_skipped([str(files.path(i)) for i in bad], len(files))
    return _cache[digest]


def require_classes(
    before: torch.Tensor, after: torch.Tensor, classes: list[str], where: str
) -> None:
    """Raise UserError where all images of a class are unreadable."""
    lost = sorted(set(before.tolist()) - set(after.tolist()))
    if lost:
        raise UserError(
            f"no image of class {classes[lost[0]]} in {where} can be read; repair or remove them"
        )


def report_skipped(bad: list[str], total: int) -> None:
    """Print which images are skipped, once on each machine."""
    if bad and local_rank() == 0:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        print(
            f"DATASET.SKIP_CORRUPT: {len(bad)} of {total} images cannot be read and are skipped: "
            f"{', '.join(bad[:_SHOWN])}{more}",
            file=sys.stderr,
            flush=True,
        )


def _digest(files: FileSet) -> str:
    """Hash of the names, sizes and modification times of the files."""
    digest = hashlib.sha256(f"2 {files.scale_16_bit} {files.folder.resolve()}".encode())
    for i in range(len(files)):
        with contextlib.suppress(OSError):
            status = os.stat(files.path(i))
            digest.update(files.names[i] + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:24]


def _scan(files: FileSet, threads: int) -> list[int]:
    from mdistiller.dataset.files.images import UnreadableError

    def readable(i: int) -> bool:
        try:
            files.image(i)
        except UnreadableError:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(readable, range(len(files)))
        bar = tqdm(results, "reading images", len(files), leave=False, disable=None)
        return [i for i, good in enumerate(bar) if not good]


def _read_cache(path: Path, num: int) -> list[int] | None:
    """Cached positions of unreadable files; None without a valid cache file."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        bad = json.loads(path.read_text())
        if isinstance(bad, list) and all(type(i) is int and 0 <= i < num for i in bad):
            return bad
    return None
