"""Batches of a detection set: endless and shuffled for training, in order for validation.

All that is random follows from (seed, position in the endless stream of images) and is drawn in the
main process, so neither the number of workers nor that of processes changes it, and a position is
all that has to be saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller import runtime
from mdistiller.dataset._plan import share
from mdistiller.dataset._workers import Workers
from mdistiller.detection.dataset import CocoDetectionSet, View
from mdistiller.registry import UserError

Batch = tuple[list[Tensor], list[dict[str, Any]]]
"""Images, float32 [3, H, W] in 0..1, RGB, of different sizes; and the target of each (`item`)."""


class Draws:
    """The endless stream of images, cut into global batches of one orientation.

    Images come in a new order in every round over the set; those of a batch that is not full yet
    wait, so none is ever left out. Pure arithmetic, the same in all processes.

    Args:
        portrait: of each image, bool [N]; all False: one group.
        batch_size: images of a batch, of all processes.
        seed: of the orders.
    """

    def __init__(self, portrait: np.ndarray, batch_size: int, seed: int):
        self.portrait, self.batch_size, self.seed = portrait, batch_size, seed % 2**64
        self.position = 0  # images taken from the stream
        self.waiting: list[list[tuple[int, int]]] = [[], []]  # (position, image), by orientation
        self._round = -1
        self._order: list[int] = []

    def image(self, position: int) -> int:
        """The image at a position of the stream."""
        number, place = divmod(position, len(self.portrait))
        if number != self._round:
            seed = np.random.SeedSequence([self.seed, 0, number]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed))
            self._order = torch.randperm(len(self.portrait), generator=generator).tolist()
            self._round = number
        return self._order[place]

    def next(self) -> list[tuple[int, int]]:
        """(position, image) of the next global batch."""
        while True:
            image = self.image(self.position)
            group = self.waiting[int(self.portrait[image])]
            group.append((self.position, image))
            self.position += 1
            if len(group) == self.batch_size:
                self.waiting[int(self.portrait[image])] = []
                return group

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        waiting = [[list(pair) for pair in group] for group in self.waiting]
        return {"position": self.position, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.position = state["position"]
        self.waiting = [[(a, b) for a, b in group] for group in state["waiting"]]


@dataclass
class _Made:
    """A batch on its way from a worker; what `Workers` hands to the device."""

    images: list[Tensor]  # uint8
    targets: list[dict[str, Any]]

    def _each(self, move: Any) -> _Made:
        targets = [
            {key: move(value) if isinstance(value, Tensor) else value for key, value in t.items()}
            for t in self.targets
        ]
        return _Made([move(image) for image in self.images], targets)

    def pin_memory(self) -> _Made:
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> _Made:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def batch(self) -> Batch:
        return [image.float().div_(255) for image in self.images], self.targets


@dataclass
class _Maker:
    """Makes batches of views; runs in the workers."""

    dataset: CocoDetectionSet

    def __getitem__(self, task: Sequence[View]) -> _Made | str:
        try:
            items = [self.dataset.item(view) for view in task]
        except UserError as error:  # whose one line would get lost
            return str(error)
        return _Made([image for image, _ in items], [target for _, target in items])


class Tasks:
    """What workers are asked for in training, without end; and the state after each batch.

    It knows nothing of the workers, which keep hold of it: only without a cycle of references are
    they ended at once where their batches are no longer wanted.
    """

    def __init__(
        self, draws: Draws, part: slice, min_sizes: Sequence[int], max_size: int, flip: float
    ):
        self.draws, self.part = draws, part
        self.min_sizes, self.max_size, self.flip = tuple(min_sizes), max_size, flip
        self.state = draws.state_dict()  # of the batches that were given out
        self._coming: deque[dict[str, Any]] = deque()  # states after those being made

    def view(self, position: int, image: int) -> View:
        """How the image at a position of the stream is seen."""
        entropy = np.random.SeedSequence([self.draws.seed, 1, position])
        size, flip = (int(value) for value in entropy.generate_state(2, np.uint64))
        min_size = self.min_sizes[size % len(self.min_sizes)]
        return View(image, min_size, self.max_size, flip < self.flip * 2**64)

    def __iter__(self) -> Iterator[list[View]]:
        self.draws.load_state_dict(self.state)
        self._coming.clear()
        while True:
            drawn = self.draws.next()[self.part]
            self._coming.append(self.draws.state_dict())
            yield [self.view(*pair) for pair in drawn]

    def given(self) -> None:
        """Note that the next batch was given out."""
        self.state = self._coming.popleft()


class TrainBatches:
    """Endless training batches of this process; iterating continues where it stopped.

    Global batches are made of `batch_size * world_size` images of one orientation and split in
    order, so the number of processes changes nothing else. The view of an image follows from the
    seed and its position in the stream.

    Args:
        dataset: the images.
        batch_size: of each process.
        min_sizes, max_size, flip, grouping: see `data.DATA`.
        seed: of order and views; the same in all processes.
        device: where batches go.
        num_workers: processes that read images; 0: none.
        timeout: seconds to wait for one; 0: for ever.
        rank, world_size: as torch.distributed says by default.
    """

    def __init__(
        self,
        dataset: CocoDetectionSet,
        batch_size: int,
        *,
        min_sizes: Sequence[int] = (800,),
        max_size: int = 1333,
        flip: float = 0.5,
        grouping: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        timeout: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"SOLVER.BATCH_SIZE {batch_size} must be at least 1")
        self.dataset, self.batch_size = dataset, batch_size
        rank = runtime.rank() if rank is None else rank
        world_size = runtime.world_size() if world_size is None else world_size
        portrait = dataset.portrait if grouping else np.zeros(len(dataset), bool)
        draws = Draws(portrait, batch_size * world_size, seed)
        part = slice(rank * batch_size, (rank + 1) * batch_size)
        self.tasks = Tasks(draws, part, min_sizes, max_size, flip)
        self._workers = Workers(_Maker(dataset), num_workers, torch.device(device), timeout)

    def __iter__(self) -> Iterator[Batch]:
        for made in self._workers.batches(self.tasks):
            self.tasks.given()
            yield made.batch()

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what follows is the same after loading them, also into other processes."""
        return {**self.tasks.state, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        """What a position means nothing without."""
        draws = self.tasks.draws
        return {
            "images": len(self.dataset),
            "batch_size": draws.batch_size,
            "seed": draws.seed,
            "grouped": bool(draws.portrait.any()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch where `state` was taken, from the next `iter()` on.

        Raises:
            UserError: it is of other data, another global batch size or another seed.
        """
        for name, value in self._facts().items():
            if state.get(name) != value:
                raise UserError(
                    f"the run's data were at {name} {state.get(name)!r}, now it is {value!r}: "
                    "resuming would give other batches; start a new run"
                )
        self.tasks.state = {"position": state["position"], "waiting": state["waiting"]}


class ValBatches:
    """Every image of this process's share once, in order, in batches; none is padded or repeated.

    Args: as for :class:`TrainBatches`; `min_size` of every image.
    """

    def __init__(
        self,
        dataset: CocoDetectionSet,
        batch_size: int = 1,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        timeout: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.min_size, self.max_size = min_size, max_size
        rank = runtime.rank() if rank is None else rank
        world_size = runtime.world_size() if world_size is None else world_size
        self.start, self.stop = share(len(dataset), rank, world_size)
        self._workers = Workers(_Maker(dataset), num_workers, torch.device(device), timeout)

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def _tasks(self) -> list[list[View]]:
        sizes = (self.min_size, self.max_size)
        views = [View(i, *sizes, masks=False) for i in range(self.start, self.stop)]
        return [views[k : k + self.batch_size] for k in range(0, len(views), self.batch_size)]

    def __iter__(self) -> Iterator[Batch]:
        for made in self._workers.batches(self._tasks()):
            yield made.batch()
