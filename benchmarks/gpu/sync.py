"""Whether a training step waits for the GPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from mdistiller.engine.callbacks.ema import AverageStudent
from mdistiller.engine.metrics import Meters
from mdistiller.engine.trainer import trainer_dict

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WARM_UP, STEPS = 2, 2


def waits(cfg: Any, distiller: Any, data: Any) -> dict[str, Any]:
    """Train a few steps, first under PyTorch's own check, then under its profiler.

    Returns:
        error: what PyTorch raised at the first synchronisation, or "".
        calls: how often the profiled steps called a CUDA function that waits, by name.
        unread: measurements that are still on the device; all, where nothing has been read.
    """
    device = next(distiller.parameters()).device
    trainer = trainer_dict[cfg.SOLVER.TRAINER]("x", distiller.train(), data.train, data.val, cfg)
    for hook in trainer.hooks:
        if isinstance(hook, AverageStudent):
            hook.before_train(trainer)
    meters = Meters(interval=10**6)
    data.train.set_epoch(1)
    trainer.call("before_epoch", {})
    batches = iter(data.train)

    def run(count: int) -> None:
        for _ in range(count):
            trainer.step += 1
            trainer.train_iter(next(batches), 1, meters)

    trainer.step = 0
    run(WARM_UP)  # cuDNN and the optimizer set themselves up
    error = ""
    with _raising(device):
        try:
            run(STEPS)
        except RuntimeError as problem:
            error = str(problem).splitlines()[0]
    calls = _profiled(lambda: run(STEPS), device)
    return {"error": error, "calls": calls, "unread": len(meters._waiting)}


@contextlib.contextmanager
def _raising(device: torch.device) -> Iterator[None]:
    """Synchronising calls raise within; on a CPU there are none."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _profiled(run: Any, device: torch.device) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function("the steps"),
    ):
        run()
    events = list(profile.events())
    whole = next(e.time_range for e in events if e.name == "the steps" and not _on_gpu(e))
    inside = (
        event.name
        for event in events
        if event.name in WAITS and whole.start <= event.time_range.start <= whole.end
    )
    return dict(Counter(inside))


def _on_gpu(event: Any) -> bool:
    return event.device_type != torch.autograd.DeviceType.CPU
