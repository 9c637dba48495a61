"""Peak memory of a training step."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mdistiller.cli.support.timing import Step
from mdistiller.registry import UserError


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
