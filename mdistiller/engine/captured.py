"""A whole training step as one CUDA graph: SOLVER.CUDA_GRAPHS.

With small networks a fast GPU waits for Python to launch its kernels. Here the first steps of an
epoch run as usual; then a step is recorded, from the forward passes to the optimizer's update, and
replayed for every further batch of its shape. Each epoch records anew: rates and weights that
depend on the epoch are constants of the graph. A step that keeps other state in Python, cannot be
recorded, or changes other values when replayed ends the run with one line.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mdistiller.engine.metrics import Meters
from mdistiller.frozen_teacher.cacheable import is_wanted
from mdistiller.registry import UserError, first_line
from mdistiller.runtime import resolve_device, world_size

KEY = "SOLVER.CUDA_GRAPHS"
WARM_UP = 3
"""Steps of an epoch before one is recorded: libraries and the optimizer set themselves up."""
CLOSE = 1e-2
"""How far a tensor may be off after a replayed step, as part of the step's largest change of it."""
_WITHIN_A_STEP = {"before_forward", "after_forward", "after_update"}

Numbers = tuple[dict[str, Tensor], dict[str, Tensor], int]


class CudaGraph:
    """Records what a function does on the GPU; tests on CPUs put another class in its place."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    @functools.cache
    def _stream(device: int) -> torch.cuda.Stream:
        """The one side stream of a GPU: the allocator keeps memory apart for each stream."""
        return torch.cuda.Stream(device)

    @classmethod
    @contextlib.contextmanager
    def warming_up(cls) -> Iterator[None]:
        """Run steps on a side stream, as those before a recording must."""
        stream = cls._stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, function: Callable[[], Numbers]) -> Numbers:
        """Record `function` without running its kernels; each replay fills the result."""
        stream = self._stream(torch.cuda.current_device())
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Run the recorded kernels."""
        self._graph.replay()


def check_settings(cfg: Any, plain: bool) -> None:
    """Refuse settings with which steps cannot be recorded, where the config asks for it.

    Args:
        plain: whether the trainer's step is the base class's.
    """
    solver = cfg.SOLVER
    if not solver.get("CUDA_GRAPHS", False):
        return
    device, cache = resolve_device(cfg.DEVICE).type, cfg.DISTILLER.get("TEACHER_CACHE")
    weak = cfg.DISTILLER.get("TEACHER_AUGMENT") == "weak"  # an attribute of each batch's images
    settings = {
        f"DEVICE {device}": device != CudaGraph.device_type,
        f"SOLVER.TRAINER {solver.TRAINER}": not plain,
        "SOLVER.AMP fp16 (bf16 does)": solver.AMP == "fp16",
        f"SOLVER.ACCUMULATE {solver.ACCUMULATE}": solver.ACCUMULATE > 1,
        f"SOLVER.EMA {solver.EMA}": bool(solver.EMA),
        f"SOLVER.SKIP_NONFINITE {solver.SKIP_NONFINITE}": bool(solver.SKIP_NONFINITE),
        f"SOLVER.COMPILE {solver.COMPILE}": bool(solver.COMPILE),
        "SOLVER.SCHEDULE_BY step": solver.get("SCHEDULE_BY") == "step",
        f"DISTILLER.TEACHER_CACHE {cache}": is_wanted(cfg),
        "DISTILLER.TEACHER_AUGMENT weak": weak,
        f"{world_size()} processes": world_size() > 1,
    }
    for setting, given in settings.items():
        if given:
            raise UserError(f"{KEY} True does not work with {setting}: set one of the two back")


def step_function(trainer: Any) -> Callable[[Any, int, Meters], str]:
    """What takes the steps of an epoch: `train_iter`, or what records and replays it."""
    if not trainer.cfg.SOLVER.get("CUDA_GRAPHS", False) or trainer.stage:
        return trainer.train_iter  # type: ignore[no-any-return]
    for hook in trainer.hooks:
        if hook is not trainer.guard and hook.moments & _WITHIN_A_STEP:
            raise UserError(
                f"{KEY} True does not work with the hook {type(hook).__name__}, which acts within "
                "a step: set one of the two back"
            )
    return RecordedSteps(trainer)


class RecordedSteps:
    """The steps of an epoch: the first ones as usual, then a recorded one for each batch."""

    def __init__(self, trainer: Any):
        self.trainer, self.name, self.done = trainer, trainer.cfg.DISTILLER.TYPE, 0
        self._shapes: list[torch.Size] = []
        self._graph: CudaGraph | None = None
        if trainer.device.type == "cuda":
            make_capturable(trainer.optimizer, trainer.device)

    def __call__(self, data: Sequence[Any], epoch: int, meters: Meters) -> str:
        """A step on a batch of the loader; as `train_iter`."""
        data = tree_map(lambda item: item.to(self.trainer.device, non_blocking=True), list(data))
        shapes = [item.shape for item in tree_leaves(data)]
        self._shapes = self._shapes or shapes
        self.done += 1
        if shapes != self._shapes:  # the last batch of an epoch
            return self._step_as_usual(data, epoch, meters)
        if self.done <= WARM_UP:
            with CudaGraph.warming_up():
                return self._step_as_usual(data, epoch, meters)
        if self._graph is None:
            self._graph = CudaGraph()
            self._record(self._graph, data, epoch)
            return self._compare(self._graph, data, epoch, meters)
        self._replay(self._graph, data)
        index = data[2] if len(data) > 2 else None
        self.trainer.guard.before_forward(self.trainer, {"index": index})  # for its reports
        terms, others, samples = self._numbers
        meters.add(f"epoch {epoch}, step {self.trainer.step}", terms, others, samples)
        return ""

    def _step_as_usual(self, data: Sequence[Any], epoch: int, meters: Meters) -> str:
        before = python_state(self.trainer)
        message: str = self.trainer.train_iter(data, epoch, meters)
        after = python_state(self.trainer)
        changed = [name for name in after if after[name] != before.get(name)]
        if changed and self.done > 1:  # the first step may set things up
            raise UserError(f"{self._trouble} changes {changed[0]}, which a replay would not do")
        return message

    @property
    def _trouble(self) -> str:
        return f"set {KEY} to False: a step of {self.name}"

    def _record(self, graph: CudaGraph, data: Any, epoch: int) -> None:
        """Record a step on buffers of the shapes in `data`."""
        self._buffers, self._epoch = tree_map(torch.clone, data), epoch
        hooks, self.trainer.hooks = self.trainer.hooks, []
        try:
            self._numbers = graph.record(self._step_on_buffers)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a failed recording fails as well
                cause = cause.__context__
            text = f"{self._trouble} cannot be recorded ({first_line(cause)})"
            raise UserError(text) from error
        finally:
            self.trainer.hooks = hooks

    def _step_on_buffers(self) -> Numbers:
        taken = _Numbers()
        self.trainer.train_iter(self._buffers, self._epoch, taken)
        return taken.numbers

    def _replay(self, graph: CudaGraph, data: Any) -> None:
        for buffer, item in zip(tree_leaves(self._buffers), tree_leaves(data), strict=True):
            buffer.copy_(item)
        graph.replay()

    def _compare(self, graph: CudaGraph, data: Any, epoch: int, meters: Meters) -> str:
        """Replay a step, undo it and take it as usual: both must change the same.

        Not compared where a step draws random numbers on the device.
        """
        tensors, device = state_tensors(self.trainer), self.trainer.device
        generator = torch.cuda if device.type == "cuda" else torch
        before, drawn = [tensor.clone() for tensor in tensors], generator.get_rng_state()
        self._replay(graph, data)
        replayed = [tensor.clone() for tensor in tensors]
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        message = self._step_as_usual(data, epoch, meters)
        changes = [largest(now, value) for now, value in zip(tensors, before, strict=True)]
        errors = [largest(now, value) for now, value in zip(tensors, replayed, strict=True)]
        floor = 1e-3 * max(changes)  # some change by rounding alone
        good = all(e <= CLOSE * max(c, floor) for e, c in zip(errors, changes, strict=True))
        finite = math.isfinite(sum(changes))  # else the guard reports it
        if finite and not good and torch.equal(drawn, generator.get_rng_state()):
            raise UserError(f"{self._trouble} changes other values when it is replayed")
        return message


class _Numbers(Meters):
    """The numbers of one step, as the tensors that they are."""

    numbers: Numbers

    def add(
        self, label: str, terms: Mapping[str, Tensor], others: Mapping[str, Tensor], batch_size: int
    ) -> None:
        first, second = ({k: v.detach() for k, v in part.items()} for part in (terms, others))
        self.numbers = first, second, batch_size


def largest(first: Tensor, second: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((first.double() - second.double()).abs().max())


def make_capturable(optimizer: Any, device: torch.device) -> None:
    """Have Adam and the like count their steps on the device."""
    if "capturable" not in optimizer.defaults:
        return
    optimizer._warned_capturable_if_run_uncaptured = True  # it would warn of the usual steps
    for group in optimizer.param_groups:
        group["capturable"] = True
    for values in optimizer.state.values():  # of a resumed run
        values["step"] = values["step"].to(device)


def state_tensors(trainer: Any) -> list[Tensor]:
    """What a step changes on the device: parameters, buffers, the optimizer's state; detached."""
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *moments]
    return [tensor.detach() for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel()]


def python_state(trainer: Any) -> dict[str, Any]:
    """What Python holds of a step's state, by name: random generators, numbers, which tensors."""
    state: dict[str, Any] = {
        "Python's random generator": random.getstate(),
        "numpy's random generator": repr(np.random.get_state()),
        "torch's random generator of the CPU": torch.get_rng_state().numpy().tobytes(),
    }
    for path, module in trainer.model.named_modules():
        parts = {**vars(module), **module._parameters, **module._buffers}
        for key, value in parts.items():
            if isinstance(value, (bool, int, float, str, Tensor)):
                state[f"{path or 'its'} {key}"] = _identity(value)
    for values in trainer.optimizer.state.values():
        for key, value in values.items():
            on_host = isinstance(value, Tensor) and value.device != trainer.device
            state[f"the optimizer's {key}"] = float(value) if on_host else _identity(value)
    for k, group in enumerate(trainer.optimizer.param_groups):  # some of timm count steps there
        numbers = {key: v for key, v in group.items() if isinstance(v, (bool, int, float))}
        state |= {f"the optimizer's {key} (group {k})": v for key, v in numbers.items()}
    return state


def _identity(value: Any) -> Any:
    return (id(value), value) if isinstance(value, Tensor) else value  # tuples compare the id first
