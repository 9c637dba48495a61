"""Last batches of one image, which not every network or method can train on.

Batch norm in train mode needs more than one value per channel: with 1x1 maps, a batch of one image
is an error. A trial step before training shows whether that would happen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mdistiller.console import print_log
from mdistiller.dataset.sampler import DistributedBatchSampler
from mdistiller.distillers.helpers.features.shapes import preserve_state
from mdistiller.registry import UserError, first_line
from mdistiller.runtime import autocast


def keep_none_alone(loader: Any, trainer: Any, distiller: nn.Module, cfg: Any) -> bool:
    """Merge a last batch of one image into the batch before it, if it cannot be trained on alone.

    All processes decide the same. Without a batch of one image nothing is tried.

    Args:
        loader: of training batches; its `batch_sampler` gives the images of each step.
        trainer: its `batch_inputs` makes the distiller's arguments.
        distiller: of this process; unchanged.

    Returns:
        Whether the number of batches has changed, so that the trainer must be built again.

    Raises:
        UserError: the batch cannot be merged into another one.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if (
        not isinstance(sampler, DistributedBatchSampler)
        or sampler.smallest > 1
        or len(sampler) == 0
    ):
        return False
    reason = _failure(loader, trainer, distiller, cfg)
    if reason is None:
        return False
    if sampler.batch_size == 1:
        raise one_is_too_few(reason)
    if not getattr(loader, "merges_last_batch", False):
        raise UserError(
            f"the last batch of an epoch has one image (of a process): {reason}; set "
            "DATASET.DROP_LAST to True, or choose another SOLVER.BATCH_SIZE"
        )
    loader.merge_last_batch()
    text = f"the epoch's last image would be alone in its batch ({reason}): it joins the one"
    print_log(f"{text} before")
    return True


def _failure(loader: Any, trainer: Any, distiller: nn.Module, cfg: Any) -> str | None:
    """Why a step with one image fails, in a line; None if it works, or two images fail as well."""
    loader.set_epoch(1)
    batches = iter(loader)
    item = next(batches)
    getattr(batches, "close", lambda: None)()
    loader.set_epoch(loader.epoch)
    if len(item) > 3 and item[1].ndim == 4:  # two views that a trainer takes as two items
        item = (list(item[:2]), *item[2:])
    batch = trainer.batch_inputs(item, 1)
    one = _first(batch, 1)
    two = _twice(one) if len(batch["target"]) == 1 else _first(batch, 2)
    amp = cfg.SOLVER.AMP
    if try_step(distiller, two, amp) is None:
        return _only_alone(distiller, one, two, amp)
    alone = _StudentStep(distiller.student)  # the trainer hands the method something else
    return _only_alone(alone, one, two, amp)


class _StudentStep(nn.Module):
    """A step of the student alone, for methods whose step cannot be tried."""

    def __init__(self, student: Any):
        super().__init__()
        self.student = student

    def forward(self, image: Any, **batch: Any) -> tuple[None, dict[str, Tensor]]:
        weak = image if isinstance(image, Tensor) else image[0]
        return None, {"logits": self.student(weak)[0]}


def _only_alone(distiller: nn.Module, one: Any, two: Any, amp: str) -> str | None:
    """Why a step with one image fails where one with two images works; None otherwise.

    The method's initialisation stages are tried as well.
    """
    stages: Any = getattr(distiller, "init_stages", dict)
    for stage in ("", *stages()):
        reason = try_step(distiller, one, amp, stage)
        if reason is not None and try_step(distiller, two, amp, stage) is None:
            return reason
    return None


def refuse_lone_picture(stream: Any, trainer: Any, distiller: nn.Module, cfg: Any) -> None:
    """Refuse SOLVER.BATCH_SIZE 1 if a step with one image fails (detection).

    Args:
        stream: of training batches; its position is restored.
    """
    if cfg.SOLVER.BATCH_SIZE != 1:
        return
    place = stream.state_dict()
    batches = iter(stream)
    one = trainer.batch_inputs(next(batches), 1)
    batches.close()
    stream.load_state_dict(place)
    reason = _only_alone(distiller, one, _twice(one), cfg.SOLVER.AMP)
    if reason is not None:
        raise one_is_too_few(reason)


def one_is_too_few(reason: str) -> UserError:
    """The error for batches of one image that cannot be trained on."""
    return UserError(f"SOLVER.BATCH_SIZE 1: {reason}; set it to 2 or more")


def try_step(
    distiller: nn.Module, inputs: Mapping[str, Any], amp: str = "none", stage: str = ""
) -> str | None:
    """Try a training step on a copy of a distiller; the reason of its failure in a line, or None.

    Args:
        stage: name of the initialisation stage that the step is of; "" for the main one.
    """
    with preserve_state(distiller):
        try:
            trial = copy.deepcopy(distiller)
        except (RuntimeError, TypeError):  # holds what cannot be copied: the first step will tell
            return None
        if stage:
            trial.init_stage = stage  # type: ignore[assignment]
        trial.train()
        device = next(distiller.parameters()).device
        try:
            with autocast(device, amp):
                _, losses = trial(**inputs)
        except Exception as error:  # whatever a user's method raises
            return first_line(error)
        finite = all(bool(torch.isfinite(loss).all()) for loss in losses.values())
        return None if finite else "its losses are not finite"


def _first(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A batch's first samples."""

    def first(value: Tensor) -> Tensor:
        return _each_view(value, lambda view: view[:count])

    return tree_map_only(Tensor, first, batch)  # type: ignore[no-any-return]


def _each_view(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Changed images, with those for the teacher (DISTILLER.TEACHER_AUGMENT) changed likewise."""
    changed = change(images)
    if (weak := getattr(images, "teacher_view", None)) is not None:
        changed.teacher_view = change(weak)  # type: ignore[attr-defined]
    return changed


def _twice(value: Any) -> Any:
    """A batch of one sample as a batch of two."""
    if isinstance(value, Tensor):
        return _each_view(value, lambda view: torch.cat([view, view]))
    if isinstance(value, Mapping):
        return {key: _twice(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(value[0], Tensor) and value[0].ndim == 4:
        return [_twice(part) for part in value]  # two views; pictures have three dimensions
    return [*value, *value] if isinstance(value, (list, tuple)) else value
