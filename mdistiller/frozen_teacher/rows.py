"""The teacher's outputs that the cache stores, as one row of numbers for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdistiller.distillers import Distiller, Output, TeacherTeam


class OutputRows:
    """Packs what a method reads of its teacher into float32 rows [N, D], and unpacks it.

    Args:
        distiller: the method, whose `cacheable_outputs` are stored: of several teachers, the
            logits of all and then the summary vectors of each.
    """

    def __init__(self, distiller: Distiller):
        self.names = distiller.cacheable_outputs()
        teacher = distiller.teacher
        self.team = teacher if isinstance(teacher, TeacherTeam) else None
        self._shapes: list[torch.Size] = []

    def pack(self, output: Output) -> Tensor:
        """The rows of what the teacher gave for a batch."""
        parts = [output.logits if "logits" in self.names else output.logits[:, :0]]
        if "pooled_feat" in self.names:
            outputs = self.team.split(output) if self.team else [output]
            parts += [each["pooled_feat"] for each in outputs]
        self._shapes = [part.shape[1:] for part in parts]
        return torch.cat([part.flatten(1).float() for part in parts], dim=1)

    def unpack(self, rows: Tensor) -> dict[str, Any]:
        """Items of the batch that take the place of the teacher's forward pass."""
        columns = rows.split([shape.numel() for shape in self._shapes], dim=1)
        logits, *summaries = (
            part.reshape(len(part), *shape).contiguous()
            for part, shape in zip(columns, self._shapes, strict=True)
        )
        if not summaries:
            return {"teacher_logits": logits}
        features: list[dict[str, Any]] = [{"pooled_feat": summary} for summary in summaries]
        if self.team is None:
            return {"teacher_logits": logits, "teacher_features": features[0]}
        named = {str(k): value for k, value in enumerate(features)}
        return {"teacher_logits": logits, "teacher_features": named}
