"""Build detectors: Faster and Mask R-CNN in torchvision's or detectron2's flavour.

    detector = build_detector(cfg.DETECTION.STUDENT, num_classes=81)
    losses = detector(images, targets)                       # in train mode
    found = detector.eval().detect(images, original_sizes)   # in eval mode

Class counts include the background, which is class 0 in both flavours. Images are resized, [3, H,
W] in [0, 1], RGB; each detector converts them to its own format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.detection.convert.weights import load_backbone, load_detector
from mdistiller.detection.networks.backbones import BACKBONES, freeze_stages, with_frozen_norms
from mdistiller.detection.networks.components import (
    PASTE,
    STRIDES,
    build_components,
    torchvision_components,
)
from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.preprocess import FORMATS, Preprocess
from mdistiller.registry import UserError, suggest
from mdistiller.runtime import project_root

NETWORK = {
    # resnet18, resnet34, resnet50, resnet101 or mobilenet_v2, or a detector of torchvision by name:
    # fasterrcnn_resnet50_fpn_v2, say
    "ARCH": "resnet50",
    # tv or d2: anchors, pooling, box losses and mask pasting of torchvision or of detectron2
    "FLAVOUR": "tv",
    # what images are turned into: rgb (for torchvision's weights), bgr (for MSRA's, of detectron2's
    # zoo), or the original's faulty upstream_r18, for whose teacher is upstream_r18_teacher
    "INPUT": "rgb",
    # bottlenecks halve the resolution in their 1x1 layer, as those of detectron2's zoo do
    "STRIDE_IN_1X1": False,
    # of the whole detector: a file (of a run, or of tools/convert_detectron2.py), or "torchvision"
    # for what it released of the named detectors; and whether the parts that depend on the classes
    # start anew where the file is for other classes
    "WEIGHTS": "",
    "NEW_HEAD": False,
    # of the classification network inside: a file, or "torchvision" for its ImageNet weights
    "BACKBONE_WEIGHTS": "",
    "MASK": False,
    # stages that are not trained: 1 the stem, 2 also that of P2, ...
    "FREEZE_AT": 2,
    # frozen (constants), batch, or sync (batch, over all processes)
    "NORM": "frozen",
    # of the feature pyramid
    "CHANNELS": 256,
    # in pixels, of P2 to P6
    "ANCHOR_SIZES": [32, 64, 128, 256, 512],
    # regions per image that the box head is trained on
    "ROI_SAMPLES": 512,
}
"""Defaults of DETECTION.STUDENT and DETECTION.TEACHER."""

NAMED = {
    "fasterrcnn_resnet50_fpn": "resnet50",
    "fasterrcnn_resnet50_fpn_v2": "resnet50",
    "fasterrcnn_mobilenet_v3_large_fpn": "mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "mobilenet_v3_large",
    "maskrcnn_resnet50_fpn": "resnet50",
    "maskrcnn_resnet50_fpn_v2": "resnet50",
}
"""torchvision's detectors that can be used, and the classification network inside each."""

_NO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")
"""Those whose released weights are of constant batch norms that add nothing to the variance."""
_EPS = 1e-5


def build_detector(
    network: Any,
    num_classes: int,
    where: str = "DETECTION.STUDENT",
    classes: Sequence[str] = (),
) -> Detector:
    """Build the detector of a config node, with its weights, in train mode.

    Args:
        network: with the keys of NETWORK.
        num_classes: with the background.
        where: the node's name, for errors.
        classes: their names by label; a file that records other classes is refused.

    Raises:
        UserError: a value or a file does not fit.
    """
    network = located(network)
    check_network(network, where)
    if not (network.WEIGHTS or network.BACKBONE_WEIGHTS) and (
        network.NORM == "frozen" or network.FREEZE_AT
    ):
        raise UserError(
            f"{where} has no weights, and random ones cannot stay frozen: name WEIGHTS or "
            "BACKBONE_WEIGHTS, or set NORM batch and FREEZE_AT 0"
        )
    detector = assemble(network, num_classes)
    detector.facts["classes"] = list(classes)
    if network.WEIGHTS:
        load_detector(detector, network, where)
    elif network.BACKBONE_WEIGHTS:
        load_backbone(detector, NAMED.get(network.ARCH, network.ARCH), network, where)
    eps = detector.facts["norm_eps"]
    if eps != _EPS:
        _require_constants(network, where)
    if network.NORM == "frozen":
        with_frozen_norms(detector, eps)
    freeze_stages(detector.backbone.body, network.FREEZE_AT)
    return detector


def located(network: Any) -> Any:
    """A network's node, with missing files looked up relative to the checkout."""
    node = network.clone()
    node.defrost()
    for key in ("WEIGHTS", "BACKBONE_WEIGHTS"):
        path = project_root() / node[key]
        if node[key] and not Path(node[key]).is_file() and path.is_file():
            node[key] = str(path)
    return node


def check_network(network: Any, where: str) -> None:
    """Refuse invalid values of a network's node.

    Raises:
        UserError: names the key, the value and the allowed values.
    """
    named = network.ARCH in NAMED
    allowed = {
        "ARCH": (*BACKBONES, *NAMED),
        "FLAVOUR": ("tv", "d2"),
        "INPUT": tuple(FORMATS),
        "NORM": ("frozen", "batch", "sync"),
        "FREEZE_AT": tuple(range(4 if "mobilenet_v3" in network.ARCH else 6)),
    }
    for key, values in allowed.items():
        value = network[key]
        if value not in values:
            near = suggest(str(value), [str(v) for v in values])
            raise UserError(
                f"{where}.{key} is {value!r}{near} (allowed: {', '.join(map(str, values))})"
            )
    fixed = {
        "FLAVOUR": "tv",
        "STRIDE_IN_1X1": False,
        "CHANNELS": NETWORK["CHANNELS"],
        "ANCHOR_SIZES": NETWORK["ANCHOR_SIZES"],
        "MASK": network.ARCH.startswith("maskrcnn"),
    }
    for key, value in fixed.items() if named else ():
        if network[key] != value:
            raise UserError(f"{where}: {network.ARCH} of torchvision has {key} {value}; set it so")
    if network.CHANNELS < 1 or network.ROI_SAMPLES < 1:
        raise UserError(f"{where}: CHANNELS and ROI_SAMPLES must be at least 1")
    sizes = list(network.ANCHOR_SIZES)
    if len(sizes) != len(STRIDES) or min(sizes) <= 0:
        raise UserError(
            f"{where}.ANCHOR_SIZES is {sizes}; it must have {len(STRIDES)} sizes above 0"
        )
    if network.WEIGHTS == "torchvision" and not named:
        raise UserError(
            f"{where}.WEIGHTS: torchvision released no {network.ARCH} detector; it has "
            f"{', '.join(NAMED)}"
        )
    if network.WEIGHTS == "torchvision" and network.ARCH in _NO_EPS:
        _require_constants(network, where)


def _require_constants(network: Any, where: str) -> None:
    if network.NORM != "frozen":
        raise UserError(
            f"{where}.NORM is {network.NORM}, but {network.ARCH} of WEIGHTS {network.WEIGHTS} was "
            "trained with constant batch norms: set it to frozen"
        )


def assemble(network: Any, num_classes: int) -> Detector:
    """A detector with random weights and trainable batch norms; nothing is loaded or frozen."""
    parts = torchvision_components if network.ARCH in NAMED else build_components
    backbone, rpn, heads = parts(network, num_classes)
    facts = {
        "arch": network.ARCH,
        "flavour": network.FLAVOUR,
        "input": network.INPUT,
        "stride_in_1x1": bool(network.STRIDE_IN_1X1),
        "mask": heads.has_mask(),
        "channels": network.CHANNELS,
        "anchor_sizes": list(network.ANCHOR_SIZES),
        "num_classes": num_classes,
        "norm_eps": 0.0 if network.WEIGHTS and network.ARCH in _NO_EPS else _EPS,
    }
    preprocess = Preprocess(FORMATS[network.INPUT])
    return Detector(backbone, rpn, heads, preprocess, PASTE[network.FLAVOUR], facts)
