"""Single-edit bugs, put into a copy of the package one by one: a named test has to fail for each.

`python tools/faults.py --planted` prints which are caught. An edit that no longer fits the code is
an error: bring `tests/faults/planted/bugs.py` up to date.
"""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.planted.bugs import BUGS, Bug
from mdistiller.registry import UserError

REPO = Path(__file__).resolve().parents[3]
TESTS_FAILED = 1
"""pytest's exit code; others mean that the tests did not run."""
TIMEOUT, CPU_SECONDS = 1800, 300  # of one run of tests
PRELOADED = ("torch", "torchvision", "timm", "scipy.stats", "yacs.config", "pytest")
"""What many tests import and no bug touches."""


@dataclass(frozen=True)
class Verdict:
    """What became of a planted bug; `caught` is None if its tests did not run."""

    bug: Bug
    caught: bool | None
    output: str

    def line(self) -> str:
        word = {True: "caught", False: "SURVIVED", None: "NOT TRIED"}[self.caught]
        return f"{word:9}  {self.bug.file:42}  {self.bug.name}"


def stale(bug: Bug, root: Path = REPO) -> str:
    """Why a bug does not fit the code any more; empty if it does."""
    path = root / "mdistiller" / bug.file
    if not path.is_file():
        return f"{bug.name}: mdistiller/{bug.file} does not exist"
    count = path.read_text().count(bug.old)
    if count != 1:
        return f"{bug.name}: mdistiller/{bug.file} has {count} times, not once: {bug.old}"
    file, _, function = bug.test.partition("::")
    test = root / "tests" / file
    if not test.is_file():
        return f"{bug.name}: tests/{file} does not exist"
    if function and f"def {function.partition('[')[0]}(" not in test.read_text():
        return f"{bug.name}: tests/{file} has no {function}"
    return ""


def copy_checkout(folder: Path) -> Path:
    """A copy of package and tests in `folder`; what else there is, is linked."""
    for path in REPO.iterdir():
        if path.name in ("mdistiller", "tests"):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and output for tests of a copied checkout, in a forked process.

    What this process has imported besides the package (torch takes seconds) serves the tests too.
    """
    log = folder / ".tests.log"  # a checkout may have a folder output/
    child = os.fork()
    if not child:
        os._exit(_pytest(folder, [f"tests/{test}" for test in tests], log))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text(errors="replace")


def _pytest(folder: Path, tests: Sequence[str], log: Path) -> int:
    import pytest

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.alarm(TIMEOUT)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    ours = {path.stem for path in (REPO / "tests").rglob("*.py")} | {"mdistiller", "faults"}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    paths = [str(folder), str(folder / "tests")]
    sys.path[:] = paths + [path for path in sys.path if not Path(path).is_relative_to(REPO)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # an edit within the same second would not be seen
    os.chdir(folder)
    # slow tests may be named as well
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    return int(pytest.main([*options, *tests]))


def try_bug(folder: Path, bug: Bug) -> Verdict:
    """Plant a bug, run its tests, and put the code right again."""
    path = folder / "mdistiller" / bug.file
    text = path.read_text()
    path.write_text(text.replace(bug.old, bug.new))
    try:
        code, output = run_tests(folder, [bug.test])
    finally:
        path.write_text(text)
    return Verdict(bug, {0: False, TESTS_FAILED: True}.get(code), output)


def plant(folder: Path, only: str = "", show: Callable[[str], None] = print) -> bool:
    """Try all bugs, or those with `only` in their name; True if every one was caught.

    Raises:
        UserError: an edit no longer fits the code, or a test fails without any bug.
    """
    bugs = [bug for bug in BUGS if only in bug.name]
    reasons = [reason for reason in map(stale, bugs) if reason]
    if reasons:
        raise UserError("bring tests/faults/planted/bugs.py up to date: " + "; ".join(reasons))
    for name in PRELOADED:
        importlib.import_module(name)
    copy_checkout(folder)
    code, output = run_tests(folder, sorted({bug.test for bug in bugs}))
    if code:
        lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise UserError(f"a test fails without any bug: {'; '.join(lines) or output[-500:]}")
    verdicts = []
    for bug in bugs:
        verdicts.append(try_bug(folder, bug))
        show(verdicts[-1].line())
    for verdict in verdicts:
        if verdict.caught is None:
            show(f"{verdict.bug.name}: {verdict.output[-2000:]}")
    show(f"planted bugs caught {sum(v.caught is True for v in verdicts)}/{len(verdicts)}")
    return all(verdict.caught for verdict in verdicts)
