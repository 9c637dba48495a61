"""The model card: what the student is, how it was made, how good it is, and what it costs."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from mdistiller.config.roles import teacher_name
from mdistiller.distillers import Distiller, get_distiller
from mdistiller.engine.cfg import dump_cfg
from mdistiller.engine.metrics import score_of
from mdistiller.export.files import FORMATS, Exported
from mdistiller.export.quantize import Int8
from mdistiller.export.student import Student
from mdistiller.export.usage import interface, snippet
from mdistiller.files.atomic import replacing
from mdistiller.files.tables import markdown_table
from mdistiller.models import count_cost
from mdistiller.run_folder.record import git_revision, versions

_TEST_SET = "test set"
_EMA = "ema_"  # prefix of measurements of the moving average
_LOCAL = ("LOG", "DEVICE")  # parts of a config that only concern the machine it ran on
_PATHS = ("ROOT", "STUDENT_CKPT", "TEACHER_CKPT", "TEACHER_CFG")


class Latency(NamedTuple):
    """Measured time of one batch.

    Attributes:
        what: the file, or PyTorch, and where it ran.
        batch: images in it.
        ms, low, high: median and quartiles in milliseconds.
        rounds: how many were measured.
    """

    what: str
    batch: int
    ms: float
    low: float
    high: float
    rounds: int


class Measured(NamedTuple):
    """An accuracy of the run in percent: its weights, epoch and images."""

    weights: str
    epoch: int
    value: float
    images: str


def model_card(
    student: Student,
    files: Sequence[Exported],
    latencies: Sequence[Latency] = (),
    machine: str = "",
    int8: Int8 | None = None,
) -> str:
    """The text of README.md.

    Args:
        machine: what the latencies were measured on.
        int8: the ONNX file in 8 bits beside the original.
    """
    parts = [
        header(student),
        f"# {student.name}{f' on {student.dataset}' if student.dataset else ''}",
        origin(student),
        "## Accuracy\n\n" + accuracy(student),
        "## Input and output\n\n" + interface(student, files),
        "## Files\n\n" + file_table(files),
        *(f"### {file.path.name}\n\n```python\n{snippet(student, file)}```" for file in files),
        *([f"## In 8 bits\n\n{int8.text()}"] if int8 else []),
        "## Cost\n\n" + cost(student, latencies, machine),
        "## How it was made\n\n" + making(student, files),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(text: str, out: Path) -> None:
    """Put a card beside the files."""
    with replacing(out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def header(student: Student) -> str:
    """The metadata that model hubs read."""
    task = "image-classification"
    distilled = student.run is not None and get_distiller(student.cfg.DISTILLER.TYPE).uses_teacher
    facts: dict[str, Any] = {
        "library_name": "mdistiller",
        "pipeline_tag": task,
        "tags": [task, *(["knowledge-distillation"] if distilled else [])],
    }
    if student.dataset:
        facts["datasets"] = [student.dataset]
    choice = student.run.choice if student.run else ""
    values = [item.value for item in accuracies(student) if item.weights == choice]
    if values:  # the last is that on the test set, where both were measured
        facts["metrics"] = ["accuracy"]
        metric = {"type": "accuracy", "name": "top-1 accuracy (%)", "value": round(values[-1], 4)}
        data = {"type": student.dataset, "name": student.dataset}
        result = {"task": {"type": task}, "dataset": data, "metrics": [metric]}
        facts["model-index"] = [{"name": student.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def origin(student: Student) -> str:
    """Network, data, method and teacher in a few sentences."""
    settings = f" with {student.settings}" if student.settings else ""
    text = f"`{student.name}`{settings} for {student.num_classes} classes"
    if student.run is None:
        return f"{text}. Weights: {student.checkpoint}; how they were trained is not recorded."
    node = student.cfg.DISTILLER
    method = get_distiller(node.TYPE)
    text += f", trained on `{student.dataset}` by " + {"NONE": "cross-entropy alone"}.get(
        node.TYPE, node.TYPE
    )
    if method.uses_teacher:
        value = student.run.summary.get("teacher_acc")
        accuracy = "" if value is None else f" (top-1 {value:.2f} %)"
        text += f" under the teacher `{teacher_name(student.cfg)}`{accuracy}"
    else:
        text += ", without a teacher"
    if method.forward_test is not Distiller.forward_test:
        text += (
            f". {node.TYPE} predicts by a `forward_test` of its own; the files hold the student "
            "network alone, whose accuracy may differ from the one given here"
        )
    return f"{text}."


def accuracies(student: Student) -> list[Measured]:
    """What the run recorded of its best and last weights, and of those exported."""
    if student.run is None:
        return []
    run, split = student.run, student.cfg.DATASET.VAL_SPLIT
    images = f"{split} held-out training images" if split else _TEST_SET
    peer = re.match(r"peer\d+_", run.choice)
    measured = []
    for prefix in ("", _EMA) if peer is None else (peer[0],):
        key = f"{prefix}test_acc"
        values = {row["epoch"]: row[key] for row in run.epochs if key in row}
        if not values:
            continue
        by = student.cfg.LOG.get("SELECT_BY", "top1")
        score = {row["epoch"]: score_of(row, by, prefix) for row in run.epochs if key in row}
        # of equal ones the later, as the files have it
        last, best = max(values), max(values, key=lambda epoch: (score[epoch], epoch))
        epochs = {f"{prefix}best": best, f"{prefix}latest": last}
        chosen = run.choice.removeprefix(prefix).removeprefix("epoch_")
        if chosen.isdigit() and prefix != _EMA:
            epochs[run.choice] = int(chosen)
        measured += [
            Measured(name, epoch, values[epoch], images)
            for name, epoch in epochs.items()
            if epoch in values
        ]
        if f"{key}_best" in run.summary:
            for name, epoch, which in (("best", best, "best"), ("latest", last, "last")):
                value = run.summary[f"{key}_{which}"]
                measured.append(Measured(f"{prefix}{name}", epoch, value, _TEST_SET))
    return measured


def accuracy(student: Student) -> str:
    """Last and best, what the best was selected on, and which of them was exported."""
    measured = accuracies(student)
    if student.run is None or not measured:
        return "Unknown: the weights came without the record of a run."
    rows = []
    for item in measured:
        mark = " (these files)" if item.weights == student.run.choice else ""
        rows.append([f"{item.weights}{mark}", item.epoch, f"{item.value:.2f}", item.images])
    selected = f"The best epoch was selected on the {measured[0].images}"
    flattered = ", which flatters its accuracy" if measured[0].images == _TEST_SET else ""
    head = ["weights", "epoch", "top-1 %", "measured on"]
    lines = [markdown_table(head, rows), "", f"{selected}{flattered}."]
    if any(item.weights.startswith(_EMA) for item in measured):
        decay = student.cfg.SOLVER.EMA
        lines.append(f"Rows {_EMA}* are of the moving average of the weights (decay {decay}).")
    last, epochs = max(item.epoch for item in measured), student.cfg.SOLVER.EPOCHS
    if last < epochs:
        lines.append(f"The run was not finished: {last} of {epochs} epochs.")
    return "\n".join(lines)


def file_table(files: Sequence[Exported]) -> str:
    """Each file, its size, and how far it is from PyTorch."""
    rows = []
    for file in files:
        size = file.path.stat().st_size / 1e6
        values = "0 to 1" if file.raw else "normalised"
        rows.append([f"`{file.path.name}`", f"{size:.2f}", values, f"{file.difference:.1e}"])
    head = ["file", "MB", "input", "largest difference of a logit from PyTorch"]
    return markdown_table(head, rows)


def cost(student: Student, latencies: Sequence[Latency], machine: str) -> str:
    """Parameters, operations, and measured latencies."""
    counted = count_cost(student.net, student.image_size)
    height, width = student.image_size
    lines = [
        f"{counted.parameters:,} parameters; {counted.flops / 1e6:,.1f} MFLOPs for one "
        f"{width}x{height} image (convolutions and matrix products, a multiplication and an "
        "addition counted as two)."
    ]
    if latencies:
        head = ["run by", "batch", "median ms", "quartiles", "images/s", "runs"]
        rows = []
        for row in latencies:
            times = [f"{row.ms:.2f}", f"{row.low:.2f} to {row.high:.2f}"]
            rows.append(
                [row.what, row.batch, *times, f"{1e3 * row.batch / row.ms:,.0f}", row.rounds]
            )
        lines += ["", markdown_table(head, rows), "", f"Wall-clock time on {machine}."]
    return "\n".join(lines)


def making(student: Student, files: Sequence[Exported]) -> str:
    """Revisions, versions and the config."""
    lines = []
    if student.run is not None and student.run.start:
        start = student.run.start
        lines.append(
            f"- Trained: {start.get('time', '')}, seed {start.get('seed')}, on "
            f"{start.get('device', '')}; {_software(start.get('git', ''), start['versions'])}."
        )
    names = [package for file in files for package in FORMATS[file.format].packages]
    packages = versions() | {name: importlib.metadata.version(name) for name in names}
    lines.append(f"- Exported from {student.checkpoint}: {_software(git_revision(), packages)}.")
    if student.run is not None:
        config = f"```yaml\n{_shareable_config(student)}```"
        lines += ["", f"<details><summary>Config</summary>\n\n{config}\n\n</details>"]
    return "\n".join(lines)


def _software(revision: str, packages: dict[str, str]) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    return listed + (f", git revision {revision}" if revision else "")


def _shareable_config(student: Student) -> str:
    """The config without what only concerns the machine it ran on; paths are cut to names."""
    cfg = {k: v for k, v in yaml.safe_load(dump_cfg(student.cfg)).items() if k not in _LOCAL}
    cfg["IMPORTS"] = [PurePath(name).name for name in cfg["IMPORTS"]]
    for node in (cfg["DATASET"], cfg["DISTILLER"]):
        node.update({key: PurePath(node[key]).name for key in _PATHS if node.get(key)})
    text: str = yaml.safe_dump(cfg, sort_keys=False)
    return text
