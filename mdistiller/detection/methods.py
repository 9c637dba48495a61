"""Distillation methods for detectors: which are suitable, and how they are built.

DISTILLER.TYPE takes any method of `mdistiller.distillers` that reads class logits or feature maps,
or several joined by "+". A method gets (:class:`DetectorView`):

    logits  [R, classes] of the regions that the student samples; both networks classify the same
    target  [R] labels of those regions, 0 the background
    feats   the pyramid's maps [N, C, H, W], shallow to deep, the first of them twice: methods leave
            out or number as 0 what classification networks have there, the stem's output

A method's settings are in its own section, as in classification. Four methods are published for
detectors with other settings, which are in DETECTION.<NAME> (:data:`DETECTOR_SETTINGS`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.config.values import flatten, lookup
from mdistiller.detection.networks.components import STRIDES
from mdistiller.detection.networks.detector import Detector
from mdistiller.distillers import DISTILLERS, Distiller, Output, get_distiller, why_alone
from mdistiller.engine.cfg import Config
from mdistiller.engine.cfg import default_config as classification_config
from mdistiller.registry import UserError
from mdistiller.runtime import world_size

LEVELS = {"P2": "0", "P3": "1", "P4": "2", "P5": "3", "P6": "pool"}
"""Names of the pyramid's maps, and what torchvision calls them."""


class DetectorSettings(NamedTuple):
    """Settings of a method that differ for detectors.

    Attributes:
        config: defaults of DETECTION.<NAME>.
        translate: from that node to the method's own keys.
        loss: name of its loss term.
    """

    config: dict[str, Any]
    translate: Callable[[Any], dict[str, Any]]
    loss: str


DETECTOR_SETTINGS = {
    "KD": DetectorSettings(
        {"WEIGHT": 1.0, "T": 1.0, "DIVERGENCE": "kl"},
        lambda node: {
            "TEMPERATURE": node.T,
            "DIVERGENCE": node.DIVERGENCE,
            "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": node.WEIGHT},
        },
        "loss_kd",
    ),
    "DKD": DetectorSettings(
        {"WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 0.25, "T": 1.0, "DIVERGENCE": "kl"},
        lambda node: {
            "ALPHA": node.WEIGHT * node.ALPHA,
            "BETA": node.WEIGHT * node.BETA,
            "T": node.T,
            "WARMUP": 0,
            "DIVERGENCE": node.DIVERGENCE,
        },
        "loss_dkd",
    ),
    "REVIEWKD": DetectorSettings(
        {"WEIGHT": 1.0, "LEVELS": list(LEVELS), "MID_CHANNELS": 256},
        lambda node: {
            "REVIEWKD_WEIGHT": node.WEIGHT,
            "WARMUP_EPOCHS": 0,
            "MID_CHANNELS": node.MID_CHANNELS,
        },
        "loss_review",
    ),
    "FITNET": DetectorSettings(
        {"WEIGHT": 1.0, "LEVELS": list(LEVELS)},
        lambda node: {
            "HINT_LAYERS": list(range(1, len(node.LEVELS) + 1)),
            "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": node.WEIGHT},
        },
        "loss_fitnet",
    ),
}

CHANGED_DEFAULTS = {"WKD": {"COST": "fc", "HINT_LAYER": 4}}
"""Other defaults than in classification: WKD's class costs come from the teacher's box classifier,
without a pass over images, and its map is P5."""


class DetectorView(nn.Module):
    """A detector seen as a classification network, as methods need it when they are built.

    Args:
        detector: the network itself, not a copy.
        levels: names of the pyramid's maps that the method compares, keys of LEVELS.
    """

    globally_pooled = True  # the class logits are a linear layer on the box head's features

    def __init__(self, detector: Detector, levels: Sequence[str]):
        super().__init__()
        self.detector = detector
        self.names = [LEVELS[name] for name in LEVELS if name in levels]  # shallow to deep

    def classifier(self) -> nn.Module:
        """The linear layer from a region's features to class logits."""
        layer: nn.Module = self.detector.roi_heads.box_predictor.cls_score
        return layer

    def features(self, maps: Mapping[str, Tensor]) -> dict[str, Any]:
        """The method's `Output.features`; without "feats" if there is no pyramid P2 to P6."""
        if not has_pyramid(self.detector):
            return {}
        chosen = [maps[name] for name in self.names]
        return {"feats": [chosen[0], *chosen]}

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits of 0 and the features of images [N, 3, H, W]: shapes are read from these."""
        classes = int(self.detector.facts["num_classes"])
        return image.new_zeros(len(image), classes), self.features(self.detector.backbone(image))

    def example(self, images: int, regions: int) -> Output:
        """Random outputs with the shapes for images of 128 x 128 pixels."""
        device = next(self.detector.parameters()).device
        sides = [128 // stride for stride in STRIDES]
        shapes = dict(zip(LEVELS.values(), sides, strict=True))
        width = int(self.detector.backbone.out_channels)
        maps = {n: torch.randn(images, width, s, s, device=device) for n, s in shapes.items()}
        classes = int(self.detector.facts["num_classes"])
        return Output(torch.randn(regions, classes, device=device), self.features(maps))


def has_pyramid(detector: Detector) -> bool:
    """Whether a detector has the feature maps P2 to P6."""
    return [*detector.backbone.body.return_layers.values(), "pool"] == list(LEVELS.values())


def method_names(kind: str) -> list[str]:
    """Names of the methods of a DISTILLER.TYPE; none for NONE.

    Raises:
        UserError: a name is unknown or given twice, or the method does not suit detectors.
    """
    if kind == "NONE":
        return []
    cls = get_distiller(kind)
    names = list(getattr(cls, "methods", {})) or [kind]
    for name in names:
        reason = _unsuitable(DISTILLERS[name])
        if reason:
            raise unsuitable(name, reason)
    return names


def unsuitable(name: str, reason: str) -> UserError:
    """The error for a method that cannot train a detector."""
    return UserError(f"DISTILLER.TYPE {name} cannot train a detector: {reason}")


def _unsuitable(cls: type[Distiller]) -> str:
    """Why a method's class does not suit detectors; "" if it may."""
    if cls.uses_teacher and cls.two_views:
        return "it needs two views of each image"
    if reason := why_alone(cls):
        return reason
    if "num_data" in inspect.signature(cls.__init__).parameters:
        return "it remembers every training sample, and regions are new ones in every step"
    if not cls.teacher_in_eval_mode:
        return "it needs the teacher in training mode"
    if cls.relates_images and world_size() > 1:
        return (
            "it compares the maps of all images of a batch, whose sizes differ between processes; "
            "use one process"
        )
    return ""


def needs_same_classes(name: str) -> bool:
    """Whether a method compares class logits, so that both networks must have the same classes."""
    return bool(DISTILLERS[name].needs_teacher_classifier)


def check_same_classes(student: Detector, teacher: Detector, method: str) -> None:
    """Refuse networks with different classes for a method that compares logits."""
    counts = [int(net.facts["num_classes"]) for net in (student, teacher)]
    if counts[0] != counts[1]:
        raise UserError(
            f"DISTILLER.TYPE {method} compares class logits, but the student has {counts[0]} "
            f"classes and the teacher {counts[1]} (background included): choose "
            "DETECTION.DATA.LABEL_SPACE to fit the teacher (coco91 for torchvision's), or a method "
            "that compares features"
        )


def method_sections() -> dict[str, Any]:
    """Defaults of the methods' own sections, without those that DETECTION replaces."""
    sections = {}
    for name in DISTILLERS:
        if name not in DETECTOR_SETTINGS and name != "NONE":
            declared = DISTILLERS.config.get(name)
            changes = CHANGED_DEFAULTS.get(name, {})
            sections[name] = Config({**(declared or {}), **changes}, new_allowed=declared is None)
    return sections


def levels_of(cfg: Any, name: str) -> list[str]:
    """The levels that a method compares: DETECTION.<NAME>.LEVELS, else DETECTION.LEVELS.

    Raises:
        UserError: they are not some of P2 to P6, each once.
    """
    node = cfg.DETECTION.get(name, {})
    key = f"DETECTION.{name}.LEVELS" if "LEVELS" in node else "DETECTION.LEVELS"
    levels = list(node.get("LEVELS", cfg.DETECTION.LEVELS))
    if not levels or set(levels) - set(LEVELS) or len(set(levels)) < len(levels):
        raise UserError(f"{key} {levels} must name some of {', '.join(LEVELS)}, each once")
    return levels


def method_config(cfg: Any, name: str) -> Config:
    """The config to build a method with: `cfg`, its own section, and classification's keys.

    Raises:
        UserError: a cross-entropy weight is set, which has no effect for detectors.
    """
    declared = DISTILLERS.config.get(name) or {}
    full = cfg.clone()
    full.defrost()
    for section, node in classification_config().items():
        if isinstance(node, Mapping) and section not in DISTILLERS:
            for key, value in node.items():
                full.setdefault(section, Config()).setdefault(key, value)
    if name in DETECTOR_SETTINGS:
        settings = DETECTOR_SETTINGS[name].translate(cfg.DETECTION[name])
        full[name] = Config({**declared, **settings})
        return full
    for key in flatten(declared):
        value = lookup(full[name], key)
        if key.endswith("CE_WEIGHT") and value != lookup(Config(declared), key):
            raise UserError(
                f"{name}.{key} {value} has no effect in detection, where the detector's own losses "
                "take the place of the cross-entropy; leave it out"
            )
    return full


def build_method(name: str, student: Detector, teacher: Detector, cfg: Any) -> Distiller:
    """Build a registered method for two detectors.

    Its `student` and `teacher` are views, not child modules; its children are the modules it adds.

    Args:
        cfg: of the detection run.

    Raises:
        UserError: the method does not suit detectors, or these ones.
    """
    levels = levels_of(cfg, name)
    views = [DetectorView(net, levels) for net in (student, teacher)]
    try:
        config = method_config(cfg, name)
        part: Distiller = DISTILLERS[name].build(*views, config, num_data=0)
    except UserError as error:
        raise _explained(name, error, views) from error
    for role in ("student", "teacher"):
        object.__setattr__(part, role, part._modules.pop(role))
    if part.init_stages():
        raise unsuitable(
            name,
            "it has a stage of training before the main one, which detection does not run; set "
            f"{name}.INIT.EPOCHS 0 (and a weight of the main stage above 0)",
        )
    if part.teacher_facts:
        raise unsuitable(
            name,
            f"it needs {', '.join(part.teacher_facts)} of the teacher and all training images; "
            "choose settings without it",
        )
    return part


def try_method(name: str, part: Distiller, images: int) -> None:
    """Run a copy of a method once on random outputs, so that errors show before the first step.

    Args:
        part: of :func:`build_method`, on the networks' device; unchanged.
        images: of a batch.

    Raises:
        UserError: it needs something that detectors do not give.
    """
    views: list[Any] = [part.student, part.teacher]
    trial = copy.deepcopy(part, {id(view): view for view in views}).train()
    devices = [p.device for p in views[0].parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        student_output, teacher_output = (
            trial.standardized(view.example(images, 8)) for view in views
        )
        logits = student_output.logits
        target = torch.arange(8, device=logits.device) % logits.shape[1]
        try:
            trial.distill(student_output, teacher_output, target, epoch=1).mean()
        except Exception as error:  # whatever a user's method raises
            raise _explained(name, error, views) from error


def _explained(name: str, error: Exception, views: Sequence[DetectorView]) -> UserError:
    """The error for a method that cannot be built for, or run on, two detectors."""
    text = (str(error).splitlines() or [""])[0]
    reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    lacking = [view.detector.facts["arch"] for view in views if not has_pyramid(view.detector)]
    if "'feats'" in reason and lacking:
        reason = (
            f"it compares pyramids from P2 to P6, which {lacking[0]} does not have; choose another "
            "network"
        )
    where = f"DETECTION.{name}: " if name in DETECTOR_SETTINGS else ""
    return unsuitable(name, where + reason)
