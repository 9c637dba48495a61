"""The distiller of detection: a student detector, its teacher, and the methods' losses.

    losses = the detector's own + the term of each method of DISTILLER.TYPE

Images go through both networks in the same size. The student proposes and samples regions, as it
does without a teacher; the teacher runs its backbone and, for methods that compare logits, its box
head on the student's regions (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdistiller.detection.methods import (
    DETECTOR_SETTINGS,
    DetectorView,
    build_method,
    check_same_classes,
    method_names,
    needs_same_classes,
    try_method,
)
from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.roi import RoISamples
from mdistiller.distillers import Distiller, Losses, Output
from mdistiller.registry import UserError


class DetectionDistiller(Distiller):
    """A student detector, trained alone or with a teacher.

    The teacher is not a child module: state dicts, DistributedDataParallel and `.to()` skip it.

    Args:
        student: the detector to train.
        teacher: None to train it alone.
        cfg: of the run; read are DISTILLER.TYPE, DETECTION, SOLVER and the methods' sections.

    Attributes:
        teacher: in eval mode and without gradients; None without methods.
        methods: by name.

    Raises:
        UserError: a method cannot distil this pair.
    """

    student: Detector

    def __init__(self, student: Detector, teacher: Detector | None, cfg: Any):
        super().__init__(student, None)
        self.norm_decay = float(cfg.SOLVER.WEIGHT_DECAY_NORM)
        self.images = int(cfg.SOLVER.BATCH_SIZE)
        self.methods = nn.ModuleDict()
        self.compares_logits = False
        names = method_names(cfg.DISTILLER.TYPE)
        if names and teacher is None:
            raise UserError(
                f"DISTILLER.TYPE {cfg.DISTILLER.TYPE} needs a teacher: set DETECTION.TEACHER"
            )
        if teacher is None or not names:
            return
        if teacher is student:
            raise UserError("teacher and student are one and the same network")
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())
        for name in names:
            if needs_same_classes(name):
                check_same_classes(student, teacher, name)
                self.compares_logits = True
            self.methods[name] = build_method(name, student, teacher, cfg)
        if cfg.LSKD.ENABLE and not any(part.takes_standardized_logits for part in self.parts):
            raise UserError(
                f"LSKD.ENABLE: {cfg.DISTILLER.TYPE} has no use for standardised logits; set it to "
                "False"
            )
        self.own_state = tuple(
            f"methods.{name}.{prefix}"
            for name, part in self.named_methods()
            for prefix in part.own_state
        )

    @property
    def parts(self) -> list[Distiller]:
        """The methods."""
        return cast(list[Distiller], list(self.methods.values()))

    def named_methods(self) -> list[tuple[str, Distiller]]:
        """The methods with their names."""
        return list(zip(self.methods, self.parts, strict=True))

    def try_methods(self) -> None:
        """Try each method on random outputs, so that unsuitable ones fail before the first step."""
        for name, part in self.named_methods():
            try_method(name, part, self.images)

    def forward_train(  # type: ignore[override]  # images are of different sizes: lists
        self, images: list[Tensor], targets: list[dict[str, Tensor]], epoch: int = 1
    ) -> tuple[None, Losses]:
        """Returns None and the losses by name.

        Args:
            images: each [3, H, W] in [0, 1], RGB, resized already.
            targets: as :class:`Detector` takes them.
            epoch: from 1, for methods that warm up.
        """
        student = self.student
        batch, _ = student.prepare(images)
        features = student.backbone(batch.tensors)
        losses = student.losses(batch, features, targets)
        samples = student.roi_heads.samples
        assert samples is not None
        self.metrics = {}
        if self.methods:
            maps, logits = self.teacher_outputs(images, batch.tensors.shape, samples)
            with torch.autocast(samples.logits.device.type, enabled=False):
                losses |= self.distill_regions(
                    (samples.logits, features), (logits, maps), samples.labels, epoch
                )
        return None, losses

    def distill_regions(
        self,
        student: tuple[Tensor, Mapping[str, Tensor]],
        teacher: tuple[Tensor, Mapping[str, Tensor]],
        labels: Tensor,
        epoch: int,
    ) -> Losses:
        """The term of each method, by name; the methods' metrics are gathered.

        Args:
            student, teacher: logits [R, classes] of the regions, and the pyramid's maps by name.
            labels: [R], 0 the background.
        """
        losses = {}
        for name, part in self.named_methods():
            student_output, teacher_output = (
                part.standardized(Output(logits.float(), cast(DetectorView, net).features(maps)))
                for net, (logits, maps) in ((part.student, student), (part.teacher, teacher))
            )
            loss = part.distill(student_output, teacher_output, labels, epoch=epoch)
            settings = DETECTOR_SETTINGS.get(name)
            losses[settings.loss if settings else f"loss_{name.lower()}"] = loss.mean()
            self.metrics |= part.metrics
        return losses

    @torch.no_grad()
    def teacher_outputs(
        self, images: list[Tensor], shape: Sequence[int], samples: RoISamples
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The teacher's maps, and its logits [R, classes] of the student's regions.

        Where no method compares logits they are all 0 and the box head does not run.

        Args:
            shape: of the student's prepared batch.
        """
        teacher = cast(Detector, self.teacher)
        batch, _ = teacher.prepare(images)
        if batch.tensors.shape != tuple(shape):
            raise UserError(
                f"the student sees the images as {tuple(shape)}, the teacher as "
                f"{tuple(batch.tensors.shape)}: both have to pad them alike"
            )
        maps = teacher.backbone(batch.tensors)
        if not self.compares_logits:
            return maps, torch.zeros_like(samples.logits)
        return maps, teacher.roi_logits(maps, samples.proposals, batch.image_sizes)

    def forward_test(self, image: Any) -> Any:
        """Detections of images that come as in training, in their pixels."""
        return self.student(image)

    def param_groups(self) -> list[dict[str, Any]]:
        """Norms apart, with SOLVER.WEIGHT_DECAY_NORM; then what a method gives settings of its own.

        Frozen parameters are left out.
        """
        kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        layers = [module for module in self.modules() if isinstance(module, kinds)]
        norms = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        extra = [group for part in self.parts for group in part.extra_groups()]
        special = [group for group in extra if group.keys() != {"params"}]
        apart = norms | {id(p) for group in special for p in group["params"]}
        trained = [p for p in self.get_learnable_parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if id(p) not in apart]}]
        of_norms = [p for p in trained if id(p) in norms]
        if of_norms:
            groups.append({"params": of_norms, "weight_decay": self.norm_decay})  # type: ignore[dict-item]
        return [*groups, *special]
