"""Something in place of CUDA graphs on CPUs, so that the code around them can be tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mdistiller.engine.captured import state_tensors


class CalledAgain:
    """In place of `CudaGraph`: a replay calls the function again and fills its first result.

    The function must be a method of `RecordedSteps`: what its first call changes is undone, as a
    recording runs no kernels.
    """

    device_type = "cpu"
    warming_up = staticmethod(contextlib.nullcontext)

    def record(self, function: Callable[[], Any]) -> Any:
        """Call the function once; its result."""
        tensors = state_tensors(function.__self__.trainer)  # type: ignore[attr-defined]
        before = [tensor.clone() for tensor in tensors]
        self._function, self._result = function, function()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        return self._result

    def replay(self) -> None:
        """Call the function again."""
        for old, new in zip(tree_leaves(self._result), tree_leaves(self._function()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
