"""Files shaped like those of detectron2's model zoo, and what its networks make of them.

Written from detectron2's names alone, as a second opinion on the converter: plain functions of
torch on the weights by those names.
"""

import pickle
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)


def shapes(arch, classes=3, channels=16, mask=False):
    """The names and shapes of the zoo's weights; `classes` without the background."""
    deep = arch != "resnet18"
    found = {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)}
    before = 64
    for n, count in zip(range(2, 6), BLOCKS[arch], strict=True):
        inner = 64 * 2 ** (n - 2)
        out = 4 * inner if deep else inner
        for i in range(count):
            block = f"backbone.bottom_up.res{n}.{i}"
            sizes = [(inner, before, 1), (inner, inner, 3), (out, inner, 1)]
            for k, (o, c, side) in enumerate(sizes if deep else [(out, before, 3), (out, out, 3)]):
                found[f"{block}.conv{k + 1}.weight"] = (o, c, side, side)
            if before != out:
                found[f"{block}.shortcut.weight"] = (out, before, 1, 1)
            before = out
        found[f"backbone.fpn_lateral{n}.weight"] = (channels, out, 1, 1)
        found[f"backbone.fpn_output{n}.weight"] = (channels, channels, 3, 3)
    for name in [name for name in found if "bottom_up" in name]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[name.replace(".weight", f".norm.{part}")] = found[name][:1]
    for name, shape in {
        "rpn_head.conv": (channels, channels, 3, 3),
        "rpn_head.objectness_logits": (3, channels, 1, 1),
        "rpn_head.anchor_deltas": (12, channels, 1, 1),
    }.items():
        found[f"proposal_generator.{name}.weight"] = shape
    for name, shape in {
        "box_head.fc1": (1024, channels * 49),
        "box_head.fc2": (1024, 1024),
        "box_predictor.cls_score": (classes + 1, 1024),
        "box_predictor.bbox_pred": (4 * classes, 1024),
    }.items():
        found[f"roi_heads.{name}.weight"] = shape
    if mask:
        for k in range(1, 5):
            found[f"roi_heads.mask_head.mask_fcn{k}.weight"] = (
                256,
                channels if k == 1 else 256,
                3,
                3,
            )
        found["roi_heads.mask_head.deconv.weight"] = (256, 256, 2, 2)
        found["roi_heads.mask_head.predictor.weight"] = (classes, 256, 1, 1)
    for name in [name for name in found if "bottom_up" not in name]:
        rows = found[name][1 if "deconv" in name else 0]
        found[name.replace(".weight", ".bias")] = (rows,)
    return found


def weights(arch, seed=0, **settings):
    """Random arrays under the zoo's names, tame enough for activations to stay of size one."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(arch, **settings).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            values = 0.5 + values**2
        elif name.endswith("norm.weight"):
            values = 0.5 + 0.1 * values
        elif len(shape) > 1:
            values *= (1.5 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("bias"):
            values *= 0.1
        found[name] = values.astype(np.float32)
    for i, size in enumerate(SIZES):
        cells = [
            (-w / 2, -h / 2, w / 2, h / 2)
            for ratio in RATIOS
            for w, h in [(size / ratio**0.5, size * ratio**0.5)]
        ]
        key = f"proposal_generator.anchor_generator.cell_anchors.{i}"
        found[key] = np.array(cells, np.float32)
    found["pixel_mean"] = np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1)
    found["pixel_std"] = np.ones((3, 1, 1), np.float32)
    return found


def write(path, model, protocol=2):
    """A .pkl as the zoo has them; returns its path."""
    contents = {"model": OrderedDict(model), "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(contents, protocol=protocol))
    return path


class Reference:
    """detectron2's network as functions of arrays by its names."""

    def __init__(self, arrays, stride_in_1x1=True):
        self.of = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.first = stride_in_1x1

    def conv(self, x, name, stride=1, norm=False):
        weight = self.of[f"{name}.weight"]
        x = F.conv2d(x, weight, self.of.get(f"{name}.bias"), stride, weight.shape[-1] // 2)
        if not norm:
            return x
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.of[f"{name}.norm.{part}"] for part in parts), eps=1e-5)

    def block(self, x, name, stride):
        deep = f"{name}.conv3.weight" in self.of
        strides = (stride, 1) if self.first or not deep else (1, stride)
        out = F.relu(self.conv(x, f"{name}.conv1", strides[0], norm=True))
        out = self.conv(out, f"{name}.conv2", strides[1], norm=True)
        if deep:
            out = self.conv(F.relu(out), f"{name}.conv3", norm=True)
        short = f"{name}.shortcut"
        rest = self.conv(x, short, stride, norm=True) if f"{short}.weight" in self.of else x
        return F.relu(out + rest)

    def features(self, images):
        """P2 to P6 of images [N, 3, H, W], RGB in [0, 1]."""
        x = images.flip(1) * 255 - self.of["pixel_mean"]
        x = F.relu(self.conv(x, "backbone.bottom_up.stem.conv1", 2, norm=True))
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for n in range(2, 6):
            i = 0
            while f"backbone.bottom_up.res{n}.{i}.conv1.weight" in self.of:
                stride = 2 if n > 2 and i == 0 else 1
                x = self.block(x, f"backbone.bottom_up.res{n}.{i}", stride)
                i += 1
            stages.append(x)
        levels, above = [], None
        for n in range(5, 1, -1):
            inner = self.conv(stages[n - 2], f"backbone.fpn_lateral{n}")
            if above is not None:
                inner = inner + F.interpolate(above, scale_factor=2, mode="nearest")
            above = inner
            levels.insert(0, self.conv(inner, f"backbone.fpn_output{n}"))
        return [*levels, levels[-1][:, :, ::2, ::2]]

    def proposals(self, level):
        """Objectness [N, 3, h, w] and anchor deltas [N, 12, h, w]."""
        head = "proposal_generator.rpn_head"
        x = F.relu(self.conv(level, f"{head}.conv"))
        names = ("objectness_logits", "anchor_deltas")
        return [self.conv(x, f"{head}.{name}") for name in names]

    def linear(self, x, name):
        return F.linear(x, self.of[f"{name}.weight"], self.of[f"{name}.bias"])

    def boxes(self, pooled):
        """Class logits, background last, and box deltas of pooled regions [R, C, 7, 7]."""
        x = pooled.flatten(1)
        for k in (1, 2):
            x = F.relu(self.linear(x, f"roi_heads.box_head.fc{k}"))
        return [self.linear(x, f"roi_heads.box_predictor.{n}") for n in ("cls_score", "bbox_pred")]

    def masks(self, pooled):
        """Mask logits [R, classes, 28, 28] of pooled regions [R, C, 14, 14]."""
        x = pooled
        for k in range(1, 5):
            x = F.relu(self.conv(x, f"roi_heads.mask_head.mask_fcn{k}"))
        name = "roi_heads.mask_head.deconv"
        up = F.conv_transpose2d(x, self.of[f"{name}.weight"], self.of[f"{name}.bias"], stride=2)
        return self.conv(F.relu(up), "roi_heads.mask_head.predictor")
