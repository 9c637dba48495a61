"""What `eval_detection` found, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdistiller.files.tables import markdown_table

if TYPE_CHECKING:
    from mdistiller.detection.batches import ValBatches
    from mdistiller.engine.cfg import Config


@dataclass
class Subject:
    """A detector to measure, and what was found.

    Attributes:
        label: what to call it.
        node: its config, a DETECTION.STUDENT or TEACHER; `where` is its name for errors.
        numbers, curves: see `CocoEvaluator`.
        seconds: an image, reading included.
    """

    label: str
    node: Config
    where: str = "DETECTION.STUDENT"
    parameters: int = 0
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)


def tables(subjects: Sequence[Subject]) -> str:
    """COCO's numbers in percent, a row a network; below, the AP of classes, a column a network."""
    from mdistiller.detection.coco.packages import STATISTICS

    parts = []
    for kind, title in (("bbox", "boxes"), ("segm", "masks")):
        having = [one for one in subjects if f"{kind}/AP" in one.numbers]
        if not having:
            continue
        rows = [
            [s.label, s.node.ARCH, *(_percent(s, f"{kind}/{name}") for name in STATISTICS)]
            for s in having
        ]
        parts.append(markdown_table([title, "network", *STATISTICS], rows))
        keys = dict.fromkeys(k for s in having for k in s.numbers if k.startswith(f"{kind}/AP/"))
        rows = [
            [key.removeprefix(f"{kind}/AP/"), *(_percent(one, key) for one in having)]
            for key in keys
        ]
        parts.append(markdown_table([f"AP of {title}", *(one.label for one in having)], rows))
    return "\n\n".join(parts)


def _percent(subject: Subject, key: str) -> str:
    return f"{subject.numbers[key]:.2f}" if key in subject.numbers else "-"


def json_text(cfg: Config, loader: ValBatches, subjects: Sequence[Subject]) -> str:
    """All of it, percentages as such; curves in 0..1."""
    data = loader.dataset
    contents = {
        "annotations": str(data.annotations.path),
        "images": len(data),
        "classes": [data.class_names[label] for label in data.category_ids],
        "evaluator": cfg.DETECTION.EVALUATOR,
        "networks": [
            {
                "label": one.label,
                "arch": one.node.ARCH,
                "weights": one.node.WEIGHTS,
                "parameters": one.parameters,
                "seconds_per_image": one.seconds,
                "numbers": one.numbers,
                "curves": one.curves,
            }
            for one in subjects
        ],
    }
    return json.dumps(contents, indent=1, allow_nan=False) + "\n"
