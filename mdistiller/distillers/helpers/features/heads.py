"""A network's classifier, where it is one linear layer on the average of `final_map`."""

from __future__ import annotations

from torch import Tensor, nn

from mdistiller.registry import UserError

Head = nn.Linear | nn.Conv2d


def linear_head(net: nn.Module | None, role: str) -> Head:
    """The layer that makes logits from the average of `net`'s `final_map` over positions.

    Args:
        role: "student" or "teacher", for the error.

    Raises:
        UserError: the network has none, so its classifier means nothing at a single position.
    """
    if net is not None and getattr(net, "globally_pooled", False):
        layer = net.classifier()  # type: ignore[operator]
        if isinstance(layer, nn.Linear | nn.Conv2d):
            return layer
    raise UserError(
        f"this method needs networks whose logits are a linear layer on the average of their last "
        f"map, and the {role} ({type(net).__name__}) is not known to be one (globally_pooled, "
        f"classifier()); choose another {role}, or another method"
    )


def classify(head: Head, features: Tensor, bias: bool = True) -> Tensor:
    """Logits at every position, [N, C, ...].

    Args:
        head: of :func:`linear_head`.
        features: [N, D, ...].
        bias: False leaves out the head's bias.
    """
    logits = head.weight.flatten(1) @ features.flatten(2)
    if bias and head.bias is not None:
        logits = logits + head.bias[:, None]
    return logits.unflatten(2, features.shape[2:])
