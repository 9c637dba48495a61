"""Hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK = 1 << 20


def file_hash(path: Path, kind: str = "sha256") -> str:
    """The hash of a file in hexadecimal digits; `kind` is "sha256" or "md5"."""
    digest = hashlib.new(kind, usedforsecurity=kind != "md5")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def wrong_hash(path: Path, sha256: str = "", md5: str = "") -> str:
    """Which hash of a file is wrong, in words; empty if its hashes begin with those given."""
    for kind, want in (("sha256", sha256), ("md5", md5)):
        if want:
            got = file_hash(path, kind)
            if not got.startswith(want.lower()):
                return f"wrong hash: {kind} {got[: len(want)]}, expected {want}"
    return ""
