"""How a run was made: config, command, revision, versions, seed, device."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdistiller import __version__
from mdistiller.engine.distributed import world_size
from mdistiller.engine.hooks import Hook
from mdistiller.runtime import project_root

if TYPE_CHECKING:
    from mdistiller.engine.trainer import BaseTrainer


class RunRecord(Hook):
    """`config.yaml` (resolved) and `run.json` (one entry for each start) in the run folder."""

    def before_train(self, trainer: BaseTrainer) -> None:
        write_record(trainer.log_path, trainer.cfg, trainer.device)


def write_record(folder: Path, cfg: Any, device: torch.device) -> None:
    """Write the two files; what is known of earlier starts is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump(sort_keys=False))
    path = folder / "run.json"
    try:
        starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    except (ValueError, KeyError):
        starts = []
    starts.append(
        {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "seed": cfg.EXPERIMENT.SEED,
            "device": describe_device(device),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "git": git_revision(),
            "versions": versions(),
        }
    )
    path.write_text(json.dumps({"starts": starts}, indent=1) + "\n")


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
    """Versions of Python and of the packages that decide about numbers."""
    found = {"python": platform.python_version(), "mdistiller": __version__}
    found["torch"] = str(torch.__version__)  # with its build: +cpu, +cu...
    for package in ("torchvision", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found
