"""The checkpoints of a run folder, and how they are known to be what was written.

`checkpoints.json` names the SHA-256 of every file. It is written before a file gets its name, and
has the hash of the file that is replaced as well: whenever the process dies, what stands under a
name is listed. The `latest` that was there before stays as `previous`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from mdistiller.engine.checkpoint import (
    load_checkpoint,
    network_contents,
    replacing,
    write_checkpoint,
)
from mdistiller.engine.utils import log_msg
from mdistiller.registry import UserError

LATEST, PREVIOUS, MANIFEST = "latest", "previous", "checkpoints.json"
_KNOWN = 3  # hashes listed under a name
_BLOCK = 2**22

Entry = dict[str, Any]


class _Hashing:
    """A file that is written from front to back, and the SHA-256 of what it was given."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._hash = handle, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def sha256(path: Path) -> str:
    """Of a file's contents."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


class Store:
    """The checkpoints in a run folder; one process writes them.

    Args:
        folder: of the run.
        safetensors: whether files of one network are written in that format as well.
    """

    def __init__(self, folder: Path, safetensors: bool = False):
        self.folder, self.safetensors = folder, safetensors
        if safetensors:
            _import_safetensors()

    def save(self, contents: Any, name: str, **facts: Any) -> None:
        """Write a checkpoint; one that cannot be read back as it was written replaces none.

        Args:
            facts: for whoever reads the manifest.

        Raises:
            UserError: it cannot be written. The file of this name is still the one before.
        """
        with self._replacing(name, facts) as hashing:
            write_checkpoint(contents, hashing, self.folder / name)

    def save_network(self, net: nn.Module, name: str) -> None:
        """Write a network alone."""
        contents = network_contents(net)
        self.save(contents, name)
        if self.safetensors:
            facts = {"format": "pt"}
            if contents["norm"]:
                facts |= dict(zip(("mean", "std"), map(json.dumps, contents["norm"]), strict=True))
            state = {key: value.contiguous().clone() for key, value in contents["model"].items()}
            with self._replacing(f"{name}.safetensors", {}) as hashing:
                hashing.write(_import_safetensors().save(state, facts))

    @contextlib.contextmanager
    def _replacing(self, name: str, facts: Entry) -> Iterator[_Hashing]:
        written: list[_Hashing] = []

        def settle(temporary: Path) -> None:
            digest = written[0].digest()
            if sha256(temporary) != digest:
                raise OSError(None, "what is read back differs from what was written")
            self._list(name, {"sha256": digest, "bytes": temporary.stat().st_size, **facts})
            if name == LATEST and (self.folder / LATEST).exists():
                _keep(self.folder / LATEST, self.folder / PREVIOUS)

        path = self.folder / name
        with replacing(path, settle) as temporary, temporary.open("wb") as handle:
            written.append(_Hashing(handle))
            yield written[0]

    def _list(self, name: str, entry: Entry) -> None:
        """Enter a file that is about to get its name."""
        files = self.manifest()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        before = files.get(name, [])
        if name == LATEST:
            files[PREVIOUS] = [*before, *files.get(PREVIOUS, [])][:_KNOWN]
        files[name] = [{**entry, "time": now}, *before][:_KNOWN]
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")

    def manifest(self) -> dict[str, list[Entry]]:
        """What is known of the files, the newest first; nothing where no manifest can be read."""
        try:
            files = json.loads((self.folder / MANIFEST).read_text())["files"]
            hashes = [entry["sha256"] for entries in files.values() for entry in entries]
            return files if all(isinstance(digest, str) for digest in hashes) else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def load(self, name: str) -> dict[str, Any]:
        """The state of a training run.

        Raises:
            UserError: the file is missing, damaged, another one than was written, or of something
                else.
        """
        path = self.folder / name
        known = [entry["sha256"] for entry in self.manifest().get(name, [])]
        if known and path.is_file() and path.stat().st_size and sha256(path) not in known:
            raise UserError(
                f"checkpoint {path} is not what this run wrote (damaged, or another file; to "
                f"use it nevertheless, remove {MANIFEST})"
            )
        state = load_checkpoint(path)
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer"} <= set(state):
            raise UserError(f"checkpoint {path} is none of a training run (want epoch, model, ...)")
        return state

    def newest(self) -> tuple[str, dict[str, Any]]:
        """Name and state of the newest checkpoint that is good; says which ones are not.

        Raises:
            UserError: there is none.
        """
        failures = []
        for name in self.candidates():
            try:
                state = self.load(name)
            except UserError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                print(log_msg(f"{failure}: going back to {name}"), flush=True)
            return name, state
        reason = failures[0] if failures else f"there is no checkpoint {self.folder / LATEST}"
        others = "; nor can any other here be used" if len(failures) > 1 else ""
        raise UserError(f"{reason}{others}")

    def put_aside(self, good: str) -> None:
        """Rename a `latest` that could not be used, lest it take the place of the good one."""
        latest = self.folder / LATEST
        if good != LATEST and latest.exists():
            os.replace(latest, latest.with_name("latest.damaged"))

    def candidates(self) -> list[str]:
        """Names to continue from, the newest first; `latest` also where it should be but is not."""
        found = self.folder.glob("*")
        files = [path for path in found if re.fullmatch(r"best|epoch_\d+", path.name)]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        kept = [name for name in (LATEST, PREVIOUS) if (self.folder / name).is_file()]
        names = [*kept, *(path.name for path in files)]
        return names if LATEST in names or not names else [LATEST, *names]

    def prune(self, keep: int) -> None:
        """Remove numbered checkpoints and students but the newest `keep`; 0 keeps all."""
        if not keep:
            return
        found: dict[int, list[Path]] = {}
        for path in self.folder.iterdir():
            match = re.fullmatch(r"(?:epoch|student)_(\d+)(?:\.safetensors)?", path.name)
            if match:
                found.setdefault(int(match[1]), []).append(path)
        for epoch in sorted(found)[:-keep]:
            for path in found[epoch]:
                with contextlib.suppress(OSError):
                    path.unlink()


def _keep(latest: Path, previous: Path) -> None:
    """Give a file a second name, so that `latest` is never missing; else the second name alone."""
    previous.unlink(missing_ok=True)
    try:
        os.link(latest, previous)
    except OSError:  # a file system without hard links
        os.replace(latest, previous)


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            "LOG.SAFETENSORS needs the package safetensors: pip install mdistiller[export]"
        ) from error
    return safetensors.torch
