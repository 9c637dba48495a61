"""A detector and its teacher, trained as one module.

    losses = the detector's own + sum over the methods of WEIGHT * loss

Images go through both networks in the same size. The student proposes and samples regions, as it
does without a teacher; of the teacher only the backbone runs, and the box head on the student's
regions for methods that compare logits (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdistiller.detection.methods import METHODS, Method, Views, check_same_classes, method_names
from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.roi import RoISamples
from mdistiller.distillers import Distiller, Losses
from mdistiller.distillers.helpers.numerics import full_precision
from mdistiller.registry import UserError


class DetectionDistiller(Distiller):
    """A detector that is trained, alone or under a teacher.

    The teacher is no part of this module: it is in no state dict, is not wrapped for several
    processes, and `train()` does not reach it.

    Args:
        student: the detector to train.
        teacher: None to train it alone.
        cfg: of the run; read are DISTILLER.TYPE, DETECTION and SOLVER.WEIGHT_DECAY_NORM.

    Attributes:
        methods: by name.
        guide: the teacher, in eval mode and without gradients, or None.

    Raises:
        UserError: a method cannot join the two.
    """

    student: Detector

    def __init__(self, student: Detector, teacher: Detector | None, cfg: Any):
        super().__init__(student, None)
        self._beside = (teacher,)
        self.norm_decay = float(cfg.SOLVER.WEIGHT_DECAY_NORM)
        names = method_names(cfg.DISTILLER.TYPE)
        if names and teacher is None:
            raise UserError(
                f"DISTILLER.TYPE {cfg.DISTILLER.TYPE} needs a teacher: set DETECTION.TEACHER"
            )
        self.methods = nn.ModuleDict()
        if teacher is None or not names:
            return
        if teacher is student:
            raise UserError("teacher and student are one and the same network")
        teacher.requires_grad_(False).eval()
        for name in names:
            cls = METHODS[name]
            if cls.needs_logits:
                check_same_classes(student, teacher, name)
            self.methods[name] = cls(cfg.DETECTION[name], student, teacher)

    @property
    def guide(self) -> Detector | None:
        return self._beside[0]

    def forward_train(  # type: ignore[override]  # images are of different sizes: lists
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[None, Losses]:
        """None, and the terms of the objective.

        Args:
            images: each [3, H, W] in [0, 1], RGB, resized already.
            targets: as :class:`Detector` takes them.
        """
        student = self.student
        batch, _ = student.prepare(images)
        features = student.backbone(batch.tensors)
        losses = student.losses(batch, features, targets)
        samples = student.roi_heads.samples
        assert samples is not None
        self.metrics = {}
        if self.methods:
            views = self.teach(images, batch.tensors.shape, features, samples)
            for method in self.parts:
                losses[method.loss] = method(views)
                self.metrics |= method.metrics
        return None, losses

    @property
    def parts(self) -> list[Method]:
        """The methods."""
        return cast(list[Method], list(self.methods.values()))

    def teach(
        self,
        images: list[Tensor],
        shape: Sequence[int],
        features: dict[str, Tensor],
        samples: RoISamples,
    ) -> Views:
        """Both networks' view of a batch that the student has just seen.

        Args:
            shape: of the student's prepared batch.
            features: of the student.
        """
        teacher = self.guide
        assert teacher is not None
        with torch.no_grad():
            batch, _ = teacher.prepare(images)
            if batch.tensors.shape != tuple(shape):
                raise UserError(
                    f"the student sees the images as {tuple(shape)}, the teacher as "
                    f"{tuple(batch.tensors.shape)}: both have to pad them alike"
                )
            maps, logits = teacher.backbone(batch.tensors), None
            if any(method.needs_logits for method in self.parts):
                logits = teacher.roi_logits(maps, samples.proposals, batch.image_sizes)
        maps = {name: full_precision(level) for name, level in maps.items()}
        return Views(features, maps, samples, logits)

    def forward_test(self, image: Any) -> Any:
        """Detections of images that come as in training, in their pixels."""
        return self.student(image)

    def param_groups(self) -> list[dict[str, Any]]:
        """Norms apart, with SOLVER.WEIGHT_DECAY_NORM; what is frozen is left out."""
        norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        inside = {
            id(p)
            for m in self.modules()
            if isinstance(m, norms)
            for p in m.parameters(recurse=False)
        }
        trained = [p for p in self.get_learnable_parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if id(p) not in inside]}]
        of_norms = [p for p in trained if id(p) in inside]
        return (
            [*groups, {"params": of_norms, "weight_decay": self.norm_decay}] if of_norms else groups
        )
