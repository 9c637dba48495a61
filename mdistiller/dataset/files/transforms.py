"""Transforms of one image, applied by worker processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset.files.folder import check_size
from mdistiller.dataset.files.images import resize_to_size
from mdistiller.dataset.files.resized_crop import ResizedCropFlip
from mdistiller.dataset.files.scaled_jpeg import EncodedImage
from mdistiller.dataset.memory.augment import Identity
from mdistiller.preprocessing import Preprocessing

Picture = Tensor | EncodedImage
"""An image as a worker reads it: pixels, uint8 [3, H, W], or the bytes of its file."""

_FIRST = torch.zeros(1, dtype=torch.int64)


@dataclass
class EvalTransform:
    """Resizes an image of any size to that of the set: uint8, [3, height, width].

    Attributes:
        size: (height, width) in pixels.
        preprocessing: resize and crop; with `keep`, images of another size raise a UserError.
        first: the file that has this size, for that error.
    """

    size: tuple[int, int]
    preprocessing: Preprocessing
    first: str = ""

    def __call__(self, image: Picture, name: str) -> Tensor:
        if isinstance(image, EncodedImage):
            if self.preprocessing.resize != "keep":
                return image.resized(self.size, self.preprocessing)
            image = image.pixels()
        if self.preprocessing.resize == "keep":
            check_size(image, *self.size, name, self.first)
            return image
        return resize_to_size(image, self.size, self.preprocessing)


@dataclass
class TrainTransform:
    """Augments an image by its drawn parameters: uint8, [3, height, width].

    Attributes:
        augment: takes an image at the size of the set; ResizedCropFlip takes any size.
        resize: brings an image to the size of the set.
        randaugment: operations and magnitude of RandAugment after it; empty: none.
        both: return the view with and that without RandAugment, [2, 3, height, width].
    """

    augment: Identity
    resize: EvalTransform
    randaugment: Sequence[int] = ()
    both: bool = False

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Parameters of the augmentation and a seed for `num` images: int64, [num, P]."""
        drawn = self.augment.draw(num, generator)
        seeds = torch.randint(2**62, (num, 1), generator=generator)
        return torch.cat([drawn, seeds], dim=1)

    def __call__(self, image: Picture, name: str, parameters: Tensor) -> Tensor:
        with seeded(int(parameters[-1])):
            if isinstance(self.augment, ResizedCropFlip):
                view = self.augment.view(image, self.resize.preprocessing.interpolation)
            else:
                store = self.augment.store(self.resize(image, name)[None])
                view = self.augment.apply(store, parameters[None, :-1], _FIRST)[0]
            if not self.randaugment:
                return view
            strong: Tensor = self._randaugment(view)
            return torch.stack([strong, view]) if self.both else strong

    @property
    def num_views(self) -> int | None:
        """See :class:`Identity`."""
        return None if self.randaugment else self.augment.num_views

    def views(self, parameters: Tensor) -> Tensor:
        """See :meth:`Identity.views`."""
        return self.augment.views(parameters[:, :-1])

    @cached_property
    def _randaugment(self) -> Any:
        from torchvision.transforms import v2

        operations, magnitude = self.randaugment
        return v2.RandAugment(operations, magnitude)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, which torchvision uses, and restore its state afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
