"""What runs in lock-step share: batches, the frozen teacher's outputs, and their cache.

A run that trains alone shares nothing: the functions here then do nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mdistiller.distillers import Distiller
from mdistiller.engine.callbacks.teacher_cache import TeacherCache
from mdistiller.engine.cfg import Config
from mdistiller.engine.stages import STRIDE
from mdistiller.frozen_teacher.cacheable import is_wanted
from mdistiller.frozen_teacher.fingerprint import computation, teacher_digest
from mdistiller.frozen_teacher.frozen import is_frozen, named_tensors
from mdistiller.networks.teacher_images import teacher_image_size
from mdistiller.run.together import Turn, current_turn

T = TypeVar("T")


class SharedLoader:
    """One run's view of a loader that several runs share; everything else is the loader's.

    Args:
        loader: a training loader whose epochs can be begun anywhere (`set_epoch(epoch, start)`).
        turn: of the run.
        memo: the latest batch, the same dict for all views.
    """

    def __init__(self, loader: Any, turn: Turn, memo: dict[str, Any]):
        self._loader, self._turn, self._memo = loader, turn, memo
        self._epoch, self._start, self._begun = 0, 0, True

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """To `isinstance`, it is of the loader's class."""
        return type(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._epoch and self._loader.epoch != self._epoch:
            self._memo.clear()
            self._loader.set_epoch(self._epoch)
        return getattr(self._loader, name)

    @property
    def epoch(self) -> int:
        """The epoch of this run."""
        return self._epoch

    def merge_last_batch(self) -> None:
        """As the loader's, for this run and those that merge it as well."""
        loader, key = copy.copy(self._loader), ("joined", id(self._loader))
        loader.merge_last_batch()
        self._loader, self._memo = self._turn.share(key, lambda: (loader, {}))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch, once no other run is in an earlier one."""
        self._turn.wait((*_stage_epoch(epoch), start))
        self._epoch, self._start, self._begun = epoch, start, False

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._begun = True
        for step in range(self._start, len(self)):
            self._turn.wait((*_stage_epoch(self._epoch), step))
            yield self._batch(step)

    def _batch(self, step: int) -> Any:
        """The batch of a step, made by the first run that comes to it."""
        memo, at = self._memo, (self._epoch, step)
        if memo.get("at") != at or _versions(memo["batch"]) != memo["versions"]:
            if memo.get("next") != at:
                self._loader.set_epoch(self._epoch, step)
                memo["batches"] = iter(self._loader)
            batch = _moved(next(memo["batches"]), self._turn.group.device)
            _mark(batch[0], (*at, len(batch[1])))
            memo.update(at=at, batch=batch, versions=_versions(batch), next=(self._epoch, step + 1))
        return memo["batch"]


def _stage_epoch(epoch: int) -> tuple[int, int]:
    return (0, epoch) if epoch > STRIDE else (1, epoch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(_moved(item, device) for item in batch)


def _mark(images: Any, at: tuple[int, ...]) -> None:
    """Note on a batch's images which they are: (epoch, step, size, view), and their version.

    The weak view of a pair is that of loaders of one view; a merged last batch has its own size.
    """
    for view, image in enumerate([images] if isinstance(images, Tensor) else images):
        image.batch_of_group = (*at, view), image._version
        if (weak := getattr(image, "teacher_view", None)) is not None:
            weak.batch_of_group = (*at, -1), weak._version


class SharedTeacher:
    """A frozen teacher that runs once per batch for all runs of a group.

    Args:
        teacher: the network, or what :attr:`Distiller.frozen` runs in its place; everything but the
            call is its.
        plain: whether it is the network itself.
    """

    def __init__(self, teacher: Any, plain: bool):
        self._teacher, self.plain = teacher, plain
        self._outputs: dict[tuple[int, ...], tuple[Any, list[int]]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "_teacher":  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self._teacher, name)

    def refresh(self) -> None:
        """Take over the teacher's weights before the next forward."""
        if not self.plain:
            self._teacher.refresh()

    def __call__(self, image: Tensor) -> Any:
        at, version = getattr(image, "batch_of_group", (None, 0))
        if at is None or image._version != version:  # made or changed by the method
            return self._teacher(image)
        output, versions = self._outputs.get(at, (None, None))
        if versions is None or _versions(output) != versions:  # a method has written into it
            self._outputs = {key: self._outputs[key] for key in self._outputs if key[:2] == at[:2]}
            output = self._teacher(image)
            self._outputs[at] = (output, _versions(output))
        return tree_map(lambda leaf: leaf, output)  # containers that the method may change


def _versions(value: Any) -> list[int]:
    """Version counters of the tensors in nested containers."""
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def shared_data(key: Hashable, make: Callable[[], Any]) -> Any:
    """The data of a run, shared with the runs of its group that have the same `key`."""
    turn = current_turn()
    if turn is None:
        return make()
    memo: dict[str, Any]
    data, memo = turn.share(("data", key), lambda: (make(), {}))
    return replace(data, train=SharedLoader(data.train, turn, memo))


def measured_once(distiller: Distiller, measure: Callable[[], T]) -> T:
    """The result of `measure` for the teacher, computed once for the runs that share it."""
    turn = current_turn()
    if turn is None or not isinstance(distiller.frozen, SharedTeacher):
        return measure()
    return turn.share(("accuracy", id(distiller.frozen)), measure)


def share_teacher(distiller: Distiller, cfg: Any, device: torch.device) -> None:
    """Have the runs of this thread's group share the teacher's outputs, where it is frozen."""
    turn, teacher = current_turn(), distiller.teacher
    if turn is None or teacher is None or distiller.watches_teacher or not is_frozen(distiller):
        return
    forward, plain = distiller.frozen or teacher, distiller.frozen is None
    key = ("teacher", teacher_digest(teacher), computation(distiller, cfg, device))
    shared, first = turn.share(key, lambda: (SharedTeacher(forward, plain), teacher))
    for (_, tensor), (_, stored) in zip(named_tensors(teacher), named_tensors(first), strict=True):
        tensor.data = stored.data  # its weights are in memory once
    for part in distiller.modules():
        if isinstance(part, Distiller) and part.teacher is teacher:
            part.frozen = shared
    if not is_wanted(cfg):
        turn.share(("runs for every batch", id(shared)), lambda: True)


def share_cache(trainer: Any) -> None:
    """Have the runs of this thread's group that read the same outputs share their cache."""
    turn, shared = current_turn(), trainer.model.frozen
    if turn is None or not isinstance(shared, SharedTeacher):
        return
    always = ("runs for every batch", id(shared))
    for place, hook in enumerate(trainer.hooks):
        if isinstance(hook, TeacherCache):
            settings = [trainer.cfg.DISTILLER[f"TEACHER_CACHE{end}"] for end in ("", "_GB", "_DIR")]
            key = ("cache", id(shared), hook.outputs.names, *settings)
            trainer.hooks[place] = cache = turn.share(key, lambda: hook)  # noqa: B023  # at once
            cache.teacher_runs = lambda: always in turn.group.shared


def data_key(cfg: Config) -> str:
    """All settings that determine a run's batches, as text; equal for runs that train together.

    But for the number of views: the weak ones of a pair are those of runs with one view.
    """
    facts = (cfg.DATASET, cfg.SOLVER.BATCH_SIZE, cfg.EXPERIMENT.SEED, cfg.DEVICE)
    return repr((*facts, cfg.SOLVER.DETERMINISTIC, cfg.IMPORTS, teacher_image_size(cfg)))
