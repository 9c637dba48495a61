"""detectron2's flavour against values worked out by hand and by numpy."""

import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

from mdistiller.detection.networks import detectron2 as d2
from mdistiller.detection.networks.backbones import build_backbone, with_frozen_norms
from mdistiller.detection.networks.models import assemble

SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
STRIDES = (4, 8, 16, 32, 64)


def maps(height, width, channels=1):
    """Of an image of that size: P2 to P5, and P6, which is P5 without every second row."""
    sizes = [(height // s, width // s) for s in STRIDES[:4]]
    sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return [torch.zeros(1, channels, *size) for size in sizes]


def test_anchors_are_exact_and_strides_fixed():
    """P5 of 800 pixels is 25 high, so P6 is 13: torchvision makes that a stride of 61."""
    levels = maps(800, 1088)
    image = ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)])
    made = d2.ExactAnchors([[s] for s in SIZES], [RATIOS] * 5, STRIDES)(image, levels)
    expected = [
        (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
        for level, stride, size in zip(levels, STRIDES, SIZES, strict=True)
        for y in range(level.shape[2])
        for x in range(level.shape[3])
        for ratio in RATIOS
        for w, h in [(size / math.sqrt(ratio), size * math.sqrt(ratio))]
    ]
    torch.testing.assert_close(made[0], torch.tensor(expected))
    stock = d2.Anchors([[s] for s in SIZES], [RATIOS] * 5)(image, levels)
    off = (stock[0] - made[0]).abs()
    count = 3 * levels[-1].shape[2] * levels[-1].shape[3]
    assert 0.4 < off[:-count].max() < 0.5  # the rounding
    assert off[-count:].max() > 30  # the stride: 12 rows times 3 pixels


def test_pooling_is_aligned():
    """On a map whose values are the pixels' coordinates, a cell's mean is its centre's."""
    pool = d2.AlignedPool(["0", "1", "2", "3"], 7, STRIDES[:4])
    features = {}
    for name, stride in zip("0123", STRIDES, strict=False):
        y, x = torch.meshgrid(
            torch.arange(256 // stride), torch.arange(320 // stride), indexing="ij"
        )
        features[name] = torch.stack([x, y, torch.full_like(x, stride)])[None].float()
    boxes = [torch.tensor([[16.0, 40, 72, 103], [30, 20, 226, 216], [40, 16, 300, 244]])]
    pooled = pool(features, boxes, [(256, 320)])
    for (x1, y1, x2, y2), cells, stride in zip(boxes[0].tolist(), pooled, (4, 8, 16), strict=True):
        centres = (torch.arange(7) + 0.5) / 7
        x = (x1 + centres * (x2 - x1)) / stride - 0.5
        y = (y1 + centres * (y2 - y1)) / stride - 0.5
        torch.testing.assert_close(cells[0], x.expand(7, 7), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cells[1], y[:, None].expand(7, 7), atol=1e-4, rtol=1e-4)
        assert (cells[2] == stride).all()


def looked_up(values, x, y):
    """The value at a place of a map, bilinearly between pixels' centres."""
    i, j = int(y), int(x)
    cell = values[i : i + 2, j : j + 2]
    return np.array([1 - y + i, y - i]) @ cell @ np.array([1 - x + j, x - j])


def test_cells_are_sampled_once_a_pixel():
    """A cell 2.5 map pixels wide and 1.3 high is the mean of 3 x 2 samples."""
    values = np.random.default_rng(0).random((64, 80))
    features = {name: torch.zeros(1, 1, 8, 8) for name in "123"}
    features["0"] = torch.tensor(values, dtype=torch.float32)[None, None]
    x1, y1, width, height = 21.0, 33.0, 70.0, 36.4
    box = torch.tensor([[x1, y1, x1 + width, y1 + height]])
    pooled = d2.AlignedPool(["0", "1", "2", "3"], 7, STRIDES[:4])(features, [box], [(256, 320)])
    for row, column in ((0, 0), (3, 5), (6, 6)):
        x = x1 / 4 - 0.5 + width / 28 * (column + (np.arange(3) + 0.5) / 3)
        y = y1 / 4 - 0.5 + height / 28 * (row + (np.arange(2) + 0.5) / 2)
        mean = np.mean([looked_up(values, u, v) for u in x for v in y])
        assert float(pooled[0, 0, row, column]) == pytest.approx(mean, abs=1e-5)


def test_boxes_go_to_the_level_of_their_size():
    sides = np.array([1, 55.9, 111.9, 112, 223.9, 224, 300, 447.9, 448, 2000])
    boxes = torch.tensor([[7, 9, 7 + side, 9 + side] for side in sides]).float()
    level = d2.AlignedPool(["0", "1", "2", "3"], 7, STRIDES[:4]).levels(boxes)
    expected = np.clip(np.floor(4 + np.log2(sides / 224)), 2, 5) - 2
    assert level.tolist() == expected.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def rpn(batch=8):
    return d2.L1ProposalNetwork(
        d2.ExactAnchors([[s] for s in SIZES], [RATIOS] * 5, STRIDES),
        RPNHead(4, 3),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=batch,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 10, "testing": 10},
        post_nms_top_n={"training": 10, "testing": 10},
        nms_thresh=0.7,
    )


def test_losses_of_the_proposals():
    """Sums over the regions that were drawn, over the number wanted for two images: 2 * 8.

    Few enough are there that all are drawn.
    """
    torch.manual_seed(0)
    labels = [torch.tensor([1.0, 0, 0, -1, 1]), torch.tensor([0.0, 0, -1, 0, 0])]
    scores, deltas = torch.randn(10, 1), torch.randn(10, 4, requires_grad=True)
    wanted = [torch.randn(5, 4), torch.full((5, 4), -math.inf)]  # of an image without objects
    score_loss, box_loss = rpn().compute_loss(scores, deltas, labels, wanted)
    flat = torch.cat(labels).numpy()
    p = 1 / (1 + np.exp(-scores[:, 0].double().numpy()))
    each = np.where(flat == 1, -np.log(p), np.where(flat == 0, -np.log(1 - p), 0))
    assert float(score_loss) == pytest.approx(each.sum() / 16, rel=1e-5)
    far = (deltas.detach()[:5] - wanted[0]).abs().sum(1)
    assert float(box_loss.detach()) == pytest.approx(float(far[0] + far[4]) / 16, rel=1e-5)
    box_loss.backward()
    assert deltas.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 4]


def test_mask_targets_are_cut_aligned_and_binary():
    """Boxes of 4 x 4 pixels, masks of 2 x 2: a cell is on if two of its four pixels are."""
    mask = torch.zeros(2, 10, 12, dtype=torch.uint8)
    mask[1, 2:5, 3:7] = 1  # rows 2 to 4, columns 3 to 6
    boxes = [torch.tensor([[3.0, 2, 7, 6], [5, 3, 9, 7]]), torch.zeros(0, 4)]
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    matched = [torch.tensor([1, 1]), torch.zeros(0, dtype=torch.int64)]
    labels = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    none = torch.zeros(0, 10, 12, dtype=torch.uint8)
    loss = d2.mask_loss(logits, boxes, [mask, none], labels, matched)
    expected = torch.tensor([[[1.0, 1], [1, 1]], [[1, 0], [0, 0]]])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[:, 2], expected))
    assert float(d2.mask_loss(logits[:0], [none[:0, 0, :4]] * 2, [none] * 2, labels, matched)) == 0


def pasted(mask, box, size):
    """Each pixel's centre, looked up in the mask bilinearly with zeros around it."""
    side = len(mask)
    padded = np.pad(mask, 1)
    out = np.zeros(size, np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            u = (column + 0.5 - box[0]) / (box[2] - box[0]) * side + 0.5
            v = (row + 0.5 - box[1]) / (box[3] - box[1]) * side + 0.5
            i, j = math.floor(v), math.floor(u)
            if 0 <= i <= side and 0 <= j <= side:
                a, b = v - i, u - j
                cell = padded[i : i + 2, j : j + 2]
                value = np.array([1 - a, a]) @ cell @ np.array([1 - b, b])
                out[row, column] = value >= 0.5
    return out


def test_masks_are_pasted_by_looking_up_each_pixel():
    rng = np.random.default_rng(0)
    masks = rng.random((4, 5, 5))
    boxes = [
        (3.3, 2.1, 17.9, 12.6),
        (-4.2, -3.0, 6.5, 9.0),
        (15, 10, 26.7, 22.4),
        (8.2, 3, 8.9, 4.1),
    ]
    found = d2.paste_masks(torch.tensor(masks)[:, None].float(), torch.tensor(boxes), (16, 20))
    expected = np.stack([pasted(m, b, (16, 20)) for m, b in zip(masks, boxes, strict=True)])
    assert found.dtype == torch.uint8
    assert expected[:3].any((1, 2)).all()
    assert np.array_equal(found.numpy(), expected)
    outside = d2.paste_masks(torch.ones(1, 1, 5, 5), torch.tensor([[30.0, 2, 40, 9]]), (16, 20))
    assert not outside.any()


def test_the_stride_is_in_the_1x1_layer():
    for first, expected in ((False, [(1, 1), (2, 2)]), (True, [(2, 2), (1, 1)])):
        body = build_backbone("resnet50", 32, stride_in_1x1=first).body
        block = body["layer3"][0]
        assert [block.conv1.stride, block.conv2.stride] == expected
        assert block.downsample[0].stride == (2, 2)
        assert body["layer1"][0].conv1.stride == body["layer1"][0].conv2.stride == (1, 1)


@pytest.mark.parametrize(
    ("arch", "millions"), [("resnet18", 28.67), ("resnet101", 60.64), ("mobilenet_v2", 19.16)]
)
def test_sizes_are_those_of_the_originals_networks(arch, millions):
    """As counted when they ran; ours have boxes of the background besides."""
    node = nets.node(ARCH=arch, CHANNELS=256, FLAVOUR="d2")
    with torch.device("meta"):
        net = with_frozen_norms(assemble(node, 81))
    count = sum(p.numel() for p in net.parameters()) - 4 * (1024 + 1)
    assert round(count / 1e6, 2) == millions


def test_settings_of_the_flavour():
    net = nets.detector(FLAVOUR="d2", MASK=True)
    assert net.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert net.roi_heads.beta == 0
    assert isinstance(net.roi_heads.mask_roi_pool, d2.AlignedPool)
    torch.manual_seed(0)
    d2.initialize(net.roi_heads)
    predictor = net.roi_heads.box_predictor
    assert float(predictor.cls_score.weight.std().detach()) == pytest.approx(0.01, rel=0.1)
    assert float(predictor.bbox_pred.weight.std().detach()) == pytest.approx(0.001, rel=0.1)
    layers = [m for m in net.roi_heads.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert not any(layer.bias.any() for layer in layers)
