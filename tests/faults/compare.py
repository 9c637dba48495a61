"""Whether a run that was disturbed ended as one that was left alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from mdistiller.engine.checkpoints.store import Store
from mdistiller.engine.checkpoints.write import load_checkpoint

UNTIMED = ("time", "seconds", "images_per_second", "teacher_hits")
"""What may differ: a cache's hits tell what a start found, see docs/running/reliability.md."""


def differences(run: Path, whole: Path) -> list[str]:
    """What a finished run has otherwise than the other: weights, state, logs, curves."""
    found = []
    try:
        ours, theirs = (Store(folder).load("latest") for folder in (run, whole))
        for part in ("model", "optimizer", "scheduler", "ema", "best_acc", "best_epoch"):
            if not same(ours.get(part), theirs.get(part)):
                found.append(f"{part} differs")
        if weight_files(run) != weight_files(whole):
            found.append(f"there are {weight_files(run)}, not {weight_files(whole)}")
        for file in weight_files(whole):
            one, other = (load_checkpoint(folder / file) for folder in (run, whole))
            if not same(one["model"], other["model"]):
                found.append(f"{file} differs")
        if rows(run) != rows(whole):
            found.append("metrics.jsonl differs")
        if (run / "worklog.txt").read_bytes() != (whole / "worklog.txt").read_bytes():
            found.append("worklog.txt differs")
        if events(run) != events(whole):
            found.append("the curves of TensorBoard differ")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def weight_files(run: Path) -> list[str]:
    """Names of the files with weights that a run leaves for good."""
    names = ("best", "epoch_*", "student_*")
    return sorted(path.name for name in names for path in run.glob(name))


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rows(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{key: row[key] for key in row if key not in UNTIMED} for row in found]


def events(run: Path) -> dict[tuple[str, str, int], float]:
    """(folder, curve, step) -> value, as TensorBoard shows the event files of a run."""
    from tensorboardX.proto import event_pb2

    shown: dict[tuple[str, str, int], float] = {}
    for folder in ("train.events", "train.events/steps"):
        for path in sorted((run / folder).glob("events*"), key=lambda path: path.suffix):
            stream = io.BytesIO(path.read_bytes())
            while len(head := stream.read(12)) == 12:
                event = event_pb2.Event()
                length = int.from_bytes(head[:8], "little")
                data = stream.read(length)
                if len(data) < length or len(stream.read(4)) < 4:
                    break  # what a dying process left
                event.ParseFromString(data)
                if event.HasField("session_log"):
                    late = [key for key in shown if key[0] == folder and key[2] >= event.step]
                    for key in late:
                        del shown[key]
                for value in event.summary.value:
                    if not value.tag.endswith(UNTIMED):
                        shown[folder, value.tag, event.step] = value.simple_value
    return shown
