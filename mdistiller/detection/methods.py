"""What a student's training step learns from a teacher: methods for DISTILLER.TYPE.

Each is registered with its defaults, the section DETECTION.<METHOD>; the losses are those of
`distillers/`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.roi import RoISamples
from mdistiller.distillers import Losses, part_names
from mdistiller.distillers.helpers.logit_losses import dkd_terms, kd_loss
from mdistiller.distillers.helpers.map_losses import ABF, fitnet_loss, hcl_loss, review
from mdistiller.distillers.helpers.settings import require_positive
from mdistiller.registry import Registry, UserError

METHODS = Registry("detection method (DISTILLER.TYPE)")
LEVELS = {"P2": "0", "P3": "1", "P4": "2", "P5": "3", "P6": "pool"}
"""Names of the pyramid's maps, and what torchvision calls them."""


class Views(NamedTuple):
    """What both networks make of a batch; the teacher's without gradient.

    Attributes:
        student, teacher: maps [N, C, H, W] by torchvision's names.
        samples: the student's regions with their logits and classes.
        teacher_logits: [R, classes] of those regions; None if no method asks for them.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    samples: RoISamples
    teacher_logits: Tensor | None


class Method(nn.Module):
    """One method's loss; what it trains itself are its parameters.

    Class attributes:
        loss: name of its term.
        needs_logits: whether it compares class logits; the classes are then the same in both.
    """

    loss: ClassVar[str] = ""
    needs_logits: ClassVar[bool] = False

    def __init__(self, node: Any, student: Detector, teacher: Detector):
        super().__init__()
        self.weight: float = node.WEIGHT
        self.metrics: Losses = {}

    def forward(self, views: Views) -> Tensor:
        """The weighted loss, a scalar in full precision."""
        raise NotImplementedError


class _OfLogits(Method):
    """Compares the class logits of the student's regions; the background is a class like any."""

    needs_logits = True

    def forward(self, views: Views) -> Tensor:
        assert views.teacher_logits is not None
        with torch.autocast(views.samples.logits.device.type, enabled=False):
            samples = views.samples
            return self.weight * self.compare(samples.logits, views.teacher_logits, samples.labels)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The mean over all regions; logits [R, classes], labels [R]."""
        raise NotImplementedError


@METHODS.register("KD", config={"WEIGHT": 1.0, "T": 1.0})
class KD(_OfLogits):
    """Hinton's softened class probabilities (`distillers/KD.py`)."""

    loss = "loss_kd"

    def __init__(self, node: Any, student: Detector, teacher: Detector):
        super().__init__(node, student, teacher)
        self.temperature = require_positive("DETECTION.KD.T", node.T)

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd_loss(student, teacher, self.temperature)


@METHODS.register("DKD", config={"WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 0.25, "T": 1.0})
class DKD(_OfLogits):
    """ALPHA * TCKD + BETA * NCKD (`distillers/DKD.py`), the sampled class being the target."""

    loss = "loss_dkd"

    def __init__(self, node: Any, student: Detector, teacher: Detector):
        super().__init__(node, student, teacher)
        self.temperature = require_positive("DETECTION.DKD.T", node.T)
        self.alpha, self.beta = node.ALPHA, node.BETA

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        tckd, nckd = dkd_terms(student, teacher, labels, self.temperature)
        self.metrics = {"tckd": tckd.detach(), "nckd": nckd.detach()}
        return self.alpha * tckd + self.beta * nckd


class _OfLevels(Method):
    """Compares maps of the pyramids, those of DETECTION.<METHOD>.LEVELS."""

    def __init__(self, key: str, node: Any, student: Detector, teacher: Detector):
        super().__init__(node, student, teacher)
        unknown = [name for name in node.LEVELS if name not in LEVELS]
        if unknown or not node.LEVELS or len(set(node.LEVELS)) < len(node.LEVELS):
            raise UserError(
                f"DETECTION.{key}.LEVELS {list(node.LEVELS)} must name some of "
                f"{', '.join(LEVELS)}, each once"
            )
        for net in (student, teacher):
            if [*net.backbone.body.return_layers.values(), "pool"] != list(LEVELS.values()):
                raise UserError(
                    f"DISTILLER.TYPE {key} compares pyramids from P2 to P6, which "
                    f"{net.facts['arch']} does not have; choose another network"
                )
        self.names = [LEVELS[name] for name in LEVELS if name in node.LEVELS]  # shallow to deep
        self.widths = (int(student.backbone.out_channels), int(teacher.backbone.out_channels))

    def maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The chosen ones, shallow to deep."""
        return [features[name] for name in self.names]


@METHODS.register("REVIEWKD", config={"WEIGHT": 1.0, "LEVELS": list(LEVELS), "MID_CHANNELS": 256})
class ReviewKD(_OfLevels):
    """Knowledge review (`distillers/ReviewKD.py`): the sum over the levels of HCL.

    An ABF for each level, deep to shallow. Padding is compared as well.
    """

    loss = "loss_review"

    def __init__(self, node: Any, student: Detector, teacher: Detector):
        super().__init__("REVIEWKD", node, student, teacher)
        (own, other), mid = (
            self.widths,
            require_positive("DETECTION.REVIEWKD.MID_CHANNELS", node.MID_CHANNELS),
        )
        count = len(self.names)
        blocks = (ABF(own, int(mid), other, fuse=level > 0) for level in range(count))
        self.abfs = nn.ModuleList(blocks)

    def forward(self, views: Views) -> Tensor:
        own, other = self.maps(views.student), self.maps(views.teacher)
        outputs = review(self.abfs, own[::-1], [level.shape[2:] for level in other[::-1]])
        with torch.autocast(own[0].device.type, enabled=False):
            return self.weight * hcl_loss(outputs, other)


@METHODS.register("FITNET", config={"WEIGHT": 1.0, "LEVELS": list(LEVELS)})
class FitNet(_OfLevels):
    """Imitation of the pyramid: the sum over the levels of the mean squared difference.

    A 1x1 convolution for each level maps the student's channels to the teacher's.
    """

    loss = "loss_fitnet"

    def __init__(self, node: Any, student: Detector, teacher: Detector):
        super().__init__("FITNET", node, student, teacher)
        self.adapters = nn.ModuleList(nn.Conv2d(*self.widths, 1) for _ in self.names)

    def forward(self, views: Views) -> Tensor:
        own = [
            adapt(level)
            for adapt, level in zip(self.adapters, self.maps(views.student), strict=True)
        ]
        with torch.autocast(own[0].device.type, enabled=False):
            pairs = zip(own, self.maps(views.teacher), strict=True)
            return self.weight * torch.stack([fitnet_loss(s, t) for s, t in pairs]).sum()


def method_names(kind: str) -> list[str]:
    """Names of the methods of a DISTILLER.TYPE; none for NONE.

    Raises:
        UserError: a name is unknown, or given twice.
    """
    names = [] if kind == "NONE" else part_names(kind)
    for name in names:
        METHODS[name]
    if len(set(names)) < len(names):
        raise UserError(f"DISTILLER.TYPE {kind} names a method twice")
    return names


def check_same_classes(student: Detector, teacher: Detector, method: str) -> None:
    """Refuse to compare logits of different classes."""
    counts = [int(net.facts["num_classes"]) for net in (student, teacher)]
    if counts[0] != counts[1]:
        raise UserError(
            f"DISTILLER.TYPE {method} compares class logits, but the student tells {counts[0]} "
            f"classes apart and the teacher {counts[1]} (background included): choose "
            "DETECTION.DATA.LABEL_SPACE to fit the teacher (coco91 for torchvision's), or a method "
            "that compares features"
        )
