#!/usr/bin/env bash
# faster-coco-eval 1.8.0 with pycocotools 2.0.11, numpy 2.2.6, Python 3.11.
#
# faster-coco-eval is documented as a drop-in replacement for pycocotools. With one and the same valid
# annotation file and the same detections its AP depends on the ids, and nothing warns:
#   - annotation ids below 0: AP 0, as if nothing were found.
#   - neighbouring image ids from 2**53 on pass through a double and are mixed up (where the images
#     have different numbers of objects, it stops with an error about dimensions instead).
# pycocotools says the same for all ids. So number images and annotations from 1 before evaluating.
# Output seen:
#   ids from 1              pycocotools 0.3459  faster 0.3459
#   annotation ids from -20 pycocotools 0.3459  faster 0.0
#   image ids from 2**53    pycocotools 0.3459  faster 0.2585
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
cd "$work"
cat > ids.py <<'PY'
import contextlib
import io

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ap(apis, first_image, first_annotation):
    """AP of ten images with an object each, detected exactly in every other one, else beside it."""
    dataset = {"info": {}, "images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    found = []
    for k in range(10):
        image = first_image + k
        dataset["images"].append({"id": image, "width": 100, "height": 100})
        box = [10.0, 10.0, 30.0, 30.0]
        dataset["annotations"].append(
            {"id": first_annotation + k, "image_id": image, "category_id": 1, "bbox": box,
             "area": 900.0, "iscrowd": 0}
        )
        if k % 2:
            box = [60.0, 60.0, 30.0, 30.0]
        found.append({"image_id": image, "category_id": 1, "bbox": box, "score": 0.9 - k / 100})
    coco, evaluation = apis
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = dataset
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 4)


plain = (COCO, COCOeval)
faster = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
results = {}
for name, image, annotation in (
    ("ids from 1", 1, 1),
    ("annotation ids from -20", 1, -20),
    ("image ids from 2**53", 2**53, 1),
):
    results[name] = ap(plain, image, annotation), ap(faster, image, annotation)
    print(f"{name:23} pycocotools {results[name][0]}  faster {results[name][1]}")
assert all(one == 0.3459 for one, _ in results.values()), "pycocotools has changed"
assert results["ids from 1"][1] == 0.3459
assert results["annotation ids from -20"][1] == 0.0, "negative annotation ids count now"
assert results["image ids from 2**53"][1] != 0.3459, "large image ids are told apart now"
PY
"$work/venv/bin/python" ids.py
