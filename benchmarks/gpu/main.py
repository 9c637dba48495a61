"""gpu_check: everything that needs a GPU, in less than nine minutes.

tests     pytest -m gpu, where pytest and scikit-learn are installed
sync      training steps that would raise if they waited for the GPU, and a profile of them
together  students that train in lock-step under one teacher, against one after the other
recorded  steps recorded as a CUDA graph (SOLVER.CUDA_GRAPHS), against the usual ones
steps     a training step of KD, DKD and CRD in fp32, TF32 and bf16, batch 64 and 512
compiled  the same with SOLVER.COMPILE, as far as the time reaches

Each part is a process with a time limit; one that fails does not stop the others. Writes gpu.json
and gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import packages

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"tests": 70, "sync": 50, "together": 70, "recorded": 80, "steps": 190, "compiled": 140}
"""What each part may take, in relation; what one leaves is for those behind it."""

PART = ["-m", "benchmarks.gpu.parts"]
SPARE = 5.0  # seconds for the files at the end
GRACE = 3.0  # seconds that a part has left to end by itself


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, one round each")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="limit of the whole (default 8.5)"
    )
    parser.add_argument("--only", nargs="+", choices=list(SHARES), metavar="PART", help="of these")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of missing packages")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0: all parts ran and passed, 1: one did not, 2: it cannot start."""
    args = parser().parse_args(argv)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        error = make_ready(args.wheels, Path(folder))
        if error:
            print(f"gpu_check: {error}", file=sys.stderr)
            return 2
        sys.path.insert(0, folder)  # the page's tables need a package that may be among them
        report = run_parts(args, began + 60 * args.minutes, Path(folder))
        report["seconds"] = time.monotonic() - began
        write(report, args.out)
    failed = [name for name, part in report["parts"].items() if part["failed"]]
    print(f"{report['seconds']:.0f} s; failed: {' '.join(failed) or 'nothing'}; {args.out}/gpu.md")
    return 1 if failed else 0


def make_ready(wheels: Path | None, target: Path) -> str:
    """Install what is missing; why the check cannot start, or an empty text."""
    absent = packages.missing(packages.NEEDED)
    if wheels is None:
        if not absent:
            return ""
        return f"missing packages: {' '.join(absent)} (give their wheels with --wheels DIR)"
    if not wheels.is_dir():
        return f"--wheels: there is no folder {wheels}"
    lacking = [name for name in absent if name not in packages.available(absent, wheels)]
    if lacking:
        return f"missing packages: {' '.join(lacking)} (no wheels of them in {wheels})"
    wanted = [*absent, *packages.available(packages.missing(packages.FOR_TESTS), wheels)]
    error = packages.install(wanted, wheels, target) if wanted else ""
    return f"--wheels: {error}" if error else ""


def run_parts(args: argparse.Namespace, end: float, folder: Path) -> dict[str, Any]:
    """Run the parts one after the other; writes the files after each."""
    report: dict[str, Any] = {"device": args.device, "quick": args.quick, "parts": {}}
    names = [name for name in SHARES if name in (args.only or SHARES)]
    for place, name in enumerate(names):
        left = end - time.monotonic() - SPARE
        limit = left * SHARES[name] / sum(SHARES[other] for other in names[place:])
        print(f"{name}: at most {max(limit, 0):.0f} s", flush=True)
        report["parts"][name] = part = run_part(args, name, limit, folder)
        report.update(part.pop("facts", {}))
        print(f"{name}: {part['state']} after {part['seconds']:.0f} s", flush=True)
        write(report, args.out)
    return report


def run_part(args: argparse.Namespace, name: str, limit: float, folder: Path) -> dict[str, Any]:
    """Run a part in a process group of its own; what it has measured, also where it failed."""
    rows, log = folder / f"{name}.jsonl", args.out / f"{name}.log"
    words = [name, "--device", args.device, "--out", str(rows)]
    words += ["--seconds", str(limit - GRACE), *(["--quick"] if args.quick else [])]
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *PART, *words],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = rows.read_text().splitlines() if rows.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    part: dict[str, Any] = {"seconds": time.monotonic() - began, "limit": limit}
    part["facts"] = read[0] if read else {}
    part["rows"] = read[1:]
    broken = code != 0 or any(row.get("error") for row in part["rows"])
    part["state"] = "out of time" if code is None else "failed" if broken else "done"
    part["failed"] = broken
    if code:
        part["log"] = log.read_text(errors="replace").splitlines()[-15:]
    return part


def write(report: dict[str, Any], out: Path) -> None:
    """The report as JSON and as Markdown."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    from benchmarks.gpu.page import page

    (out / "gpu.md").write_text(page(report))
