"""The checkpoints of a run folder, verified by hash.

`checkpoints.json` lists the SHA-256 of every file. It is written before a new file replaces the old
one, and lists both hashes until then: whenever the process dies, or a rename fails, the file under
a name is a listed one. The last `latest` stays as `previous`.
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

from mdistiller.console import print_log
from mdistiller.engine.checkpoints.write import (
    load_checkpoint,
    network_contents,
    write_checkpoint,
)
from mdistiller.files.atomic import replacing
from mdistiller.files.hashes import file_hash
from mdistiller.files.manifest import MANIFEST, Entry, read_manifest
from mdistiller.registry import UserError

LATEST, PREVIOUS = "latest", "previous"
_WHOLE = r"best|epoch_\d+"


class _Hashing:
    """A file object that computes the SHA-256 of everything written to it."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._hash = handle, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


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
        """Write a checkpoint; it replaces the old one only if it reads back as it was written.

        Args:
            facts: further entries of the manifest.

        Raises:
            UserError: it cannot be written. The old file of this name is then unchanged.
        """
        with self._replacing(name, facts) as hashing:
            write_checkpoint(contents, hashing, self.folder / name)

    def save_network(self, net: nn.Module, name: str, **facts: Any) -> None:
        """Write a network alone."""
        contents = network_contents(net)
        if self.safetensors:
            metadata = {"format": "pt"}
            if contents["norm"]:
                norm = map(json.dumps, contents["norm"])
                metadata |= dict(zip(("mean", "std"), norm, strict=True))
            if "data" in contents:
                data, keys = contents["data"], ("classes", "preprocessing")
                metadata |= {key: json.dumps(data[key]) for key in keys if key in data}
            state = {key: value.contiguous().clone() for key, value in contents["model"].items()}
            with self._replacing(f"{name}.safetensors", facts) as hashing:
                hashing.write(_import_safetensors().save(state, metadata))
        self.save(contents, name, **facts)  # last: where it is there, so is the other

    @contextlib.contextmanager
    def _replacing(self, name: str, facts: Entry) -> Iterator[_Hashing]:
        written: list[_Hashing] = []

        def record(temporary: Path) -> None:
            digest = written[0].digest()
            if file_hash(temporary) != digest:
                raise OSError(None, "what is read back differs from what was written")
            status = temporary.stat()
            entry = {"sha256": digest, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            self._list(name, entry | facts)
            if name == LATEST:
                aside.unlink(missing_ok=True)  # of a save that did not come to its end
                if path.exists():
                    _keep(path, aside)

        path, aside = self.folder / name, self.folder / f".{PREVIOUS}.new"
        with replacing(path, record) as temporary, temporary.open("wb") as handle:
            written.append(_Hashing(handle))
            yield written[0]
        if name == LATEST and aside.exists():
            with contextlib.suppress(OSError):  # `previous` is then the one before
                os.replace(aside, self.folder / PREVIOUS)

    def _list(self, name: str, entry: Entry) -> None:
        """Add a file to the manifest before its rename, and drop entries of missing files."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        there = {file: self.entry(file) for file in self.manifest()}
        files = {file: [listed] for file, listed in there.items() if listed is not None}
        if name == LATEST:
            files[PREVIOUS] = [*files.get(LATEST, []), *files.get(PREVIOUS, [])]
        files[name] = [{**entry, "time": now}, *files.get(name, [])]
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")

    def manifest(self) -> dict[str, list[Entry]]:
        """The manifest: for each file name its possible entries, newest first."""
        return read_manifest(self.folder)

    def entry(self, name: str) -> Entry | None:
        """The manifest's entry for the file that has a name; None if it is not listed.

        Where it lists two, the newer file may not have been renamed.
        """
        entries, path = self.manifest().get(name, []), self.folder / name
        if not entries or not path.is_file():
            return None
        if len(entries) == 1:
            return entries[0]
        facts = {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        alike = [entry for entry in entries if facts.items() <= entry.items()]
        if len(alike) != 1:  # the folder was copied
            digest = file_hash(path)
            alike = [entry for entry in entries if entry["sha256"] == digest]
        return (alike or entries)[0]

    def load(self, name: str) -> dict[str, Any]:
        """The state of a training run.

        Raises:
            UserError: the file is missing, damaged, not the one that was written, or not a
                checkpoint.
        """
        path = self.folder / name
        state = load_checkpoint(path)
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer"} <= set(state):
            raise UserError(
                f"{path} is not a training checkpoint (expected keys epoch, model, optimizer)"
            )
        return state

    def newest(self) -> tuple[str, dict[str, Any]]:
        """Name and state of the newest good checkpoint; prints which ones are damaged.

        Raises:
            UserError: all are missing or damaged.
        """
        failures = []
        for name in self.candidates():
            try:
                state = self.load(name)
            except UserError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                print_log(f"{failure}: going back to {name}")
            return name, state
        reason = failures[0] if failures else f"checkpoint {self.folder / LATEST} does not exist"
        others = "; the other checkpoints there are damaged as well" if len(failures) > 1 else ""
        raise UserError(f"{reason}{others}")

    def put_aside(self, good: str) -> None:
        """Rename an unusable `latest`, so that it does not replace the good `previous`."""
        latest = self.folder / LATEST
        if good != LATEST and latest.exists():
            os.replace(latest, latest.with_name("latest.damaged"))

    def candidates(self) -> list[str]:
        """Names of checkpoints to continue from, newest first; `latest` even if it is missing.

        The manifest has their order, since copying a folder changes file times; without it, file
        times.
        """
        checkpoints = [path for path in self.folder.glob("*") if re.fullmatch(_WHOLE, path.name)]
        listed = bool(self.manifest())

        def age(path: Path) -> tuple[float, ...]:
            entry = self.entry(path.name) or {}
            numbered = path.name.removeprefix("epoch_")
            epoch = entry.get("epoch", int(numbered) if numbered.isdigit() else 0)
            return (epoch, path.stat().st_mtime) if listed else (path.stat().st_mtime,)

        checkpoints.sort(key=age, reverse=True)
        kept = [name for name in (LATEST, PREVIOUS) if (self.folder / name).is_file()]
        names = [*kept, *(path.name for path in checkpoints)]
        return names if LATEST in names or not names else [LATEST, *names]

    def prune(self, keep: int, epoch: int) -> None:
        """Remove numbered checkpoints and students up to an epoch, except the newest `keep` (0:
        keep all).

        Later ones are of a run that resumed from before them, and will write them again.
        """
        found: dict[int, list[Path]] = {}
        for path in self.folder.iterdir():
            match = re.fullmatch(r"(?:epoch|student)_(\d+)(?:\.safetensors)?", path.name)
            if match and int(match[1]) <= epoch:
                found.setdefault(int(match[1]), []).append(path)
        for number in sorted(found)[:-keep] if keep else []:
            for path in found[number]:
                with contextlib.suppress(OSError):
                    path.unlink()


def _keep(latest: Path, aside: Path) -> None:
    """Hard-link `latest` as `previous`, so that `latest` is never missing; else rename it."""
    try:
        os.link(latest, aside)
    except OSError:  # a file system without hard links
        os.replace(latest, latest.with_name(PREVIOUS))


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            "LOG.SAFETENSORS needs the package safetensors: pip install mdistiller[export]"
        ) from error
    return safetensors.torch
