"""Two processes of one run, of which one is killed, or both are asked to stop.

Most are forked, which is quick; some are started by torchrun, as users do.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from faults.work import Outcome, Work, free_port
from mdistiller.engine.callbacks.preemption import EXIT_CODE

# Of each; epochs enough to strike before the last one, in which a signal comes too late.
_PAIR = {"SOLVER__BATCH_SIZE": 8, "SOLVER__EPOCHS": 8}


def start_pair(work: Work, name: str, **changes: Any) -> list[BaseProcess]:
    """Begin or continue a run in two processes, as torchrun starts them."""
    common = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    settings = {**_PAIR, **changes}
    processes = []
    for rank in range(2):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(work.start(name, environment=own, **settings))
    return processes


def join(processes: list[BaseProcess]) -> list[int]:
    """Wait for the end of processes; their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def _await_step(work: Work, name: str, processes: list[BaseProcess]) -> None:
    """Wait until a pair has saved something since now, or has ended."""
    _await_save(work, name, lambda: next((p for p in processes if p.exitcode is not None), None))


def _await_save(work: Work, name: str, ended: Callable[[], object]) -> None:
    latest, now = work.run_folder(name) / "latest", time.time()
    while ended() is None:
        try:
            if latest.stat().st_mtime > now:
                return
        except OSError:
            pass  # not there yet
        time.sleep(0.02)


def _strike(
    work: Work, name: str, processes: list[BaseProcess], kind: signal.Signals, draw: random.Random
) -> list[str] | None:
    """Send a signal, SIGTERM to both, any other to one; returns what is wrong with the end.

    None: the run was too near to its end, and got there.
    """
    chosen = draw.choice(processes)
    for process in processes if kind == signal.SIGTERM else [chosen]:
        os.kill(process.pid or 0, kind)
    if kind == signal.SIGSTOP:  # one that hangs: the other gives up, a launcher ends both
        next(process for process in processes if process is not chosen).join()
        os.kill(chosen.pid or 0, signal.SIGKILL)
    codes, said = join(processes), work.output(name)[-3000:]
    good = codes == [EXIT_CODE] * 2 if kind == signal.SIGTERM else 0 not in codes
    if kind == signal.SIGTERM and codes == [0, 0]:  # it came in the last epoch: all is done
        return None
    if kind == signal.SIGSTOP:
        good &= "it hangs or is stopped" in said
    return [] if good else [f"{kind.name} ended in {codes}\n{said}"]


def ranks(work: Work) -> Outcome:
    """Kill one of two processes: the other ends as well; ask both to stop: both do, at one step."""
    outcome = Outcome("lost processes survived")
    draw = random.Random(work.seed + 2)
    pair = start_pair(work, "pair", LOG__SAVE_EVERY_MINUTES=0.0)
    _await_step(work, "pair", pair)
    started = time.perf_counter()
    if any(codes := join(pair)):
        outcome.losses.append(
            f"the undisturbed pair ended with {codes}\n{work.output('pair')[-3000:]}"
        )
        return outcome
    length = time.perf_counter() - started  # of all epochs but the first
    whole = work.run_folder("pair")
    kinds = [signal.SIGKILL, signal.SIGTERM, *([] if work.quick else [signal.SIGSTOP])]
    heard = 0
    for number in range(1 if work.quick else 4):
        name = f"pair{number}"
        for kind in kinds:
            patience = 0.1 if kind == signal.SIGSTOP else 30.0
            processes = start_pair(work, name, SOLVER__RANK_TIMEOUT=patience)
            _await_step(work, name, processes)
            time.sleep(draw.uniform(0.0, 0.3) * length)
            if any(process.exitcode is not None for process in processes):
                join(processes)
                break
            wrong = _strike(work, name, processes, kind, draw)
            if wrong is None:
                break
            outcome.tried += 1
            heard += kind == signal.SIGTERM
            outcome.losses += [f"{name}: {text}" for text in wrong]
        if any(join(start_pair(work, name))):
            outcome.losses.append(f"{name}: not continued\n{work.output(name)[-3000:]}")
        outcome.losses += work.differences(name, whole)
        work.forget(name)
    if not heard:
        outcome.losses.append("no SIGTERM was heard: every one came in a last epoch")
    if not work.quick and Path("/proc/self/task").is_dir():
        _under_torchrun(work, whole, outcome, draw)
    return outcome


def _under_torchrun(work: Work, whole: Path, outcome: Outcome, draw: random.Random) -> None:
    """Kill a process that torchrun started; then stop torchrun; then let it go on to the end."""
    name = "torchrun"
    for kind in (signal.SIGKILL, signal.SIGTERM):
        launcher = _launch(work, name)
        _await_save(work, name, launcher.poll)
        task = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        children = [int(word) for word in task.read_text().split()]
        struck = draw.choice(children) if kind == signal.SIGKILL else launcher.pid
        os.kill(struck, kind)
        outcome.tried += 1
        if launcher.wait(180) == 0:
            outcome.losses.append(
                f"{name}: {kind.name} was not noticed\n{work.output(name)[-2000:]}"
            )
    if "stopped by SIGTERM" not in work.output(name):
        outcome.losses.append(f"{name}: SIGTERM was not heard\n{work.output(name)[-3000:]}")
    if _launch(work, name).wait(300):
        outcome.losses.append(f"{name}: not continued\n{work.output(name)[-3000:]}")
    outcome.losses += work.differences(name, whole)
    work.forget(name)


def _launch(work: Work, name: str) -> subprocess.Popen[bytes]:
    """Begin or continue a run by torchrun."""
    words = ["--standalone", "--nproc-per-node=2", "-m", "mdistiller", "train"]
    own = ["--resume=auto", "--import", "faults.work"]
    settings = work.settings(name, **_PAIR)
    values = [str(word) for pair in settings.items() for word in pair]
    with (work.folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, *own, *values],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
