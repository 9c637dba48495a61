"""A method on untrained networks and random images, to find out what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CIFAR = ("cifar", (32, 32), 100)
"""Model zoo, (height, width) of the images, number of classes."""


def untrained(
    method: str,
    teacher: str,
    student: str,
    num_data: int,
    settings: Sequence[Any] = (),
    data: tuple[str, tuple[int, int], int] = CIFAR,
) -> Any:
    """The distiller of a method over two networks.

    Args:
        num_data: number of training images it assumes.
        settings: config keys and values, in turn.
        data: what :data:`CIFAR` is for CIFAR.

    Raises:
        UserError: a network cannot be built for such images, or the method refuses the pair.
    """
    import torch

    from mdistiller.distillers import get_distiller
    from mdistiller.engine.cfg import default_config
    from mdistiller.models import get_model_entry
    from mdistiller.networks.make import make_network

    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(list(settings))
    # The student first, as in training.
    zoo, size, classes = data
    pupil, master = (
        make_network(get_model_entry(name, zoo), classes, size, {}, "")
        for name in (student, teacher)
    )
    targets = torch.arange(num_data) % classes
    return get_distiller(method).build(
        pupil, master, cfg, num_data, image_size=size, targets=targets
    )


def random_step(
    distiller: Any, batch: int, epoch: int = 1, size: tuple[int, int] = CIFAR[1]
) -> dict[str, Any]:
    """The loss terms of a training step on random images of different classes."""
    import torch

    torch.manual_seed(0)
    views = torch.randn(2, batch, 3, *size)
    rows = torch.arange(batch)
    losses: dict[str, Any]
    _, losses = distiller.train()(
        image=list(views) if distiller.two_views else views[0],
        target=rows,
        index=rows,
        epoch=epoch,
    )
    return losses
