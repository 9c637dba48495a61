"""Object detection: Faster and Mask R-CNN of torchvision, distilled on COCO-format data."""

from mdistiller.config.tasks import TASKS, Task

TASKS.add(
    "detection",
    Task(
        section="DETECTION",
        runs_by="this is for a detector: run it with tools/train_detection.py",
        score="test_bbox/AP",
        score_name="box AP",
        logged=("test_bbox/AP", "test_bbox/AP50", "test_segm/AP"),
        curves=(
            ("test_bbox/AP", "Box AP after each round", "AP %"),
            ("test_segm/AP", "Mask AP after each round", "AP %"),
        ),
        subject=("DETECTION.STUDENT.ARCH", "DETECTION.DATA.VAL_ANNOTATIONS"),
        paths=("DETECTION.DATA.VAL_ANNOTATIONS",),
        networks=("DETECTION.TEACHER.ARCH", "DETECTION.STUDENT.ARCH"),
        without_effect=("DETECTION.EVALUATOR", "DETECTION.EVALUATE_TEACHER"),
    ),
)
