"""Storage of cached logits: in memory, or in a file that several processes share.

A row is a float32 vector with a number, its slot. In a file each row has a checksum of its values,
its slot and the file's key. A row with a wrong checksum counts as missing: never written, half
written by a killed process, damaged, or in the wrong place. So the order of writes does not matter,
and readers and writers need no lock.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mdistiller.files.atomic import replacing

Floats = NDArray[np.float32]
Slots = NDArray[np.int64]

HEADER = 4096
"""Bytes before the first row."""
FORMAT = "mdistiller teacher logits 1"
_BLOCK = 4096  # rows summed at a time


class MemoryStore:
    """Rows [C] by slot in this process's memory, which is allocated as rows are written.

    Args:
        count: number of slots.
        width: C.

    Attributes:
        replaced: why an existing file was replaced; "" if it was not.
    """

    replaced = ""

    def __init__(self, count: int, width: int):
        self._rows = np.empty((count, width), dtype=np.float32)
        self._known = np.zeros(count, dtype=bool)

    def read(self, slots: Slots) -> tuple[NDArray[np.bool_], Floats]:
        """Which of M slots hold a row, [M], and the rows, [M, C], with 0 for missing ones."""
        stored = self._known[slots]
        rows = np.zeros((len(slots), self._rows.shape[1]), dtype=np.float32)
        rows[stored] = self._rows[slots[stored]]
        return stored, rows

    def write(self, slots: Slots, rows: Floats) -> None:
        """Store M rows in different slots."""
        self._rows[slots], self._known[slots] = rows, True


class FileStore:
    """Rows in a file that the processes of a machine read and write at the same time.

    A sparse file, which takes space as rows are written. A file of this name with another header or
    size is replaced by an empty one; processes that have the old one open go on with that.

    Args:
        path: of the file; a lock `PATH.lock` stands beside it.
        count: number of slots.
        width: C.
        key: what the rows depend on: plain values. Also the file's first line.

    Raises:
        OSError: the file can be neither opened nor created.
    """

    def __init__(self, path: Path, count: int, width: int, key: Mapping[str, Any]):
        self.path, self.count = path, count
        self._row = np.dtype([("logits", "<f4", (width,)), ("check", "<u8")])
        self._header = _header(count, width, key)
        self._sum = _Checksum(width, self._header)
        self._size = HEADER + count * self._row.itemsize
        self.replaced = ""
        self.open()

    def open(self, anew: bool = False) -> None:
        """Open the file; create it if it does not exist.

        Args:
            anew: replace it by an empty one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            self.replaced = self._fault() if self.path.exists() else ""
            if anew or self.replaced or not self.path.exists():
                self._make()
            self._file = self.path.open("r+b", buffering=0)
        table = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        self._table = np.frombuffer(table, dtype=self._row, offset=HEADER)

    def _fault(self) -> str:
        """What is wrong with the file that is there."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            if file.read(HEADER) != self._header:
                return "its head is damaged, or of another file"
        return f"it has {size} bytes, not {self._size}" if size != self._size else ""

    def _make(self) -> None:
        with replacing(self.path) as fresh, fresh.open("wb") as file:
            file.write(self._header)
            file.truncate(self._size)

    def read(self, slots: Slots) -> tuple[NDArray[np.bool_], Floats]:
        """See :class:`MemoryStore`. A file that was truncated meanwhile is replaced."""
        if os.fstat(self._file.fileno()).st_size != self._size:  # else the process would be ended
            self.open()
        rows = self._table[slots]
        logits = np.ascontiguousarray(rows["logits"])
        stored = rows["check"] == self._sum(slots, logits)
        logits[~stored] = 0
        return stored, logits

    def write(self, slots: Slots, rows: Floats) -> None:
        """See :class:`MemoryStore`.

        Not through the memory map, where a full disk would kill the process by SIGBUS.

        Raises:
            OSError: the disk is full, or writing fails.
        """
        packed = np.empty(len(slots), dtype=self._row)
        packed["logits"], packed["check"] = rows, self._sum(slots, np.ascontiguousarray(rows))
        file, size = self._file.fileno(), self._row.itemsize
        everything = packed.view(np.uint8).data
        for number, slot in enumerate(slots.tolist()):
            row = everything[number * size : (number + 1) * size]
            if os.pwrite(file, row, HEADER + slot * size) != size:
                raise OSError(f"{self.path}: no space left")


def _header(count: int, width: int, key: Mapping[str, Any]) -> bytes:
    facts = {"format": FORMAT, "rows": count, "width": width, **key}
    text = json.dumps(facts, sort_keys=True).encode()
    if len(text) >= HEADER:
        raise ValueError(f"the key of a file of logits takes {len(text)} bytes")
    return text.ljust(HEADER - 1) + b"\n"


class _Checksum:
    """64-bit checksums of rows: a sum of their 32-bit words, each times an odd random number.

    Modulo 2^64 an odd number times a difference of 32-bit words is not 0: a row with any one word
    changed, or in the place of another, never passes; what differs in more, or comes from a file
    with another key, does so by a chance of about 2^-32 or less for every such row that is read.
    No row has the sum 0, which is that of a hole.

    Args:
        width: words of a row.
        key: seeds the numbers.
    """

    def __init__(self, width: int, key: bytes):
        seed = int.from_bytes(hashlib.sha256(key).digest(), "little")
        numbers = np.random.default_rng(seed).integers(2**64, size=width + 2, dtype=np.uint64)
        self._start, self._slot = numbers[0], numbers[1] | np.uint64(1)
        self._factors = numbers[2:] | np.uint64(1)

    def __call__(self, slots: Slots, rows: Floats) -> NDArray[np.uint64]:
        """The checksums [M] of M rows [M, C]."""
        sums = self._start + self._slot * slots.astype(np.uint64)
        for start in range(0, len(rows), _BLOCK):
            words = rows[start : start + _BLOCK].view(np.uint32).astype(np.uint64)
            sums[start : start + _BLOCK] += words @ self._factors
        return np.maximum(sums, np.uint64(1))
