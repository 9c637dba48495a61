"""Small detectors for the tests: MobileNetV2 with 32 channels, lively but tame random weights."""

import copy

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from yacs.config import CfgNode

from mdistiller.detection.networks.models import NETWORK, build_detector

SMALL = {
    "ARCH": "mobilenet_v2",
    "CHANNELS": 32,
    "NORM": "batch",
    "FREEZE_AT": 0,
    "ROI_SAMPLES": 64,
}


def node(**keys):
    """A config node like DETECTION.STUDENT, of a small network."""
    return CfgNode({**NETWORK, **SMALL, **keys})


def named(arch, **keys):
    """One of torchvision's detectors."""
    return node(ARCH=arch, CHANNELS=256, MASK=arch.startswith("maskrcnn"), **keys)


_made = {}


def detector(num_classes=4, seed=0, **keys):
    """A calibrated small detector in train mode; the same call gives equal ones."""
    call = repr((num_classes, seed, sorted(keys.items())))
    if call not in _made:
        torch.manual_seed(seed)
        _made[call] = calibrate(build_detector(node(**keys), num_classes))
        if keys.get("MASK"):
            _made[call].roi_heads.detections_per_img = 8  # each has a costly mask
    return copy.deepcopy(_made[call])


def calibrate(net):
    """Make the batch norms of a random detector, frozen or not, fit what passes through them.

    Without it activations grow from block to block until nothing means anything.
    """

    def fit(layer, inputs):
        values = inputs[0].transpose(0, 1).flatten(1)
        layer.running_mean.copy_(values.mean(1))
        layer.running_var.copy_(values.var(1) + 1e-3)

    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
    hooks = [m.register_forward_pre_hook(fit) for m in net.modules() if isinstance(m, kinds)]
    training = net.training
    with torch.no_grad():
        for layer in net.roi_heads.box_predictor.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)
        net.eval().backbone(net.prepare(images())[0].tensors)
    for hook in hooks:
        hook.remove()
    return net.train(training)


def images(seed=0):
    """Two images of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in ((96, 128), (80, 100))]


def targets(masks=False):
    """Two objects in the first image, none in the second."""
    boxes = torch.tensor([[10.0, 12, 60, 50], [70, 20, 120, 90]])
    found = [
        {"boxes": boxes, "labels": torch.tensor([2, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        drawn = torch.zeros(2, 96, 128, dtype=torch.uint8)
        drawn[0, 12:50, 10:60] = 1
        drawn[1, 20:90, 90:120] = 1
        found[0]["masks"] = drawn
        found[1]["masks"] = torch.zeros(0, 80, 100, dtype=torch.uint8)
    return found
