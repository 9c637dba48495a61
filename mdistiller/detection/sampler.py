"""Sampling of training images: order, size and flip.

All randomness derives from (seed, position in the endless stream of images) and is drawn in the
main process, so the number of workers or processes does not change it. A checkpoint holds only the
position and the images that wait for others of their orientation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mdistiller.detection.coco.dataset import View


class AspectRatioSampler:
    """An endless stream of global batches, each of images of one orientation.

    Each pass over the set has a new order; images of an incomplete batch wait, so every image is
    used. The stream is the same in all processes.

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


class BatchRequests:
    """Endless batch requests for the worker processes, and the state after each batch.

    It holds no reference to the workers, which hold one to it: without a reference cycle they end
    as soon as their loader is dropped.
    """

    def __init__(
        self,
        sampler: AspectRatioSampler,
        part: slice,
        min_sizes: Sequence[int],
        max_size: int,
        flip: float,
    ):
        self.sampler, self.part = sampler, part
        self.min_sizes, self.max_size, self.flip = tuple(min_sizes), max_size, flip
        self.state = sampler.state_dict()  # after the batches that were yielded
        self._coming: deque[dict[str, Any]] = deque()  # states after the batches being read

    def view(self, position: int, image: int) -> View:
        """Size and flip of the image at a position of the stream."""
        entropy = np.random.SeedSequence([self.sampler.seed, 1, position])
        size, flip = (int(value) for value in entropy.generate_state(2, np.uint64))
        min_size = self.min_sizes[size % len(self.min_sizes)]
        return View(image, min_size, self.max_size, flip < self.flip * 2**64)

    def __iter__(self) -> Iterator[list[View]]:
        self.sampler.load_state_dict(self.state)
        self._coming.clear()
        while True:
            drawn = self.sampler.next()[self.part]
            self._coming.append(self.sampler.state_dict())
            yield [self.view(*pair) for pair in drawn]

    def mark_yielded(self) -> None:
        """Note that the next batch was yielded."""
        self.state = self._coming.popleft()
