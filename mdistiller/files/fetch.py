"""Downloads over https: resumed, retried, checked by hash, and put in place by one rename.

The download functions of torch.hub and torchvision neither resume nor retry nor refuse plain http,
so they are not used here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import ssl
import time
from http.client import HTTPException, InvalidURL
from pathlib import Path
from socket import gaierror
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock
from tqdm import tqdm

from mdistiller.files.hashes import wrong_hash
from mdistiller.registry import UserError

ATTEMPTS = 5  # in a row without a byte more than before
PAUSE = 1.0  # seconds before the second attempt; twice as many before each further one
TIMEOUT = 30.0  # seconds without an answer
LIMIT = 64 * 10**9  # bytes that no file of ours exceeds
_CHUNK = 1 << 16
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others in a moment
_HERE = ("localhost", "127.0.0.1", "::1")


class _RefusedError(Exception):
    """A refusal that a further attempt would not change."""


def fetch(
    url: str,
    path: Path,
    what: str,
    *,
    sha256: str = "",
    md5: str = "",
    size: int | None = None,
    advice: str = "",
) -> None:
    """Download `url` to `path`, unless that exists.

    A partial download stays as `path` + ".part"; a later call resumes it if the server supports
    that and still has the same file. If several processes call this, one downloads and the others
    wait.

    Args:
        url: https, file, or http on this machine; redirects must be so, too.
        what: name of the file in errors.
        sha256, md5: the expected hash, or its first digits.
        size: its bytes, if known.
        advice: what to do if it fails; by default, to put the file there by hand.

    Raises:
        UserError: the download failed, or the existing file has another hash. A partial file that a
            later call can resume stays.
    """
    advice = advice or f"get {url} and put it at {path}"
    try:
        if not path.is_file():
            _check_url(url)
            _fetch_alone(_Part(url, path.with_name(f"{path.name}.part")), path, size, sha256, md5)
        elif problem := wrong_hash(path, sha256, md5):
            raise UserError(f"{path} is there and is not {what} ({problem}); remove it")
    except (_RefusedError, OSError, HTTPException) as error:
        raise UserError(f"{what} could not be downloaded ({_reason(error)}); {advice}") from error


def _fetch_alone(part: _Part, path: Path, *expected: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with lock:
        if not path.is_file():  # else another process was here first
            _download(part, *expected)
            os.replace(part.path, path)
            part.forget()
        with contextlib.suppress(OSError):  # whoever waits for it finds the file
            os.unlink(lock.lock_file)


class _Part:
    """The partial file, and the note by which the server can tell whether its file is the same."""

    def __init__(self, url: str, path: Path):
        self.url, self.path = url, path
        self.note = path.with_name(f"{path.name}.json")

    def recall(self) -> None:
        """Read the note of a partial file."""
        self.validator = ""  # ETag or date of the server's file
        with contextlib.suppress(OSError, ValueError, AttributeError):
            noted = json.loads(self.note.read_text())
            if noted.get("url") == self.url:
                self.validator = str(noted.get("validator", ""))
        self.resumed = self.bytes > 0

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def begin(self, validator: str) -> None:
        """Start again with the server's present file."""
        self.validator = validator
        self.note.write_text(json.dumps({"url": self.url, "validator": validator}))
        self.path.write_bytes(b"")

    def forget(self) -> None:
        """Remove the partial file and its note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _download(part: _Part, size: int | None, sha256: str, md5: str) -> None:
    has_hash = bool(sha256 or md5)
    part.recall()
    most, failures = part.bytes, 0
    while True:
        try:
            _continue(part, size, has_hash)
            break
        except (OSError, HTTPException) as error:
            if not part.bytes:
                part.forget()
            if not _passing(error, begun=part.bytes > 0):
                raise
            failures = 0 if part.bytes > most else failures + 1
            most = max(most, part.bytes)
            if failures >= ATTEMPTS:
                raise
            time.sleep(PAUSE * 2 ** max(0, failures - 1))
    problem = wrong_hash(part.path, sha256, md5)
    if problem:
        part.forget()
        if part.resumed:  # the beginning was of another day
            return _download(part, size, sha256, md5)
        raise _RefusedError(problem)


def _continue(part: _Part, size: int | None, known: bool) -> None:
    """Request the missing bytes and append them; OSError if the connection ends too early."""
    start = part.bytes if part.validator or known else 0
    headers = {"User-Agent": "mdistiller", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        answer = _opener().open(Request(part.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{start}"):
            return  # all of it is there
        part.forget()
        raise ConnectionError("the partial file is longer than the whole") from None
    with answer:
        whole = _whole_size(answer, start)
        if size is not None and whole not in (None, size):
            raise _RefusedError(f"it has {whole} bytes, expected {size}")
        if _position(answer, start) != start or not start:
            part.begin(_validator(answer))
        _append(answer, part, whole if whole is not None else size)


def _append(answer: Any, part: _Part, whole: int | None) -> None:
    start = part.bytes
    if whole is not None:
        _check_space(part.path.parent, whole, start)
    bar = tqdm(
        desc=part.path.name.removesuffix(".part"),
        total=whole,
        initial=start,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    )
    with part.path.open("ab") as file, bar:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > (LIMIT if whole is None else whole):
                raise _RefusedError("it is larger than announced")
        file.flush()
        os.fsync(file.fileno())
    if whole is not None and part.bytes < whole:
        raise ConnectionError(f"the connection ended after {part.bytes} of {whole} bytes")


def _check_space(folder: Path, whole: int, there: int) -> None:
    free = shutil.disk_usage(folder).free
    if whole > LIMIT:
        raise _RefusedError(f"it has {whole} bytes, which no file of ours has")
    if whole - there > free:
        raise _RefusedError(f"it has {whole} bytes and {folder} has room for {free}")


def _position(answer: Any, start: int) -> int:
    """The position in the file where a response's body begins: `start` if the server resumes."""
    span = answer.headers.get("Content-Range", "")
    if getattr(answer, "status", 200) != 206 or not span.startswith(f"bytes {start}-"):
        return 0
    return start


def _whole_size(answer: Any, start: int) -> int | None:
    """The size of the whole file in bytes, if the server states it."""
    if getattr(answer, "status", 200) == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _RefusedError("the server sends another part than was asked for")
    else:
        total = answer.headers.get("Content-Length") or ""
    return int(total) if total.isdecimal() else None


def _validator(answer: Any) -> str:
    """The validator for If-Range: a strong ETag, else the Last-Modified date."""
    tag = answer.headers.get("ETag") or ""
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified") or ""


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        _check_url(newurl)
        if newurl.startswith("file:"):
            raise _RefusedError(f"the server redirects to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> Any:
    return build_opener(_Redirects)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _RefusedError(f"{url} is not an address ({error})") from None
    local = parts.scheme == "file" or (parts.scheme == "http" and parts.hostname in _HERE)
    if parts.scheme != "https" and not local:
        raise _RefusedError(f"{url} is not https")


def _passing(error: Exception, begun: bool) -> bool:
    """Whether a retry may succeed; after a failed name lookup only if an earlier one succeeded."""
    if isinstance(error, HTTPError):
        return error.code in _AGAIN
    if isinstance(error, URLError):
        reason = error.reason
        never = (FileNotFoundError, ssl.SSLCertVerificationError, *(() if begun else (gaierror,)))
        return isinstance(reason, OSError) and not isinstance(reason, never)
    if isinstance(error, InvalidURL):
        return False
    ours = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
    return getattr(error, "errno", None) not in ours


def _reason(error: BaseException) -> str:
    """The reason of a failed download in one line, without error numbers."""
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, URLError):
        cause = error.reason
        return f"no connection: {getattr(cause, 'strerror', None) or cause}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def address(base: str, name: str) -> str:
    """The URL of a file `name` below a mirror: an https address, or a folder."""
    if "://" in base:
        return f"{base.rstrip('/')}/{name}"
    return (Path(base).expanduser() / name).resolve().as_uri()
