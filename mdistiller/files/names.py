"""File names on the command line and in configs."""

from __future__ import annotations

import os
from pathlib import Path

EXPORTED = (".onnx", ".pt2")
"""Ends of exported files that state their network, and hold no weights to load into one."""


def split_key(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """FILE:KEY as (FILE, KEY); KEY is "" if there is no colon, or a file has the whole name."""
    file, colon, key = str(path).rpartition(":")
    if colon and file and Path(file).is_file() and not Path(path).exists():
        return Path(file), key
    return Path(path), ""
