"""What `eval` found, as Markdown, JSON and CSV."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.files.tables import csv_table, markdown_table
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.evaluation.evaluate import Evaluation
    from mdistiller.evaluation.predictions import Quality
    from mdistiller.evaluation.probe import Probed


def check_places(paths: Iterable[Path]) -> None:
    """Refuse files that cannot be written, before any work."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")


def markdown(found: Sequence[Evaluation], classes: Sequence[str]) -> str:
    """A table of quality; below it, if known, of teachers, of clustering and of alignment."""
    tables = [
        _quality(found, classes),
        _comparison([one for one in found if one.comparison]),
        _collapse([one for one in found if one.collapse]),
        _alignment([one for one in found if one.cka]),
    ]
    return "\n\n".join(table for table in tables if table)


def probed_markdown(probed: Sequence[Probed], kinds: Sequence[str]) -> str:
    """A table of the probes' accuracies."""
    names = {"knn": "k-NN top-1 %", "linear": "linear top-1 %"}
    rows = [
        [
            one.source.name,
            one.source.label,
            *(f"{one.accuracies[kind]:.2f}" for kind in kinds),
            "{:,} + {:,}".format(*one.images),
            f"{one.image_size[1]} x {one.image_size[0]}",
            one.source.note or "-",
        ]
        for one in probed
    ]
    head = ["network", "weights", *(names[kind] for kind in kinds)]
    return markdown_table([*head, "labelled images (train + test)", "pixels", "note"], rows)


def probed_json(probed: Sequence[Probed], labelled: str) -> str:
    """The same as JSON."""
    networks = [
        {
            "label": one.source.label,
            "model": one.source.name,
            "weights": str(one.source.weights),
            "images": list(one.images),
            "image_size": list(one.image_size),
            **one.accuracies,
        }
        for one in probed
    ]
    return json.dumps({"labelled": labelled, "networks": networks}, indent=1) + "\n"


def _quality(found: Sequence[Evaluation], classes: Sequence[str]) -> str:
    head = ["network", "weights", "top-1 %", "top-5 %", "balanced %", "macro F1 %", "loss = NLL"]
    head.append("ECE %")
    rows = []
    for one in found:
        quality = one.quality
        accuracies = [
            (acc, k) for k, acc in enumerate(quality.class_accuracy) if not math.isnan(acc)
        ]
        ends = [f"{classes[k]}: {acc:.1f}" for acc, k in (min(accuracies), max(accuracies))]
        macro = quality.macro
        numbers = [quality.top1, quality.top5, macro["recall"], macro["f1"]]
        texts = [*(f"{x:.2f}" for x in numbers), f"{quality.nll:.4f}", f"{quality.ece:.2f}"]
        rows.append([*_names(one), *texts, *ends, one.subject.source.note or "-"])
    return markdown_table([*head, "lowest class %", "highest class %", "note"], rows)


def per_class(found: Sequence[Evaluation], classes: Sequence[str]) -> str:
    """A table a network, the class of the lowest F1 first; classes without images are left out."""
    head = ["class", "images", "precision %", "recall %", "F1 %", "most often mistaken for"]
    tables = []
    for labels, quality in merged(found):
        rows = []
        scores = list(zip(*quality.class_scores.values(), strict=True))
        for k, row in enumerate(quality.confusion):
            wrong = {j: count for j, count in enumerate(row) if count and j != k}
            most = max(wrong, key=wrong.__getitem__) if wrong else None
            mistaken = "-" if most is None else f"{classes[most]} ({wrong[most]})"
            numbers = [f"{value:.2f}" for value in scores[k]]
            rows.append((scores[k][2], [classes[k], str(sum(row)), *numbers, mistaken]))
        rows = [row for row in rows if not math.isnan(row[0])]
        rows.sort(key=lambda row: row[0])
        table = markdown_table(head, [cells for _, cells in rows])
        tables.append(f"{' = '.join(labels)}\n\n{table}")
    return "\n\n".join(tables)


def merged(found: Sequence[Evaluation]) -> list[tuple[list[str], Quality]]:
    """Results by class with the labels of all networks that have them: the last epoch may be the
    best."""
    alike: dict[str, tuple[list[str], Quality]] = {}
    for one in found:
        labels, _ = alike.setdefault(str(one.quality.confusion), ([], one.quality))
        labels.append(_names(one)[1])
    return list(alike.values())


def _comparison(found: Sequence[Evaluation]) -> str:
    head = ["beside the teacher", "gap", "agreement %", "both right %", "only teacher"]
    head += ["only student", "wrong alike", "wrong apart", "KL(teacher, student)"]
    rows = []
    for one in found:
        c = one.comparison
        assert c is not None
        numbers = [c.gap, c.agreement, c.both_right, c.only_teacher, c.only_student]
        numbers += [c.both_wrong_same, c.both_wrong_other]
        rows.append([_names(one)[1], *(f"{v:.2f}" for v in numbers), f"{c.kl:.4f}"])
    return markdown_table(head, rows)


def _collapse(found: Sequence[Evaluation]) -> str:
    head = ["embedding", "within classes", "between classes", "NC1", "spread of class norms"]
    rows = []
    for one in found:
        c = one.collapse
        assert c is not None
        numbers = (c.within, c.between, c.nc1, c.norm_spread)
        rows.append([_names(one)[1], *(f"{v:.4g}" for v in numbers)])
    return markdown_table(head, rows)


def _alignment(found: Sequence[Evaluation]) -> str:
    head = ["CKA with the teacher", "stages (student-teacher)", "embedding"]
    rows = []
    for one in found:
        stages = [f"{name}: {v:.3f}" for name, v in one.cka.items() if name != "pooled"]
        rows.append([_names(one)[1], ", ".join(stages), f"{one.cka['pooled']:.3f}"])
    return markdown_table(head, rows)


def _names(one: Evaluation) -> list[str]:
    return [one.subject.source.name, one.subject.source.label]


def json_text(facts: dict[str, Any], found: Sequence[Evaluation]) -> str:
    """All of it; null for NaN and infinity."""
    contents = {**facts, "networks": [one.record() for one in found]}
    text = json.dumps(_finite(contents), indent=1, allow_nan=False)
    return _LISTS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


_LISTS = re.compile(r"\[\n([-+.\deE,\s]*)\]")  # of numbers: a row of a confusion matrix on a line


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(found: Sequence[Evaluation]) -> str:
    """A row a network, the teacher's last; nested values are columns such as `teacher.kl`."""
    return csv_table([dict(_flat(one.record())) for one in found])


def _flat(record: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value


def confusion_text(found: Sequence[Evaluation], classes: Sequence[str]) -> str:
    """A row a network and true class: its images, its accuracy in percent, images by prediction."""
    rows = []
    for one in found:
        accuracies = one.quality.class_accuracy
        for name, row, accuracy in zip(classes, one.quality.confusion, accuracies, strict=True):
            first = {"weights": _names(one)[1], "class": name, "images": sum(row)}
            rows.append({**first, "accuracy": accuracy, **dict(zip(classes, row, strict=True))})
    return csv_table(rows)
