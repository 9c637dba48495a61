"""Safe extraction of untrusted archives.

Nothing is written outside the new folder; only plain files and folders are created; sizes are
bounded while writing, whatever the archive's headers state.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mdistiller.registry import UserError

_CHUNK = 1 << 16
_HEADER = 4 << 20  # bytes of a tar header, more than any honest one
_SLACK = 64 << 20  # bytes to which a small archive may grow whatever its ratio


@dataclass(frozen=True)
class Limits:
    """Limits of an archive's contents.

    Attributes:
        bytes: all files together, unpacked.
        files: their number, with folders.
        ratio: unpacked bytes for each byte of the archive.
    """

    bytes: int = 20 * 10**9
    files: int = 300_000
    ratio: float = 100.0


class _BadError(Exception):
    """An archive that is refused, with the reason."""


@contextlib.contextmanager
def unpacked(archive: Path, beside: Path, what: str, limits: Limits = Limits()) -> Iterator[Path]:
    """Context with a new folder that has the contents of a tar (of any compression) or zip file.

    The caller moves files out of it by `os.replace`; the rest is removed at the end.

    Args:
        archive: the file.
        beside: an existing folder of the target's file system, in which the new folder is made.
        what: name of the archive in errors.

    Raises:
        UserError: the archive is damaged or refused; nothing of it remains.
    """
    folder = Path(tempfile.mkdtemp(prefix=".unpack-", dir=beside))
    try:
        try:
            _unpack(archive, folder, limits)
        except (
            _BadError,
            OSError,
            EOFError,
            ValueError,
            NotImplementedError,
            RuntimeError,
            tarfile.TarError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
        ) as error:
            reason = (
                getattr(error, "strerror", None) or str(error) or type(error).__name__
            ).strip()
            raise UserError(
                f"{what} is not unpacked: {archive} {_worded(error, reason.splitlines()[0])}; "
                "remove it and get it from a place you trust"
            ) from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_in(source: Path, target: Path) -> None:
    """Move an unpacked file or folder to `target`, replacing what is there.

    Raises:
        UserError: it was not in the archive, or cannot be moved.
    """
    if not source.exists():
        raise UserError(f"the archive has no file {source.name}, expected for {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        old = source.with_name(f"{source.name}.old")  # goes with the temporary folder
        if target.is_dir():
            target.rename(old)
        source.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error


def _worded(error: Exception, reason: str) -> str:
    return reason if isinstance(error, _BadError) else f"cannot be read or written ({reason})"


def _unpack(archive: Path, folder: Path, limits: Limits) -> None:
    room = min(limits.bytes, max(_SLACK, int(limits.ratio * archive.stat().st_size)))
    budget = _Budget(room, limits.files)
    with archive.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        if head[:2] == b"PK":
            with zipfile.ZipFile(file) as bundle:
                _unpack_zip(bundle, folder, budget)
            return
        with _decompressed(file, head) as stream:
            source: Any = _Bounded(stream, room + limits.files * 2048)
            with tarfile.open(fileobj=source, mode="r:") as tar:
                _unpack_tar(tar, folder, budget)


def _decompressed(file: IO[bytes], head: bytes) -> Any:
    """The tar inside, by the first bytes of the file."""
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if head.startswith(magic):
            return opener(file, "rb")
    return contextlib.nullcontext(file)


class _Bounded:
    """A readable file that raises an error where an archive grows too large."""

    def __init__(self, file: IO[bytes], limit: int):
        self._file, self._limit = file, limit

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0 and position > self._limit:
            raise _BadError("unpacks to more than it may (a bomb?)")
        return self._file.seek(position, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _HEADER:
            raise _BadError("has a header of absurd size")
        if self.tell() > self._limit:
            raise _BadError("unpacks to more than it may (a bomb?)")
        return self._file.read(size)


@dataclass
class _Budget:
    """The remaining bytes and files that may be unpacked."""

    bytes: int
    files: int

    def take(self, size: int) -> None:
        self.bytes -= size
        self.files -= 1
        if self.bytes < 0:
            raise _BadError("unpacks to more than it may (a bomb?)")
        if self.files < 0:
            raise _BadError("holds too many files (a bomb?)")


def _unpack_zip(bundle: zipfile.ZipFile, folder: Path, budget: _Budget) -> None:
    for info in bundle.infolist():
        kind = info.external_attr >> 28  # of a file mode of Unix: 8 plain, 4 folder, 0 not said
        if kind not in (0, 4, 8):
            raise _BadError(f"holds a link or device ({info.filename!r})")
        if info.flag_bits & 1:
            raise _BadError("is encrypted")
        budget.take(info.file_size)
        place = _place(folder, info.filename)
        if info.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            with bundle.open(info) as source:
                _write(source, place, info.file_size, info.filename)


def _unpack_tar(tar: tarfile.TarFile, folder: Path, budget: _Budget) -> None:
    safe = getattr(tarfile, "data_filter", None)  # not in the first releases of Python 3.10
    for member in tar:
        plain = member.isreg() and not member.issparse()
        if not (plain or member.isdir()):
            raise _BadError(f"holds a link or device ({member.name!r})")
        budget.take(member.size)
        place = _place(folder, member.name)
        if safe is not None:
            safe(member, str(folder))
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            source = tar.extractfile(member)
            assert source is not None
            _write(source, place, member.size, member.name)


def _place(folder: Path, name: str) -> Path:
    """The path of a member, which must be inside the folder."""
    path = PurePosixPath(name)
    strange = "\\" in name or "\0" in name or ":" in name
    if path.is_absolute() or ".." in path.parts or strange or len(name) > 1000:
        raise _BadError(f"holds a path that leads outside ({name[:80]!r})")
    return folder.joinpath(*path.parts)


def _write(source: IO[bytes], place: Path, size: int, name: str) -> None:
    if place == place.parent or place.exists():
        raise _BadError(f"holds {name!r} twice")
    place.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with place.open("xb") as file:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise _BadError(f"holds more of {name!r} than its header says")
            file.write(chunk)
    if left:
        raise _BadError("is cut off")
