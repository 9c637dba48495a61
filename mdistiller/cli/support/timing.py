"""Measurement for the benchmark: two forms side by side, and the facts that belong to a figure."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

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
