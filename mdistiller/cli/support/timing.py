"""Measurement for the benchmark: two forms side by side, and the facts that belong to a figure."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mdistiller.registry import UserError

Step = Callable[[], None]


def seconds(step: Step, device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call; what it put on a GPU is waited for."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(
    steps: dict[str, Step], device: str, rounds: int, *, wall: bool = False
) -> dict[str, dict[str, float]]:
    """Time several forms of the same work in turns, so that a busy machine disturbs all alike.

    Each runs once before, unmeasured. On a CPU, time is CPU time: of other programs it knows
    nothing. Work that other processes share is timed on the `wall`.

    Returns:
        By name: `ms`, the median; `low` and `high`, the quartiles; `wall_ms`, the median on the
        wall.
    """
    for step in steps.values():
        step()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, device))
    results = {}
    for name, pairs in taken.items():
        milliseconds = [1e3 * pair[1 if device == "cpu" and not wall else 0] for pair in pairs]
        low, _, high = statistics.quantiles(milliseconds, n=4) if rounds > 1 else milliseconds * 3
        results[name] = {
            "ms": statistics.median(milliseconds),
            "low": low,
            "high": high,
            "wall_ms": statistics.median(1e3 * wall for wall, _ in pairs),
        }
    return results


def peak_growth(work: Callable[..., Step], *args: Any, device: str) -> float:
    """MiB by which one run of the step that `work(*args)` sets up raises the peak memory.

    On a GPU that is what torch allocates; on a CPU the resident memory of a fresh process.

    Raises:
        UserError: neither CUDA nor Linux.
    """
    if device.startswith("cuda"):
        return _cuda_growth(work(*args))
    if device != "cpu" or sys.platform != "linux":
        raise UserError("--memory is measured on CUDA, and on the CPU under Linux")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_resident_growth, work, args).result()


def _cuda_growth(step: Step) -> float:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_growth(work: Callable[..., Step], args: tuple[Any, ...]) -> float:
    import torch

    torch.set_num_threads(1)
    step = work(*args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the run would reuse what the set-up left behind
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present size
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    """A size of this process in KiB, as Linux tells it."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0])


def surroundings(device: str) -> dict[str, Any]:
    """Hardware and versions, to be named beside every figure."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "device": device,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
