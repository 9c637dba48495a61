"""One part of the GPU check, as a process: rows of JSON, one a line, the first being the machine's.

A part stops by itself before its time is over; what it has measured by then is in the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Check:
    """What a part works with.

    Attributes:
        device: "cuda" or "cpu".
        quick: whether small networks and single rounds are enough.
    """

    def __init__(self, args: argparse.Namespace):
        self.device, self.quick = args.device, args.quick
        self.end = time.monotonic() + args.seconds
        self._out: Path = args.out

    def add(self, row: Row) -> None:
        """Write a row to the part's file."""
        with self._out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def each(self, cases: list[Row], measure: Callable[[Row], Row]) -> None:
        """Measure the cases in order until the time is over; one that fails becomes a row too."""
        longest = 0.0
        for place, case in enumerate(cases):
            began = time.monotonic()
            if began + longest > self.end:
                self.add({"left_out": len(cases) - place, "of": len(cases)})
                return
            try:
                row = {**case, **measure(case)}
            except Exception as error:
                row = {**case, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            self.add(row)
            longest = max(longest, time.monotonic() - began)


def tests(check: Check) -> None:
    """`pytest -m gpu`."""
    for module, name in (("pytest", "pytest"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            check.add({"skipped": f"{name} is not installed"})
            return
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run([*words, "tests/gpu"], env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    last = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    check.add({"summary": last, "failed": failed, "error": last if done.returncode else ""})


def sync(check: Check) -> None:
    """Steps that raise where they wait for the GPU."""
    from benchmarks.gpu.sync import waits
    from benchmarks.gpu.timing import generated

    pair = "resnet8 -> resnet8" if check.quick else "resnet56 -> resnet20"
    solvers: dict[str, list[str]] = {
        "fp32": [],
        "bf16": ["SOLVER.AMP", "bf16"],
        "EMA": ["SOLVER.EMA", "0.9"],
    }
    cases: list[Row] = [
        {"method": method, "setting": name, "pair": pair}
        for method in ("KD", "DKD", "CRD")
        for name in solvers
    ]
    cases = cases[::4] if check.quick else cases  # each method and setting once

    def measure(case: Row) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            words = [*solvers[case["setting"]], "LOG.PREFIX", folder]
            cfg, data, distiller = generated({**case, "batch": 8}, words, check)
            return waits(cfg, distiller, data)

    check.each(cases, measure)


def together(check: Check) -> None:
    """Whole runs in lock-step and one after the other."""
    from benchmarks.gpu.timing import lock_step

    lock_step(check)


def recorded(check: Check) -> None:
    """Steps that are recorded as a CUDA graph, against the usual ones."""
    from benchmarks.gpu.stand_in import CalledAgain
    from benchmarks.gpu.timing import recorded_cases, time_recorded
    from mdistiller.engine import captured

    if check.device == "cpu":
        captured.CudaGraph = CalledAgain  # type: ignore[assignment, misc]
    check.each(recorded_cases(check), lambda case: time_recorded(case, check))


def steps(check: Check) -> None:
    """Steps as PyTorch runs them."""
    from benchmarks.gpu.timing import cases, time_step

    check.each(cases(check, compiled=False), lambda case: time_step(case, check))


def compiled(check: Check) -> None:
    """Steps whose networks are compiled."""
    from benchmarks.gpu.timing import cases, time_step
    from mdistiller.networks import compiling

    if check.quick:
        compiling.BACKEND = "eager"  # inductor takes minutes on a CPU
    check.each(cases(check, compiled=True), lambda case: time_step(case, check))


PARTS = {part.__name__: part for part in (tests, sync, together, recorded, steps, compiled)}


def main(argv: list[str] | None = None) -> None:
    """Run the part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    check = Check(args)
    check.add(facts(args.device))
    PARTS[args.part](check)


def facts(device: str) -> Row:
    """Hardware and versions."""
    import torch
    import torchvision

    from mdistiller.cli.support.timing import surroundings

    found = {**surroundings(device), "torchvision": torchvision.__version__}
    if device == "cuda":
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    found["cpus"] = len(os.sched_getaffinity(0))
    return found


if __name__ == "__main__":
    main()
