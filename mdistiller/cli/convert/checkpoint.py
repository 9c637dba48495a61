"""convert_checkpoint: the weights of a file that holds more than weights, alone in a new file.

Old checkpoints may be whole pickled networks, or have objects of other programs beside the weights.
Reading such a file the usual way runs code that it brings, so the library refuses it. This command
reads it with every such object replaced by an empty shell; none of its code runs. Where that finds
no weights, --i-trust-this-file reads it the usual way, in a process of its own with an empty
environment. That process can do whatever you can do: only for files of people you trust.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdistiller.cli.support.command import command_line
from mdistiller.files.atomic import write_failure
from mdistiller.files.names import split_key
from mdistiller.registry import UserError

_MINUTES = 10
_KEPT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # torch may not start without them
RISK = (
    "Reading it as it is runs whatever code it brings, with your rights: it can read, change, send "
    "and delete your files. Go on only if you know who made it and how it came here."
)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint", description=__doc__)
    parser.add_argument(
        "file", type=Path, help="the checkpoint, or FILE:KEY for one of several networks in it"
    )
    parser.add_argument("out", type=Path, help="where the plain one goes")
    parser.add_argument(
        "--i-trust-this-file",
        dest="trust",
        action="store_true",
        help="let its code run, if there is no other way, without asking",
    )
    return parser


def convert(args: argparse.Namespace) -> None:
    """Write the weights, and the plain values beside them, to a new file."""
    if args.out.exists():
        raise UserError(f"{args.out} is there already; name another file")
    if not split_key(args.file)[0].exists():
        raise UserError(f"checkpoint {args.file} does not exist")
    from mdistiller.weights import network_state, stated

    contents = _as_it_is(args.file)
    if contents is not None:
        state = network_state(contents, args.file)
        if split_key(args.file)[1]:
            facts = {k: v for k, v in stated(contents, args.file).items() if v is not None}
            write({"model": state, **facts}, args.out)
            print(f"{args.out}: {len(state)} tensors of {args.file}")
            return
        print(f"{args.file} holds weights and plain values only: it needs no conversion")
        return
    loaded = _read(args.file, "shells")
    how = "none of its code was run"
    if loaded is None:
        _ask(args.file, args.trust)
        loaded = _read(args.file, "run")
        how = "its code was run"
    if loaded is None:
        raise UserError(f"{args.file} is damaged, or weights were not found in it")
    write(loaded, args.out)
    tensors = len(loaded["model"])
    print(f"{args.out}: {tensors} tensors of {args.file}; {how}")


def _as_it_is(path: Path) -> Any:
    """What the library reads of a file; None if it refuses, being no checkpoint is an error."""
    from mdistiller.weights import RefusedError, load_checkpoint

    try:
        return load_checkpoint(path)
    except RefusedError:
        return None


def _ask(path: Path, trust: bool) -> None:
    if trust:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(
            f"{path} gives no weights unless its code runs. {RISK} If you do, add "
            "--i-trust-this-file"
        )
    print(f"{path} gives no weights unless its code runs.\n{RISK}")
    if input("Type yes to run it: ").strip() != "yes":
        raise UserError(f"{path} was not converted")


def _read(path: Path, mode: str) -> dict[str, Any] | None:
    """`{"model": state, ...}` of a file, read in a separate process; None without weights."""
    from mdistiller.layouts import find_states
    from mdistiller.weights import GATHERING, load_checkpoint, network_state

    file, _ = split_key(path)
    worker = Path(__file__).with_name("worker.py")
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "plain.pth")
        words = [sys.executable, "-I", str(worker), str(file.resolve()), str(target), mode]
        try:
            done = subprocess.run(
                words,
                env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60 * _MINUTES,
            )
            if "sharded: " in done.stderr:
                part = done.stderr.rpartition("sharded: ")[2].strip()
                raise UserError(
                    f"{file} has one process's shard of each tensor ({part}): {GATHERING}"
                )
            if done.returncode or not target.is_file():
                return None
            contents = load_checkpoint(target)  # safely: what it wrote is as little trusted
        except subprocess.TimeoutExpired:
            return None
    if not find_states(contents):
        return None
    state = network_state(contents, path)
    metadata = contents if "model" in contents else {}
    kept = {k: v for k, v in metadata.items() if k == "data" or not isinstance(v, Mapping)}
    return {**kept, "model": state}


def write(contents: dict[str, Any], out: Path) -> None:
    """Write a new file, in a folder that need not exist yet."""
    from mdistiller.engine.checkpoints.write import save_checkpoint

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(write_failure(out, error)) from error
    save_checkpoint(contents, out)


main = command_line(parser, convert)
