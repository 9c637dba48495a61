"""The benchmarks of whole commands: how soon they answer, and runs in lock-step."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError
from mdistiller.runtime import project_root

COMMANDS: dict[str, tuple[list[str], int]] = {  # words, exit code
    "mdistiller --help": (["-c", "from mdistiller.cli import main; main()", "--help"], 0),
    "train --help": (["tools/train.py", "--help"], 0),
    "wrong key": (
        ["tools/train.py", "--cfg", "configs/cifar100/kd/res56_res20.yaml", "SOLVER.RATE", "1"],
        2,
    ),
    "missing file": (["tools/train.py", "--cfg", "not_there.yaml"], 2),
    "methods": (["tools/methods.py"], 0),
}


class Usage(NamedTuple):
    """What a process took: CPU seconds, and the most memory in MiB."""

    seconds: float
    peak_mib: float


def usage(words: list[str], checkout: Path, expected: int = 0) -> Usage:
    """Run Python in a checkout.

    Raises:
        UserError: it ends with another exit code than `expected`.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=checkout,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        output.seek(0)
        last = (output.read().strip().splitlines() or [""])[-1]
    if code != expected:
        raise UserError(f"{checkout}: python {' '.join(words)} ended with {code}: {last}")
    return Usage(spent.ru_utime + spent.ru_stime, spent.ru_maxrss / 2**10)


def checkouts(args: argparse.Namespace) -> dict[str, Path]:
    """Where to run: "now" here, "before" in the checkout of --against."""
    if sys.platform != "linux":
        raise UserError("this suite reads a process's CPU time and memory as Linux reports them")
    if args.against is None:
        return {"now": project_root()}
    if not (args.against / "tools" / "train.py").is_file():
        raise UserError(f"--against: {args.against} is not a checkout (it has no tools/train.py)")
    return {"before": args.against.absolute(), "now": project_root()}


def race_processes(
    forms: Mapping[str, Callable[[], Usage]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Run the forms in turns; by name the median, quartiles and peak."""
    taken: dict[str, list[Usage]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            taken[name].append(form())
    results = {}
    for name, spent in taken.items():
        own = [each.seconds for each in spent]
        low, _, high = statistics.quantiles(own, n=4) if rounds > 1 else own * 3
        peak = max(each.peak_mib for each in spent)
        middle = statistics.median(own)
        results[name] = {"seconds": middle, "low": low, "high": high, "peak_mib": peak}
    return results


def commands(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row a command: its CPU seconds."""
    rows = []
    for name in args.only or COMMANDS:
        if name not in COMMANDS:
            raise UserError(f"--only: no command {name!r}; there are {', '.join(COMMANDS)}")
        words, code = COMMANDS[name]
        forms = {
            key: functools.partial(usage, words, place, code)
            for key, place in checkouts(args).items()
        }
        rows.append({"command": name, **race_processes(forms, args.rounds)})
    return _shown(rows, "command")


def together(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row: CPU seconds of runs one after the other, in --against if given, and in lock-step."""
    from benchmarks.runs import METHODS, write_runs

    methods = args.only or list(METHODS)
    places = checkouts(args)
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    nets = {
        key: given[f"DISTILLER.{key.upper()}"]
        for key in ("teacher", "student")
        if f"DISTILLER.{key.upper()}" in given
    }

    def runs(call: Callable[[list[str], list[str]], Usage]) -> Usage:
        with tempfile.TemporaryDirectory() as folder:
            size: dict[str, Any] = {"images": args.images, "batch": args.batch, "device": device}
            paths = write_runs(Path(folder), methods, **size, **nets)
            return call([str(path) for path in paths.values()], args.opts)

    def one_by_one(paths: list[str], words: list[str]) -> Usage:
        place = places.get("before", places["now"])
        spent = [usage(["tools/train.py", "--cfg", path, *words], place) for path in paths]
        return Usage(sum(e.seconds for e in spent), max(e.peak_mib for e in spent))

    def lock_step(paths: list[str], words: list[str]) -> Usage:
        files = [word for path in paths for word in ("--cfg", path)]
        return usage(["tools/train.py", *files, *words], places["now"])

    forms = {"before": lambda: runs(one_by_one), "now": lambda: runs(lock_step)}
    row = {"runs": " ".join(methods), **race_processes(forms, args.rounds)}
    return _shown([row], "runs")


def _shown(rows: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """The rows with their ratio, printed."""
    forms = [key for key in ("before", "now") if rows and key in rows[0]]
    memory = title == "runs"  # no child has less than its parent had at its start
    titles, lines = [title], []
    for key in forms:
        titles += [f"{key}, CPU s", *([f"{key}, peak MiB"] if memory else [])]
    for row in rows:
        cells = [str(row[title])]
        for key in forms:
            taken = row[key]
            cells.append(f"{taken['seconds']:.2f} ({taken['low']:.2f}-{taken['high']:.2f})")
            cells += [f"{taken['peak_mib']:.0f}"] if memory else []
        if "before" in row:
            row["ratio"] = row["now"]["seconds"] / row["before"]["seconds"]
            cells.append(f"{row['ratio']:.2f}")
        lines.append(cells)
    titles += ["now / before"] if len(forms) > 1 else []
    print(markdown_table(titles, lines))
    return rows
