"""`checkpoints.json` of a run folder: the SHA-256 of its files, and whether they still have it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdistiller.files.hashes import file_hash
from mdistiller.registry import UserError

MANIFEST = "checkpoints.json"
_warned: set[Path] = set()

Entry = dict[str, Any]


def read_manifest(folder: Path) -> dict[str, list[Entry]]:
    """File name -> what it may be, the newest first; empty without a manifest.

    One that cannot be read counts as missing; a warning is printed once.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        if all(isinstance(entry["sha256"], str) for name in files for entry in files[name]):
            return dict(files)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    if path not in _warned:
        _warned.add(path)
        print(f"warning: {path} is damaged: files beside it are not checked", file=sys.stderr)
    return {}


def check_file(path: Path) -> None:
    """Refuse a file that a manifest beside it lists with another hash.

    Raises:
        UserError: it is not what was written.
    """
    entries = read_manifest(path.parent).get(path.name)
    if entries and file_hash(path) not in [entry["sha256"] for entry in entries]:
        raise UserError(
            f"checkpoint {path} is not what its run wrote (damaged, or another file; to use it "
            f"nevertheless, remove {MANIFEST})"
        )
