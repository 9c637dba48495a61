"""Which images training takes, in which order and view.

All that is random follows from (seed, position in the endless stream of images) and is drawn in the
main process, so neither the number of workers nor that of processes changes it, and a position is
all that has to be saved, beside the images that wait for others of their orientation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mdistiller.detection.coco.dataset import View


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
