"""What a network returned for a batch, and the loss terms of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mdistiller.distillers.helpers.features.shapes import missing_feature
from mdistiller.distillers.helpers.losses.numerics import full_precision

Losses = dict[str, Tensor]
"""Terms of the objective by name, scalars; the trainer sums them."""


@dataclass
class Output:
    """A network's output: logits [N, C] in full precision, and its features by name.

    `output["feats"]` is a feature in full precision; `output.features` holds them unconverted.
    """

    logits: Tensor
    features: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.features:
            raise missing_feature(name, self.features)
        return full_precision(self.features[name])
