"""Load weights of detectors from files {"model": state, "detector": facts}.

Detectors of torchvision and detectron2 have the same shapes; only the facts tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision.models as zoo
from torch import Tensor, nn

from mdistiller.detection.coco.labels import class_advice
from mdistiller.detection.convert.caffe2 import BACKBONE
from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.preprocess import FORMATS
from mdistiller.models.released import TORCHVISION, released_file
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state, network_state

FACTS = "detector"
"""The facts' key in a file."""
_SCORES = "roi_heads.box_predictor.cls_score.weight"
_PER_CLASS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def load_detector(detector: Detector, network: Any, where: str) -> None:
    """Load `network.WEIGHTS`: a file, or "torchvision" for its released weights.

    The batch norms' eps, which is not in the config, is the file's if recorded.

    Raises:
        UserError: the file cannot be read, or is for another detector.
    """
    path = _place(network, "WEIGHTS", network.ARCH, "DEFAULT", where)
    contents = load_checkpoint(path)
    state = network_state(contents, path)
    facts = contents.get(FACTS) if isinstance(contents, Mapping) else None
    if isinstance(facts, Mapping):
        check_facts(facts, detector.facts, path, where)
        if isinstance(facts.get("norm_eps"), float):
            detector.facts["norm_eps"] = facts["norm_eps"]
        if not network.NEW_HEAD:
            _check_classes(facts.get("classes"), detector.facts.get("classes"), path, where)
    expected = detector.state_dict()
    if network.NEW_HEAD:
        state = {**state, **{k: v for k, v in expected.items() if _other_classes(k, v, state)}}
    if _SCORES in state and _other_classes(_SCORES, expected[_SCORES], state):
        classes, wanted = len(state[_SCORES]), len(expected[_SCORES])
        raise UserError(
            f"{where}.WEIGHTS {path} is for {classes} classes, background included, and the data "
            f"have {wanted}: {class_advice(classes, wanted, where)}"
        )
    load_state(detector, without_counters(state, expected), f"{path} and {where} ({network.ARCH})")


def check_facts(
    facts: Mapping[str, Any],
    wanted: Mapping[str, Any],
    path: str | Path,
    where: str,
    of: str = "WEIGHTS",
) -> None:
    """Refuse a file whose facts differ from the network's config.

    Raises:
        UserError: names the key and both values.
    """
    for name, value in wanted.items():
        recorded = facts.get(name, value)
        fitting = (value, FORMATS[value].weights) if name == "input" else (value,)
        if name not in ("num_classes", "classes", "norm_eps") and not (
            type(recorded) is type(value) and recorded in fitting
        ):
            key = name.upper()
            raise UserError(
                f"{where}.{of} {path} is of a detector with {key} {str(recorded)[:60]}, but "
                f"{where}.{key} is {value}: set it to that"
            )


def _check_classes(said: Any, wanted: Any, path: Path, where: str) -> None:
    """Refuse weights for as many classes, but other ones or in another order."""
    if not said or not wanted or len(said) != len(wanted) or list(said) == list(wanted):
        return
    pairs = enumerate(zip(said, wanted, strict=True))
    label, (one, other) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"{where}.WEIGHTS {path} is for other classes: its class {label} is {str(one)[:60]!r}, the "
        f"data's is {other!r}; use data with its classes in its order, or {where}.NEW_HEAD True"
    )


def load_backbone(detector: Detector, arch: str, network: Any, where: str) -> None:
    """Load `network.BACKBONE_WEIGHTS`: a classification network's file, or "torchvision".

    Args:
        arch: the classification network's name.

    Raises:
        UserError: the file cannot be read, or is for another network.
    """
    path = _place(network, "BACKBONE_WEIGHTS", arch, "IMAGENET1K_V1", where)
    contents = load_checkpoint(path)
    facts = contents.get(BACKBONE) if isinstance(contents, Mapping) else None
    if isinstance(facts, Mapping):
        wanted = {key: detector.facts[key] for key in ("input", "stride_in_1x1")}
        check_facts(facts, wanted, path, where, "BACKBONE_WEIGHTS")
    state = network_state(contents, path)
    plain = {key.removeprefix("features."): value for key, value in state.items()}
    body: nn.Module = detector.backbone.body
    inside = {name for name, _ in body.named_children()}  # the rest are what follows the last stage
    weights = {key: value for key, value in plain.items() if key.partition(".")[0] in inside}
    what = f"{path} and the backbone of {where} ({arch})"
    load_state(body, without_counters(weights, body.state_dict()), what)


def _place(network: Any, key: str, name: str, release: str, where: str) -> Path:
    """The file that a key names; torchvision's weights are downloaded.

    Args:
        name: torchvision's name of the network.
        release: the version of its weights.
    """
    if network[key] != "torchvision":
        return Path(network[key]).expanduser()
    if FORMATS[network.INPUT].weights != "rgb" or network.STRIDE_IN_1X1:
        raise UserError(
            f"{where}.{key} torchvision needs INPUT rgb and STRIDE_IN_1X1 False, as it was trained"
        )
    weights = getattr(zoo.get_model_weights(name), release)
    return released_file(f"{TORCHVISION}{weights}", name)


def _other_classes(key: str, own: Tensor, state: Mapping[str, Tensor]) -> bool:
    return key.startswith(_PER_CLASS) and key in state and len(state[key]) != len(own)


def without_counters(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without batch-norm counters, which a frozen network does not have."""
    return {k: v for k, v in state.items() if k in own or not k.endswith("num_batches_tracked")}
