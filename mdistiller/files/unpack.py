"""Safe extraction of untrusted archives.

Nothing is written outside the new folder; only plain files and folders are created; sizes are
bounded, whatever the archive's headers state. tarfile's filter="data" alone would admit links,
names given twice, and headers of any size, which are read into memory.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mdistiller.registry import UserError, first_line

_HEADER = 4 << 20  # bytes of a tar header, more than any honest one
_SLACK = 64 << 20  # bytes to which a small archive may grow whatever its ratio
_TOO_LARGE = "unpacks to more than it may (a bomb?)"
_Member = tuple[str, int, Callable[[], Any] | None]
"""Name, bytes when unpacked, and what opens it; None for a folder."""


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
            reason = getattr(error, "strerror", None) or first_line(error)
            if not isinstance(error, _BadError):
                reason = f"cannot be read or written ({reason})"
            raise UserError(
                f"{what} is not unpacked: {archive} {reason}; "
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


def _unpack(archive: Path, folder: Path, limits: Limits) -> None:
    room = min(limits.bytes, max(_SLACK, int(limits.ratio * archive.stat().st_size)))
    with archive.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        if head[:2] == b"PK":
            with zipfile.ZipFile(file) as bundle:
                _extract(_zip_members(bundle), folder, room, limits.files)
            return
        with _decompressed(file, head) as stream:
            source: Any = _Bounded(stream, room + limits.files * 2048)
            with tarfile.open(fileobj=source, mode="r:") as tar:
                _extract(_tar_members(tar), folder, room, limits.files)


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
            raise _BadError(_TOO_LARGE)
        return self._file.seek(position, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _HEADER:
            raise _BadError("has a header of absurd size")
        if self.tell() > self._limit:
            raise _BadError(_TOO_LARGE)
        return self._file.read(size)


def _zip_members(bundle: zipfile.ZipFile) -> Iterator[_Member]:
    for info in bundle.infolist():
        kind = info.external_attr >> 28  # of a file mode of Unix: 8 plain, 4 folder, 0 not said
        if kind not in (0, 4, 8):
            raise _BadError(f"holds a link or device ({info.filename!r})")
        yield info.filename, info.file_size, None if info.is_dir() else partial(bundle.open, info)


def _tar_members(tar: tarfile.TarFile) -> Iterator[_Member]:
    for member in tar:
        plain = member.isreg() and not member.issparse()
        if not (plain or member.isdir()):
            raise _BadError(f"holds a link or device ({member.name!r})")
        yield member.name, member.size, partial(tar.extractfile, member) if plain else None


def _extract(members: Iterable[_Member], folder: Path, room: int, files: int) -> None:
    """Write the members, at most `room` bytes and `files` of them.

    zipfile and tarfile read no more of a member than the size that its header states.
    """
    for name, size, opener in members:
        room, files = room - size, files - 1
        if room < 0:
            raise _BadError(_TOO_LARGE)
        if files < 0:
            raise _BadError("holds too many files (a bomb?)")
        place = _place(folder, name)
        if opener is None:
            place.mkdir(parents=True, exist_ok=True)
            continue
        if place == folder or place.exists():
            raise _BadError(f"holds {name!r} twice")
        place.parent.mkdir(parents=True, exist_ok=True)
        with opener() as source, place.open("xb") as file:
            shutil.copyfileobj(source, file)


def _place(folder: Path, name: str) -> Path:
    """The path of a member, which must be inside the folder."""
    path = PurePosixPath(name)
    strange = "\\" in name or "\0" in name or ":" in name
    if path.is_absolute() or ".." in path.parts or strange or len(name) > 1000:
        raise _BadError(f"holds a path that leads outside ({name[:80]!r})")
    return folder.joinpath(*path.parts)
