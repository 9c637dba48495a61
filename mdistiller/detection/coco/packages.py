"""COCO's evaluation packages, and the curves that their results contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdistiller.detection.coco.masks import coco_masks
from mdistiller.registry import UserError

STATISTICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
"""Names of COCO's twelve numbers, in pycocotools' order."""
BACKENDS = ("pycocotools", "faster")


def coco_api(backend: str = "pycocotools") -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a backend, "pycocotools" or "faster".

    Raises:
        UserError: its package is not installed.
    """
    coco_masks()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if backend == "pycocotools":
        return COCO, COCOeval
    if backend != "faster":
        raise UserError(
            f"DETECTION.EVALUATOR {backend!r} is unknown (known: {', '.join(BACKENDS)})"
        )
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(
            "DETECTION.EVALUATOR faster needs the package faster-coco-eval: "
            "pip install mdistiller[faster-coco-eval]; or use pycocotools"
        ) from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def curves(run: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """The curves behind the average precision, as plain values in 0..1.

    Args:
        run: a COCOeval after `accumulate`.
        names: of the classes, by category id.

    Returns:
        `ious` [10]; `ap` [10], at each of them; `recalls` [101]; `precision50` and `precision75`
        [101], at each recall, mean over classes; `classes`: for each one that the truth has
        objects of, `AP`, `AP50`, `AP75` and `precision50` [101].
    """
    precision = np.asarray(run.eval["precision"])[:, :, :, 0, -1]  # [IoU, recall, class]
    ious = np.asarray(run.params.iouThrs)
    at50, at75 = (int(np.abs(ious - value).argmin()) for value in (0.5, 0.75))
    present = [k for k in range(precision.shape[2]) if (precision[:, :, k] > -1).any()]
    defined = precision[:, :, present]
    classes = {
        names[int(run.params.catIds[k])]: {
            "AP": float(precision[:, :, k].mean()),
            "AP50": float(precision[at50, :, k].mean()),
            "AP75": float(precision[at75, :, k].mean()),
            "precision50": precision[at50, :, k].tolist(),
        }
        for k in present
    }
    return {
        "ious": ious.tolist(),
        "ap": defined.mean(axis=(1, 2)).tolist() if present else [],
        "recalls": np.asarray(run.params.recThrs).tolist(),
        "precision50": defined[at50].mean(axis=1).tolist() if present else [],
        "precision75": defined[at75].mean(axis=1).tolist() if present else [],
        "classes": classes,
    }
