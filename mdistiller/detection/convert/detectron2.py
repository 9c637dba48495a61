"""Convert weights of detectron2's Faster and Mask R-CNNs (ResNet-FPN) to files of this library.

Changed are: names; class scores, whose background is last there and first here; boxes and masks,
which have no background there and get unused zero rows here. Batch norms, order of anchors and box
coding agree. Neither the stride of a bottleneck's first 1x1 layer nor the channel order can be read
from weights: the user states both, and the file records them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from mdistiller.detection.convert.pickles import load_arrays
from mdistiller.detection.convert.weights import FACTS, without_counters
from mdistiller.detection.networks.models import NETWORK, assemble
from mdistiller.detection.networks.preprocess import FORMATS
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state

_NORM = r"(?P<part>weight|bias|running_mean|running_var|num_batches_tracked)"
_BOTH = r"(?P<part>weight|bias)"
_BLOCK = r"backbone\.bottom_up\.res(?P<n>[2-5])\.(?P<block>\d+)"
_HERE = "backbone.body.layer{stage}.{block}"

RULES = {
    r"backbone\.bottom_up\.stem\.conv1\.weight": "backbone.body.conv1.weight",
    rf"backbone\.bottom_up\.stem\.conv1\.norm\.{_NORM}": "backbone.body.bn1.{part}",
    rf"{_BLOCK}\.conv(?P<k>[123])\.weight": f"{_HERE}.conv{{k}}.weight",
    rf"{_BLOCK}\.conv(?P<k>[123])\.norm\.{_NORM}": f"{_HERE}.bn{{k}}.{{part}}",
    rf"{_BLOCK}\.shortcut\.weight": f"{_HERE}.downsample.0.weight",
    rf"{_BLOCK}\.shortcut\.norm\.{_NORM}": f"{_HERE}.downsample.1.{{part}}",
    rf"backbone\.fpn_lateral(?P<n>[2-5])\.{_BOTH}": "backbone.fpn.inner_blocks.{level}.0.{part}",
    rf"backbone\.fpn_output(?P<n>[2-5])\.{_BOTH}": "backbone.fpn.layer_blocks.{level}.0.{part}",
    rf"proposal_generator\.rpn_head\.conv\.{_BOTH}": "rpn.head.conv.0.0.{part}",
    rf"proposal_generator\.rpn_head\.objectness_logits\.{_BOTH}": "rpn.head.cls_logits.{part}",
    rf"proposal_generator\.rpn_head\.anchor_deltas\.{_BOTH}": "rpn.head.bbox_pred.{part}",
    rf"roi_heads\.box_head\.fc(?P<k>[12])\.{_BOTH}": "roi_heads.box_head.fc{fc}.{part}",
    rf"roi_heads\.box_predictor\.(?P<what>cls_score|bbox_pred)\.{_BOTH}": (
        "roi_heads.box_predictor.{what}.{part}"
    ),
    rf"roi_heads\.mask_head\.mask_fcn(?P<k>[1-4])\.{_BOTH}": "roi_heads.mask_head.{fcn}.0.{part}",
    rf"roi_heads\.mask_head\.deconv\.{_BOTH}": "roi_heads.mask_predictor.conv5_mask.{part}",
    rf"roi_heads\.mask_head\.predictor\.{_BOTH}": "roi_heads.mask_predictor.mask_fcn_logits.{part}",
}
"""detectron2's names, and what they are here."""

_ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.[0-4]")
_PIXELS = ("pixel_mean", "pixel_std")
_DEPTHS = {  # blocks of each stage, and whether they are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}


def convert(
    arrays: Mapping[str, Tensor], path: Path, form: str = "bgr", stride_in_1x1: bool = True
) -> dict[str, Any]:
    """Convert detectron2's weights to the contents of a file for `DETECTION.*.WEIGHTS`.

    Args:
        arrays: by detectron2's names; see :func:`read`.
        path: the file they are of, for errors.
        form: the input format in training, one of FORMATS.
        stride_in_1x1: as of NETWORK; without meaning for ResNet-18 and 34.

    Raises:
        UserError: a weight is missing, unknown or of another shape.
    """
    state = {}
    unknown = []
    for name, value in arrays.items():
        target = rename(name)
        if target is not None:
            state[target] = value
        elif name not in _PIXELS and not _ANCHORS.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{path} holds {len(unknown)} weights that a Faster or Mask R-CNN with ResNet and FPN "
            f"does not have ({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
        )
    network = _network(state, path)
    network.INPUT = form
    network.STRIDE_IN_1X1 = stride_in_1x1 and network.ARCH in ("resnet50", "resnet101")
    classes = _reorder(state, path)
    detector = assemble(network, classes)
    expected = detector.state_dict()
    load_state(detector, without_counters(state, expected), f"{path} and {network.ARCH} with FPN")
    _check_constants(arrays, detector.rpn.anchor_generator.cell_anchors, form, path)
    kept = {k: v for k, v in detector.state_dict().items() if not k.endswith("batches_tracked")}
    return {"model": kept, FACTS: detector.facts}


def rename(name: str) -> str | None:
    """The name here of a weight of detectron2; None without a counterpart."""
    for pattern, target in RULES.items():
        if found := re.fullmatch(pattern, name):
            words = found.groupdict()
            n, k = int(words.get("n") or 0), int(words.get("k") or 0)
            return target.format(stage=n - 1, level=n - 2, fc=k + 5, fcn=k - 1, **words)
    return None


def read(path: Path) -> dict[str, Tensor]:
    """Read weights, by detectron2's names, from a .pkl of its zoo or a .pth of its training.

    Raises:
        UserError: the file is refused, damaged or holds something else.
    """
    contents = load_arrays(path) if path.suffix in (".pkl", ".pickle") else load_checkpoint(path)
    state = contents
    for key in ("model", "blobs"):  # of detectron2; of Caffe2, which may do without
        state = state.get(key, state) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} holds no weights under 'model', as files of detectron2 do")
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(
                np.ascontiguousarray(value).astype(value.dtype.newbyteorder("="))
            )
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {str(name)[:80]!r} is not an array of numbers")
        tensors[str(name)] = value.float() if value.is_floating_point() else value
    return tensors


def _network(state: Mapping[str, Tensor], path: Path) -> CfgNode:
    """The config of the network that fits weights with our names."""
    blocks = [
        {m[1] for key in state if (m := re.match(rf"backbone\.body\.layer{k}\.(\d+)\.", key))}
        for k in range(1, 5)
    ]
    depth = tuple(map(len, blocks))
    arch = _DEPTHS.get((depth, "backbone.body.layer1.0.conv3.weight" in state))  # type: ignore[arg-type]
    pyramid = state.get("backbone.fpn.inner_blocks.0.0.weight")
    if arch is None or pyramid is None:
        supported = ", ".join(_DEPTHS.values())
        raise UserError(
            f"{path} is not of a supported ResNet with FPN ({supported}): its stages have "
            f"{', '.join(map(str, depth))} blocks"
        )
    network = CfgNode(NETWORK)
    network.ARCH, network.FLAVOUR, network.CHANNELS = arch, "d2", len(pyramid)
    network.MASK = any(key.startswith("roi_heads.mask_head.") for key in state)
    return network


def _reorder(state: dict[str, Tensor], path: Path) -> int:
    """Move the background first in all class-wise weights; returns the number of classes."""
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None:
        raise UserError(f"{path} lacks roi_heads.box_predictor.cls_score.weight")
    classes = len(scores)
    for key, value in state.items():
        if ".cls_score." in key:
            state[key] = value.roll(1, 0)
        elif ".box_predictor.bbox_pred." in key or ".mask_fcn_logits." in key:
            per_class = 4 if "bbox_pred" in key else 1
            if len(value) != per_class * (classes - 1):
                raise UserError(
                    f"{path}: {key} has {len(value)} rows for {classes - 1} classes; boxes and "
                    "masks that are the same for all classes are not supported"
                )
            state[key] = torch.cat([value.new_zeros(per_class, *value.shape[1:]), value])
    return classes


def _check_constants(
    arrays: Mapping[str, Tensor], anchors: list[Tensor], form: str, path: Path
) -> None:
    """Refuse anchors and pixel means other than those of the network here."""
    expected = {
        f"proposal_generator.anchor_generator.cell_anchors.{i}": own
        for i, own in enumerate(anchors)
    }
    expected["pixel_mean"] = torch.tensor(FORMATS[form].mean).view(3, 1, 1)
    expected["pixel_std"] = torch.tensor(FORMATS[form].std).view(3, 1, 1)
    for name, value in expected.items():
        array = arrays.get(name, value)
        if array.numel() != value.numel() or not torch.allclose(
            array.view_as(value).float(), value, atol=1e-2
        ):
            raise UserError(
                f"{path}: {name} is {_rounded(array)}, but a detector with INPUT {form} has "
                f"{_rounded(value)}"
            )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 2) for value in values.flatten()[:12].tolist()]
