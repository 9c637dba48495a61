"""Detections that are nearly right, drawn from the truth of a set."""

import numpy as np
import torch

from mdistiller.detection.coco.dataset import View


def nothing(size=(96, 128)):
    """What a detector says that sees nothing."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, *size, dtype=torch.uint8),
    }


def noisy(data, image_id, seed=0, false=4):
    """The objects of an image, moved, some missed, some of another class, beside false ones.

    The same for an image whenever it is asked for; masks are the boxes' pixels and some noise.
    """
    rng = np.random.default_rng([seed, image_id])
    index = [data.image_id(i) for i in range(len(data))].index(image_id)
    height, width = data.annotations.sizes[data.positions[index]].tolist()
    _, truth = data.item(View(index, min(height, width), max(height, width), masks=False))
    keep = rng.random(len(truth["labels"])) < 0.9
    boxes = truth["boxes"].double().numpy()[keep]
    boxes = boxes + rng.normal(0, 2.5, boxes.shape)
    labels = truth["labels"].numpy()[keep]
    wrong = rng.random(len(labels)) < 0.15
    others = np.array(list(data.category_ids))
    labels = np.where(wrong, rng.choice(others, len(labels)), labels)
    corners = rng.random((false, 2)) * [width * 0.7, height * 0.7]
    more = np.concatenate([corners, corners + rng.random((false, 2)) * 40 + 4], axis=1)
    boxes = np.concatenate([boxes, more]).clip(0, np.tile([width, height], 2))
    labels = np.concatenate([labels, rng.choice(others, false)])
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.9
    return {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.from_numpy(labels),
        "scores": torch.from_numpy(rng.random(len(boxes))).float(),
        "masks": torch.from_numpy(masks),
    }
