#!/usr/bin/env bash
# pycocotools 2.0.11 (and faster-coco-eval 1.8.0), numpy 2.2.6, Python 3.11.
#
# `area` of an annotation is usually taken to matter for AP of small, medium and large objects only.
# The range "all" is [0, 1e10] as well, and an object outside it is ignored, as a crowd is: missing it
# costs nothing, in AP of all sizes. Objects of more than 1e10 pixels are real in gigapixel slides (here a
# region of 120,000 x 100,000 in an image of 150,000 x 150,000). Half of the objects are detected:
# with the true areas AP is 1.0, as if the missed half did not exist; with the same boxes and pixels
# counted at half the resolution (areas / 4) it is 0.505. Output seen:
#   areas of 1.2e10  pycocotools 1.0  faster 1.0
#   areas of 0.3e10  pycocotools 0.505  faster 0.505
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
cd "$work"
cat > area.py <<'PY'
import contextlib
import io

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SMALL = [0.0, 0.0, 1000.0, 1000.0]


def ap(apis, scale):
    """AP where a small object of each image is detected and a huge one is missed."""
    huge = [0.0, 2000.0 * scale, 120_000.0 * scale, 100_000.0 * scale]
    dataset = {"info": {}, "images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    found = []
    for image in range(1, 6):
        side = int(150_000 * scale)
        dataset["images"].append({"id": image, "width": side, "height": side})
        for box in (SMALL, huge):
            number = len(dataset["annotations"]) + 1
            dataset["annotations"].append(
                {"id": number, "image_id": image, "category_id": 1, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )
        found.append({"image_id": image, "category_id": 1, "bbox": SMALL, "score": 0.9})
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


backends = (
    (COCO, COCOeval),
    (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
)
for text, scale, want in (("1.2e10", 1.0, 1.0), ("0.3e10", 0.5, 0.505)):
    numbers = [ap(apis, scale) for apis in backends]
    print(f"areas of {text}  pycocotools {numbers[0]}  faster {numbers[1]}")
    for number in numbers:
        assert abs(number - want) < 1e-3, f"areas of {text}: AP {number}, expected {want}"
PY
"$work/venv/bin/python" area.py
