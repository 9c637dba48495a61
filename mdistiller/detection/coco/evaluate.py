"""Average precision of detectors by COCO's protocol, with pycocotools or faster-coco-eval.

Ground truth is the whole annotation file with its crowd regions, in which COCO's protocol ignores
detections. Left out is only what DETECTION.DATA.BAD_ANNOTATIONS leaves out: objects without a box,
and for mask AP those without a mask. Objects of more than 1e10 pixels, which the backends ignore,
count as large.
Results have the format of COCO's result files: pixels of the original image, category ids, masks as
run lengths.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mdistiller import runtime
from mdistiller.console import print_log, progress
from mdistiller.detection.batches import Batch
from mdistiller.detection.coco.annotations import read_contents
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.masks import coco_masks, encode_mask, polygon_parts
from mdistiller.detection.coco.packages import STATISTICS, coco_api, curves
from mdistiller.detection.coco.repairs import area_fault
from mdistiller.detection.networks.detector import Detector
from mdistiller.registry import UserError

_COCOS_LARGEST = 1e10
"""Pixels of an object above which COCO's ranges "all" and "large" end, and missing it is free."""


class CocoEvaluator:
    """Collects the detections of all processes and computes AP on rank 0.

    Args:
        dataset: the validation set.
        masks: also compute mask AP; the annotation file must have masks.
        backend: "pycocotools" or "faster".

    Attributes:
        results: this process's COCO result records by image id, also for images without detections.
        curves: after :meth:`summarize`, on rank 0; see :func:`curves`.
    """

    def __init__(
        self, dataset: CocoDetectionSet, masks: bool = False, backend: str = "pycocotools"
    ):
        if not len(dataset.labels):
            what = "object with a mask" if dataset.masks else "object"
            raise UserError(
                f"{dataset.annotations.path} has no {what} except crowd regions, so there is no "
                "average precision; name another file by DETECTION.DATA.VAL_ANNOTATIONS"
            )
        self.dataset, self.kinds = dataset, ("bbox", "segm") if masks else ("bbox",)
        self.labels = {number: label for label, number in dataset.category_ids.items()}
        self.api = coco_api(backend)
        self.results: dict[int, list[dict[str, Any]]] = {}
        self.curves: dict[str, dict[str, Any]] = {}

    def add(
        self, targets: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the detections in some images.

        Args:
            targets: the images' targets; only `image_id` is read.
            detections: for each image `boxes` [n, 4] (x1, y1, x2, y2), `labels` [n], `scores` [n]
                and, where masks are measured, `masks` [n, H, W] of 0 and 1; all in pixels of the
                original image. Labels that no category has are left out.
        """
        for target, found in zip(targets, detections, strict=True):
            self.results[int(target["image_id"])] = self._records(target, found)

    def _records(
        self, target: Mapping[str, Any], found: Mapping[str, Tensor]
    ) -> list[dict[str, Any]]:
        corners = found["boxes"].detach().double().cpu()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
        labels, scores = found["labels"].tolist(), found["scores"].detach().double().tolist()
        records = [
            {
                "image_id": int(target["image_id"]),
                "category_id": self.dataset.category_ids.get(label),
                "bbox": box,
                "score": score,
            }
            for label, box, score in zip(labels, boxes.tolist(), scores, strict=True)
        ]
        if "segm" in self.kinds:
            masks = found["masks"].to("cpu", torch.uint8).numpy()
            for record, mask in zip(records, masks, strict=True):
                record["segmentation"] = encode_mask(mask)
        return [record for record in records if record["category_id"] is not None]

    def summarize(self) -> dict[str, float]:
        """Average precision and recall in percent, the same in all processes.

        Returns:
            "bbox/AP", "bbox/AP50", ... (:data:`STATISTICS`), "bbox/AP/NAME" of each class; "segm/"
            likewise. Undefined numbers (of small objects, if there are none) are left out.
        """
        results = self.gather()
        if not runtime.distributed():
            return self._measure(results)
        outcome: list[Any] = [None]
        if runtime.rank() == 0:
            try:
                outcome = [self._measure(results)]
            except Exception as error:  # the others wait for a word
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=runtime.side_group())
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        numbers: dict[str, float] = outcome[0]
        return numbers

    def gather(self) -> dict[int, list[dict[str, Any]]]:
        """All processes' results on rank 0, by image, each image once; elsewhere nothing."""
        if not runtime.distributed():
            return self.results
        first = runtime.rank() == 0
        parts: list[Any] | None = [None] * runtime.world_size() if first else None
        dist.gather_object(self.results, parts, dst=0, group=runtime.side_group())
        merged: dict[int, list[dict[str, Any]]] = {}
        for part in parts or ():
            for image, records in part.items():
                merged.setdefault(image, records)
        return merged

    def _measure(self, results: Mapping[int, list[dict[str, Any]]]) -> dict[str, float]:
        images = sorted(results)
        if len(images) < len(self.dataset):
            text = f"WARNING: measured on {len(images)} of the {len(self.dataset)} images"
            print_log(text, "EVAL")
        records = [record for image in images for record in results[image]]
        names = {label: self.dataset.class_names[label] for label in self.dataset.category_ids}
        numbers: dict[str, float] = {}
        with contextlib.redirect_stdout(io.StringIO()):  # both backends report to the terminal
            for kind in self.kinds:
                run = self._run(self._truth(kind), records, kind, images)
                pairs = zip(STATISTICS, run.stats, strict=False)
                defined = {name: float(value) for name, value in pairs if value > -1}
                self.curves[kind] = curves(run, names)
                classes = self.curves[kind]["classes"].items()
                defined.update({f"AP/{name}": one["AP"] for name, one in classes})
                numbers.update({f"{kind}/{name}": 100 * value for name, value in defined.items()})
        return numbers

    def _truth(self, kind: str) -> Any:
        """The annotation file as the backend's COCO object; missing fields are filled in.

        Images and objects are numbered from 1, in the order of the ids and of the file, categories
        by label: the backends lose objects with ids up to 0 and mix up ids of 2**53 and more, and
        not the same ones.
        """
        annotations = self.dataset.annotations
        contents = read_contents(annotations.path, "DETECTION.DATA.VAL_ANNOTATIONS")
        if len(contents["annotations"]) != len(annotations.links):
            raise UserError(f"{annotations.path} has changed since it was read; start again")
        useless = (
            annotations.left_out | annotations.maskless if kind == "segm" else annotations.left_out
        )
        sizes = annotations.sizes.tolist()
        images = [{"id": k, "height": h, "width": w} for k, (h, w) in enumerate(sizes, 1)]
        pairs = zip(contents["annotations"], annotations.links.tolist(), strict=True)
        usable = [
            self._object(record, position, image + 1, self.labels[category])
            for position, (record, (image, category)) in enumerate(pairs)
            if position not in useless
        ]
        categories = [{"id": label} for label in self.dataset.category_ids]
        truth = self._coco(
            {"info": {}, "images": images, "categories": categories, "annotations": usable}
        )
        for record in usable:
            if area_fault(record.get("area"), *sizes[record["image_id"] - 1]):
                record["area"] = self._area(truth, record)
        return truth

    def _object(
        self, record: Mapping[str, Any], position: int, image: int, label: int
    ) -> dict[str, Any]:
        """An annotation at a position of the file, under the backend's ids."""
        ids = {"id": position + 1, "image_id": image, "category_id": label}
        one = {"iscrowd": 0, **record, **ids}
        if self._has_mask(position) and isinstance(one["segmentation"], list):
            one["segmentation"] = polygon_parts(one["segmentation"])
        return one

    def _area(self, truth: Any, record: Mapping[str, Any]) -> float:
        """An object's area: of its mask for mask AP, else of its box."""
        if self._has_mask(record["id"] - 1):
            return float(coco_masks().area(truth.annToRLE(record)))
        image = truth.imgs[record["image_id"]]
        area: float = record["bbox"][2] * record["bbox"][3]
        return min(area, image["height"] * image["width"])

    def _has_mask(self, position: int) -> bool:
        return "segm" in self.kinds and position not in self.dataset.annotations.maskless

    def _coco(self, contents: Mapping[str, Any]) -> Any:
        coco = self.api[0]()
        coco.dataset = dict(contents)
        coco.createIndex()
        return coco

    def _run(
        self, truth: Any, records: Sequence[Mapping[str, Any]], kind: str, images: list[int]
    ) -> Any:
        """Run COCOeval and return it."""
        # With boxes there, masks would be sorted into small, medium and large by the boxes' area.
        left_out = "bbox" if kind == "segm" else "segmentation"
        place = self.dataset.annotations.position
        results = [
            {
                **{key: value for key, value in record.items() if key != left_out},
                "image_id": place(record["image_id"]) + 1,
                "category_id": self.labels[record["category_id"]],
            }
            for record in records
        ]
        detected = (
            truth.loadRes(results) if results else self._coco({**truth.dataset, "annotations": []})
        )
        run = self.api[1](truth, detected, kind)
        run.params.imgIds = [place(image) + 1 for image in images]
        run.params.areaRng = [list(span) for span in run.params.areaRng]
        for span in run.params.areaRng:
            if span[1] == _COCOS_LARGEST:
                span[1] = math.inf
        run.evaluate()
        run.accumulate()
        run.summarize()
        return run

    def save(self, path: Path, results: Mapping[int, list[dict[str, Any]]]) -> None:
        """Write :meth:`gather`'s result as a COCO result file, with the annotation file's ids."""
        annotations = self.dataset.annotations
        records = [
            {
                **record,
                "image_id": annotations.written_image(record["image_id"]),
                "category_id": annotations.written_category(record["category_id"]),
            }
            for image in results.values()
            for record in image
        ]
        path.write_text(json.dumps(records))


@torch.no_grad()
def detect_all(
    detector: Detector, loader: Iterable[Batch], device: torch.device, evaluator: CocoEvaluator
) -> None:
    """Add a detector's detections in this process's images; puts it into eval mode."""
    detector.eval()
    for images, targets in progress(loader, "eval"):
        inputs = [image.to(device, non_blocking=True) for image in images]
        evaluator.add(targets, detector.detect(inputs, [target["size"] for target in targets]))


def evaluate_detector(
    detector: Any, loader: Any, device: torch.device, backend: str = "pycocotools"
) -> dict[str, float]:
    """Average precision of a detector in percent; see :meth:`CocoEvaluator.summarize`.

    Mask AP is computed if the detector predicts masks and the data set has them.

    Args:
        detector: of :func:`models.build_detector`; in eval mode afterwards.
        loader: of :func:`data.val_loader`; its `dataset` is the validation set.
    """
    evaluator = CocoEvaluator(loader.dataset, makes_masks(detector, loader.dataset), backend)
    detect_all(detector, loader, device, evaluator)
    return evaluator.summarize()


def makes_masks(detector: Detector, dataset: CocoDetectionSet) -> bool:
    """Whether mask AP can be computed: the detector predicts masks and the data set has them."""
    return dataset.masks and bool(detector.roi_heads.has_mask())
