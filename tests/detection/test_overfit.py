"""A detector learns a few drawn images by heart, with the commands' own code."""

import json

import torch
from synth import make_coco

from mdistiller.cli import train_detection

SETTINGS = {
    "DETECTION.STUDENT.ARCH": "resnet18",
    "DETECTION.STUDENT.NORM": "batch",
    "DETECTION.STUDENT.FREEZE_AT": 0,
    "DETECTION.STUDENT.CHANNELS": 32,
    "DETECTION.STUDENT.ROI_SAMPLES": 32,
    "DETECTION.DATA.MIN_SIZES": [64],
    "DETECTION.DATA.TEST_MIN_SIZE": 64,
    "SOLVER.TYPE": "AdamW",
    "SOLVER.LR": 0.0005,
    "SOLVER.BATCH_SIZE": 2,
    "SOLVER.MAX_ITER": 56,
    "SOLVER.EVAL_PERIOD": 56,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.STEPS": [48],
    "DATASET.NUM_WORKERS": 0,
    "EXPERIMENT.NAME": "run",
    "DEVICE": "cpu",
}


def test_four_images_are_learnt_by_heart(tmp_path):
    train = make_coco(tmp_path, 4, size=(64, 96), objects=2, empty=0, crowds=0)
    place = {"LOG.PREFIX": tmp_path, "DETECTION.DATA.VAL_IMAGES": train.images}
    place["DETECTION.DATA.VAL_ANNOTATIONS"] = train.annotations
    words = [str(word) for pair in {**SETTINGS, **place}.items() for word in pair]
    assert train_detection.main([*words, *train.keys()]) == 0
    run = tmp_path / "detection" / "run"
    summary = json.loads((run / "summary.json").read_text())
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert row["test_bbox/AP50"] > 50
    assert summary["best_acc"] == row["test_bbox/AP"] > 20
    assert torch.load(run / "student_best", weights_only=True)["detector"]["arch"] == "resnet18"
