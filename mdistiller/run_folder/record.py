"""Record of a run in its folder: config, command, revision, versions, seed, device."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdistiller import __version__
from mdistiller.config.safe_yaml import parse_yaml
from mdistiller.distributed import world_size
from mdistiller.engine.cfg import dump_cfg
from mdistiller.engine.hooks import Hook, Trainer
from mdistiller.files.atomic import replacing
from mdistiller.registry import UserError, first_line
from mdistiller.runtime import project_root

if TYPE_CHECKING:
    from mdistiller.dataset import Data, TestData


class RunRecord(Hook):
    """`config.yaml` (resolved) and `run.json` (one entry for each start) in the run folder.

    If an exception ends the run, the entry has the reason under `ended`.

    Args:
        facts: of what the student is trained on, for `run.json`.
        teacher_acc: accuracy of the teacher in percent, likewise.
        teacher: its weights, a file or PRETRAINED, likewise; of several, a list of mappings with
            `weights`.

    Attributes:
        changes: settings that differ from those of the start before, for `run.json`.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        teacher_acc: float | None = None,
        teacher: Any = None,
    ):
        self.facts, self.teacher_acc, self.teacher = facts, teacher_acc, teacher
        self.changes: Sequence[str] = ()
        self.begun = False

    def before_train(self, trainer: Trainer) -> None:
        self.begun = True
        folder = trainer.log_path
        facts = (self.facts, self.changes, self.teacher_acc, self.teacher)
        write_record(folder, trainer.cfg, trainer.device, *facts)

    def abandon(self, trainer: Trainer) -> None:
        record = read_record(trainer.log_path)
        if not self.begun or not record["starts"]:
            return
        record["starts"][-1]["ended"] = one_line(sys.exc_info()[1])
        with (
            contextlib.suppress(OSError, UserError),  # a full disk may be what ended the run
            replacing(trainer.log_path / "run.json") as temporary,
        ):
            temporary.write_text(json.dumps(record, indent=1) + "\n")

    def summarize(self, trainer: Trainer, data: Data) -> dict[str, Any]:
        return peak_memory(trainer.device)


def one_line(error: BaseException | None) -> str:
    """An error in one line: a UserError's text, any other with its type."""
    if isinstance(error, KeyboardInterrupt):  # a signal; further lines tell how to go on
        return f"KeyboardInterrupt: {first_line(error)}"
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory in MiB, and of what: the GPU's tensors, or else the whole process.

    On a GPU since `torch.cuda.reset_peak_memory_stats`; else since the process began, so of several
    runs in one process the largest.
    """
    if device.type == "cuda":
        return {
            "peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20,
            "peak_memory_of": "GPU",
        }
    try:
        import resource  # not on Windows
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"peak_memory_mib": peak / unit, "peak_memory_of": "process"}


def data_facts(data: Data | TestData) -> dict[str, Any]:
    """What a network's files record of its data: size, normalisation, classes, zoo."""
    return {
        "zoo": data.zoo,
        "image_size": list(data.image_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": data.num_classes,
        "classes": data.classes,
        "preprocessing": asdict(data.preprocessing),
    }


def write_record(
    folder: Path,
    cfg: Any,
    device: torch.device,
    data: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    teacher_acc: float | None = None,
    teacher: Any = None,
) -> None:
    """Write `config.yaml` and `run.json`; entries of earlier starts stay.

    Args:
        data: for example of :func:`data_facts`.
        changes: of the settings, since the start before.
        teacher_acc: in percent; a start that changes no setting need not measure it again.
        teacher: the teacher's weights, if any; a file is recorded as seen from the folder. Of
            several teachers a list of mappings with `weights` and `acc`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(dump_cfg(cfg))
    before = read_record(folder)
    start = _describe_start(cfg, device) | ({"changes": list(changes)} if changes else {})
    record = {"starts": [*before["starts"], start], "data": data, "teacher_acc": teacher_acc}

    def seen(weights: Any) -> Any:
        return os.path.relpath(weights, folder) if isinstance(weights, Path) else weights

    if isinstance(teacher, list):
        last = before.get("teachers") or [{}] * len(teacher)
        record["teachers"] = [
            {**old, **{key: seen(value) for key, value in new.items() if value is not None}}
            for old, new in zip(last, teacher, strict=False)
        ]
    elif teacher is not None:
        record["teacher"] = seen(teacher)
    with replacing(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _describe_start(cfg: Any, device: torch.device) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "seed": cfg.EXPERIMENT.SEED,
        "device": describe_device(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "git": git_revision(),
        "versions": versions(),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """What `run.json` holds; a record without starts if it is missing or damaged."""
    try:
        record = json.loads((folder / "run.json").read_text())
        if isinstance(record["starts"], list):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"starts": []}


def recorded_teacher_acc(folder: Path) -> float | None:
    """The teacher's accuracy in percent that `run.json` says was measured at an earlier start."""
    value = read_record(folder).get("teacher_acc")
    return value if isinstance(value, float) else None


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The config of a run, from its folder."""
    path = folder / "config.yaml"
    try:
        recorded: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
        recorded["EXPERIMENT"]["SEED"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged, so {folder} cannot be reused") from error
    return recorded


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"


def git_revision() -> str:
    """Commit of the checkout, with "+changes" if files differ from it; empty without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(project_root()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    versions = {"python": platform.python_version(), "mdistiller": __version__}
    versions["torch"] = str(torch.__version__)  # with its build: +cpu, +cu...
    for package in ("torchvision", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return versions
