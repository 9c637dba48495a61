"""A method on untrained networks and random images, to find out what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE_SIZE = (32, 32)


def untrained(
    method: str, teacher: str, student: str, num_data: int, settings: Sequence[Any] = ()
) -> Any:
    """The distiller of a method over networks of the CIFAR zoo, on 100 classes.

    Args:
        num_data: number of training images it is told of.
        settings: config keys and values, in turn.

    Raises:
        UserError: the method refuses the pair.
    """
    import torch

    from mdistiller.distillers import get_distiller
    from mdistiller.engine.cfg import default_config
    from mdistiller.models import get_model_entry

    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(list(settings))
    # The student first, as in training.
    pupil, master = (get_model_entry(n, "cifar")(num_classes=100) for n in (student, teacher))
    targets = torch.arange(num_data) % 100
    return get_distiller(method).build(
        pupil, master, cfg, num_data, image_size=IMAGE_SIZE, targets=targets
    )


def random_step(distiller: Any, batch: int, epoch: int = 1) -> dict[str, Any]:
    """The loss terms of a training step on random images of different classes."""
    import torch

    torch.manual_seed(0)
    views = torch.randn(2, batch, 3, *IMAGE_SIZE)
    rows = torch.arange(batch)
    losses: dict[str, Any]
    _, losses = distiller.train()(
        image=list(views) if distiller.two_views else views[0],
        target=rows,
        index=rows,
        epoch=epoch,
    )
    return losses
